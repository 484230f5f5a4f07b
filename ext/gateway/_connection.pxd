"""The connections of one worker and the path of a message through them.

A message goes from the worker's read buffer through the scanner and the routing table into the write queue
of its target, or into the stream to the worker that has the target: no Python object, no task, no
allocation. Everything else is handed to `Router.handler` (gateway.worker), which is Python.

The sockets stand in an epoll set of the router's own, which stands in the event loop as one descriptor. So
one pass reads from many agents into one buffer, and at its end each target gets what came for it in one
write.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from gateway._addresses cimport Addresses
from gateway._counters cimport Counters
from gateway._ledger cimport Ledger
from gateway._mesh cimport Link, Record
from gateway._routing cimport DID_SIZE, RoutingTable
from gateway._timers cimport Timer, TimerWheel

cdef enum ConnectionState:
    UNREGISTERED  # the 101 response and the gateway's REGISTER are out
    REGISTERED
    CLOSING       # a CLOSE frame is out or about to; what arrives is ignored, except its answer
    CLOSED

cdef enum:
    INPUT_BYTES = 524_288     # one read; the largest frame and the largest batch fit twice
    EVENTS_MAX = 256          # of one pass: what came for a target waits for the others' reads
    POOLED_BYTES = 16_384     # 25 messages of the usual size; longer queues grow by realloc
    POOL_MAX = 256            # buffers kept: 4 MiB, one for every socket of a pass
    TRIM_TICKS = 50           # how often free memory goes back to the system, if there was much to free
    HELD_COPY_MAX = 4_096     # see Connection.on_readable
    FRAGMENTS_MAX = 4_096     # of one message; without an end a connection would cost for nothing
    BLOCKED_PATIENCE = 5      # times close_timeout

cdef class Connection

cdef class Router:
    cdef:
        readonly RoutingTable table
        readonly TimerWheel timers
        readonly object handler
        readonly int worker
        int epoll_fd
        # Connection or None by index. A route holds an index, never a pointer.
        list connections
        list free_indices
        list links              # Link or None by worker
        list open_links         # those that are not None
        readonly uint64_t life  # of this process: random, as far as other nodes see it
        uint64_t streams        # that have begun in it
        Ledger ledger
        Addresses addresses
        Counters counters_of    # keeps `counted` alive
        uint64_t* counted       # this worker's row
        uint32_t ping_ticks, pong_ticks, idle_ticks, close_ticks
        uint32_t message_rate, message_burst  # messages per second and at once; rate 0: no limit
        Py_ssize_t message_max, frame_max, write_queue_max
        char* input             # owned: INPUT_BYTES
        # Connections with something to write, and connections that end, when this pass does. References
        # are owned.
        void** dirty
        Py_ssize_t dirty_size, dirty_capacity
        list broken
        # Free write buffers of POOLED_BYTES each. Owned.
        void** pool
        Py_ssize_t pool_size
        bint has_freed          # large buffers, since the last time
        uint32_t trimmed_at     # tick

    cdef char* acquire(self) except NULL
    cdef void release(self, char* data, uint32_t capacity) noexcept
    cdef int mark(self, Connection connection) except -1
    cdef int bury(self, Connection connection) except -1
    cdef int give_up(self, Connection connection) except -1
    cpdef int flush(self) except -1
    cdef int end_pass(self, bint confirm_now) except -1
    cdef int watch(self, int fd, int operation, uint32_t events, uint64_t tag) except -1
    cdef int deliver(self, Link link, const Record* record, const char* payload) except -1
    cdef int lose(self, Link link) except -1
    cdef Link link_to(self, uint16_t worker)
    cdef uint64_t next_stream(self) noexcept
    cdef int tell_news(self, bint with_freed) except -1
    cdef int unblock(self, Link link) except -1
    cdef int write_link(self, Link link, bint confirm_now) except -1

cdef class Connection:
    cdef:
        Router router
        public object session       # gateway.registry.Session once registered
        readonly object handshake   # gateway.handshake.Handshake until then
        bytearray fragments         # of an unfinished message (RFC 6455 section 5.4)
        bytes unanswered_ping       # the latest that came while writing was blocked
        bytes goodbye               # the CLOSE frame, as far as it is not written
        object recorded             # deque: numbers in the ledger of the frames in `out`; None: not slow
        readonly uint64_t epoch     # of the session
        int fd
        uint32_t fragment_count
        uint32_t address            # under which it is counted, see Addresses
        readonly uint32_t index
        char did[DID_SIZE]
        readonly ConnectionState state
        readonly uint16_t close_code     # what was sent; 0: nothing yet
        readonly uint16_t received_code  # what came first; 1005: a CLOSE without a code; 0: none
        bint is_dirty
        bint is_blocked             # the socket takes no more
        bint is_deaf                # where the next frame begins is unknown
        bint is_ending              # both sides have said goodbye
        bint is_broken              # on the router's list of those that end
        bint is_pinged              # a WebSocket ping is not answered yet
        public bint is_moving       # messages for it go to the handler, see gateway.moves
        public bint is_waiting      # messages of it go to the handler, see gateway.locations
        uint32_t last_heard, last_message, pinged_at  # ticks
        Timer timer
        # Token bucket: thousandths of messages, and when they were counted.
        uint32_t tokens, tokens_at
        uint32_t refused_in_row     # since the bucket was half full
        # What was read of a frame whose rest is not here yet.
        char* held          # owned; NULL: nothing
        uint32_t held_size, held_capacity
        uint32_t held_total  # of the frame, in bytes; 0: not known
        # The write queue: whole frames, the first of which may be written in part.
        char* out           # owned, from the router's pool; NULL: nothing waits
        uint32_t out_size, out_capacity
        uint32_t head_written  # bytes of the first frame

    # Append one frame. False, with nothing queued, if the queue would be longer than allowed.
    cdef bint queue(self, uint8_t opcode, const char* payload, Py_ssize_t size) except -1
    cdef int on_readable(self) except -1
    cdef int on_writable(self) except -1
    cdef Py_ssize_t read_frames(self, char* data, Py_ssize_t size) except -1
    cdef int hold(self, const char* data, Py_ssize_t size) except -1
    cdef bint allow(self) noexcept
    cdef int receive(self, const char* data, Py_ssize_t size) except -1
    cdef int receive_rare(
        self, uint8_t opcode, bint fin, uint8_t rsv, const char* data, Py_ssize_t size
    ) except -1
    cdef int receive_close(self, const char* data, Py_ssize_t size) except -1
    cdef int write_out(self) except -1
    cdef int write_goodbye(self) except -1
    cdef int block(self) except -1
    cdef int drop_head(self, uint32_t size) except -1
    cdef int record(self, const char* frame) except -3
    cdef void release_queue(self) noexcept
    cdef int end(self) except -1
    cdef uint32_t next_check(self) noexcept
    cdef int on_timer(self) except -1
