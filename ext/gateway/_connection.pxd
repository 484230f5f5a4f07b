"""The connections of one worker and the path of a message through them.

A message goes from picows' read buffer through the scanner and the routing table into the write queue of
its target: no Python object, no task. Everything else is handed to `Router.handler` (gateway.server),
which is Python.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from gateway._routing cimport DID_SIZE, RoutingTable
from gateway._timers cimport Timer, TimerWheel
from picows.picows cimport WSFrame, WSListener, WSTransport

cdef enum ConnectionState:
    UNREGISTERED  # the 101 response and the gateway's REGISTER are out
    REGISTERED
    CLOSING       # a CLOSE frame is out; what arrives is ignored, except its answer
    CLOSED

cdef struct Counters:
    uint64_t messages_routed
    uint64_t bytes_routed
    uint64_t messages_received  # text messages of any kind
    uint64_t pings_sent

cdef class Connection

cdef class Router:
    cdef:
        readonly RoutingTable table
        readonly TimerWheel timers
        readonly object handler
        # Connection or None by index. A route holds an index, never a pointer.
        list connections
        list free_indices
        Counters counted
        uint32_t ping_ticks, pong_ticks, idle_ticks, close_ticks
        Py_ssize_t message_max, write_queue_max
        # Connections with something to write before this read ends. References are owned.
        void** dirty
        Py_ssize_t dirty_size, dirty_capacity
        # Free write buffers of POOLED_BYTES each. Owned.
        void** pool
        Py_ssize_t pool_size

    cdef char* acquire(self) except NULL
    cdef void release(self, char* data, uint32_t capacity) noexcept
    cdef int mark(self, Connection connection) except -1
    cpdef int flush(self) except -1

cdef class Connection(WSListener):
    cdef:
        Router router
        WSTransport transport
        readonly object session     # gateway.registry.Session once registered
        readonly object handshake   # gateway.handshake.Handshake until then
        bytearray fragments         # of an unfinished message (RFC 6455 section 5.4)
        uint32_t fragment_count
        bytes unanswered_ping       # the latest that came while writing was blocked
        char did[DID_SIZE]
        readonly ConnectionState state
        readonly uint32_t index
        readonly uint16_t close_code  # what was sent; 0: nothing yet
        bint is_dirty
        bint is_blocked             # uvloop holds unwritten bytes: the socket is not ours
        bint is_pinged              # a WebSocket ping is not answered yet
        int socket
        uint32_t last_heard, last_message, pinged_at  # ticks
        Timer timer
        # The write queue
        char* out           # owned, from the router's pool; NULL: nothing waits
        uint32_t out_size
        uint32_t out_capacity
        uint32_t in_flight  # of these, at the head: a frame whose rest uvloop is writing

    # Append one frame. False, with nothing queued, if the queue would be longer than allowed.
    cdef bint queue(self, const char* payload, Py_ssize_t size) except -1
    cdef int write_out(self) except -1
    cdef int drop_head(self, uint32_t size) except -1
    cdef int receive(self, const char* data, Py_ssize_t size) except -1
    cdef int receive_rare(self, WSFrame frame) except -1
    cdef void release_queue(self) noexcept
    cdef uint32_t next_check(self) noexcept
    cdef int on_timer(self) except -1
