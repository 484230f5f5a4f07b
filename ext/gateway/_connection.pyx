"""The connections of one worker; see _connection.pxd for the design."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove

import os
from collections import deque

from gateway._addresses cimport Addresses
from gateway._counters cimport (
    BYTES_ROUTED,
    CONNECTIONS,
    HEARTBEATS,
    MESSAGES_CROSSED,
    MESSAGES_RECEIVED,
    MESSAGES_ROUTED,
    PINGS_SENT,
    UNCONFIRMED_BYTES,
    WAITING,
    Counters,
)
from gateway._frames cimport ANSWER, ERROR, ICE_CANDIDATE, OFFER, OK, Envelope, is_utf8, scan_envelope
from gateway._ledger cimport NO_RECORD, NO_ROOM, Ledger
from gateway._mesh cimport (
    LINK_ACCOUNT,
    LINK_MAX,
    LINK_RESERVE,
    MAX_WORKERS,
    ROUTED,
    STREAM_BITS,
    Link,
    Record,
    RemoteLink,
)
from gateway._routing cimport DID_PREFIX_SIZE, DID_SIZE, Route, RoutingTable
from gateway._timers cimport TICKS_PER_SECOND, TimerWheel
from gateway._websocket cimport (
    BINARY,
    CLOSE,
    CONTINUATION,
    FRAME_PARTIAL,
    FRAME_TOO_LARGE,
    FRAME_WHOLE,
    HEADER_MAX,
    PING,
    PONG,
    TEXT,
    Frame,
    Opcode,
    frame_size,
    read_frame,
    write_header,
)

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void* data, size_t size, int flags)
    ssize_t recv(int fd, void* data, size_t size, int flags)
    int shutdown(int fd, int how)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int SHUT_WR

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll, epoll_event* events, int count, int timeout)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    int EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    #define aic_trim() malloc_trim(0)
    #else
    #define aic_trim() ((void)0)
    #endif
    """
    void aic_trim() noexcept

# What one agent may send to another through the gateway.
cdef uint32_t ROUTED_TYPES = (1 << OFFER) | (1 << ANSWER) | (1 << ICE_CANDIDATE) | (1 << ERROR)

cdef enum:
    # In the tag of an event: the object is a Link, not a Connection. Objects have even addresses.
    LINK_TAG = 1
    TOKEN = 1_000  # thousandths
    # A session that goes on after as many refusals in a row is closed.
    REFUSALS_MAX = 100


cdef uint32_t ticks(double seconds) noexcept:
    return <uint32_t>(seconds * TICKS_PER_SECOND + 0.999)


cdef int fire(void* owner) except -1:
    cdef Connection connection = <Connection>owner
    try:
        connection.on_timer()
    except Exception:
        # The fault of one must not stop the clock of the others.
        connection.router.give_up(connection)
    return 0


cdef int deliver_record(void* owner, Link link, const Record* record, const char* payload) except -1:
    cdef Router router = <Router>owner
    try:
        router.deliver(link, record, payload)
    except Exception:
        # The fault of one message must not stop the stream behind it.
        router.handler.on_fault(None)
    return 0


cdef class Router:
    """The connections of one worker, its links to the others, timers, counters and write buffers.

    Args:
        handler: Gets what is not routed: `on_message(connection, data)`, `on_moving(target, origin, data)`,
            `on_stray(origin, epoch, data)`, `on_record(worker, kind, origin, epoch, data)`,
            `on_stream(worker, is_new)`, `on_news(kept, freed)`, `on_link_lost(worker, records)`,
            `on_refused_frame(connection, name, close_code)`, `on_slow_consumer(target, sender, data)`,
            `on_too_fast(connection, data, retry_after_ms, is_last)`, `on_timeout(connection, name)`,
            `on_fault(connection)`, `on_goodbye(connection)` when the client begins to close, and
            `on_closed(connection)` when the socket is being closed.
        table: The routes of the node.
        counters: Those of the node.
        ledger: Where messages are written down that slow agents have not taken.
        addresses: Where connections are counted by address.
        worker: The number of this worker.
        message_max: Bytes of a message that is routed.
        frame_max: Bytes of a frame that is read, so that its refusal can name the message in it.
        write_queue_max: Bytes that may wait at one connection.
        message_rate: Messages per second that one session may send; 0 for no limit.
        message_burst: How many of them at once.
        ping_interval: Seconds of silence before a WebSocket ping.
        pong_timeout: Seconds after it before the connection is dead.
        idle_timeout: Seconds without a message before a session is closed; 0 for never.
        close_timeout: Seconds between our CLOSE frame and the end of the connection; five times as many
            for one that does not read.
    """

    def __cinit__(self):
        self.epoll_fd = -1
        self.pool = <void**>malloc(POOL_MAX * sizeof(void*))
        self.input = <char*>malloc(INPUT_BYTES)
        if self.pool == NULL or self.input == NULL:
            raise MemoryError()

    def __init__(
        self,
        handler,
        *,
        RoutingTable table not None,
        Counters counters not None,
        Ledger ledger not None,
        Addresses addresses not None,
        int worker,
        Py_ssize_t message_max,
        Py_ssize_t frame_max,
        Py_ssize_t write_queue_max,
        uint32_t message_rate,
        uint32_t message_burst,
        double ping_interval,
        double pong_timeout,
        double idle_timeout,
        double close_timeout,
    ):
        self.handler = handler
        self.table = table
        self.ledger = ledger
        self.addresses = addresses
        self.counters_of = counters
        self.counted = counters.row(worker)
        self.worker = worker
        self.links = [None] * counters.workers
        self.open_links = []
        self.life = int.from_bytes(os.urandom(5), "little") or 1
        self.timers = TimerWheel()
        self.connections = []
        self.free_indices = []
        self.broken = []
        self.message_max = message_max
        self.frame_max = frame_max
        self.write_queue_max = write_queue_max
        self.message_rate = message_rate
        self.message_burst = message_burst
        self.ping_ticks = ticks(ping_interval)
        self.pong_ticks = ticks(pong_timeout)
        self.idle_ticks = ticks(idle_timeout) if idle_timeout > 0 else 0
        self.close_ticks = ticks(close_timeout)
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.epoll_fd >= 0:
            os.close(self.epoll_fd)
        for i in range(self.pool_size):
            free(self.pool[i])
        free(self.pool)
        free(self.input)
        for i in range(self.dirty_size):
            Py_DECREF(<object>self.dirty[i])
        free(self.dirty)

    def fileno(self):
        """Return the descriptor that is readable when `run_pass` has something to do."""
        return self.epoll_fd

    def advance(self, double seconds):
        """Let time pass up to `seconds` since the worker started: timers fire, batches are confirmed."""
        self.counted[HEARTBEATS] += 1
        self.timers.advance(<uint32_t>(seconds * TICKS_PER_SECOND), fire)
        self.end_pass(True)
        self.ledger.settle()
        if self.has_freed and self.timers.now - self.trimmed_at >= TRIM_TICKS:
            self.has_freed = False
            self.trimmed_at = self.timers.now
            aic_trim()  # or a burst of large messages would be kept for the next one
        self.counted[WAITING] = self.ledger.size

    @property
    def connection_count(self):
        """Connections that are open, registered or not."""
        return len(self.connections) - len(self.free_indices)

    @property
    def size(self):
        """How many places for connections there are, taken or free."""
        return len(self.connections)

    def open_connections(self, start=0, stop=None):
        """Return the connections that are open, of all places or of those from `start` to before `stop`."""
        return [connection for connection in self.connections[start:stop] if connection is not None]

    # --- one pass ------------------------------------------------------------------------------

    cdef int watch(self, int fd, int operation, uint32_t events, uint64_t tag) except -1:
        cdef epoll_event event
        event.events = events
        event.data.u64 = tag
        if epoll_ctl(self.epoll_fd, operation, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    def run_pass(self):
        """Read from every socket that has something, then write to every one that got something."""
        cdef epoll_event events[EVENTS_MAX]
        cdef int count = epoll_wait(self.epoll_fd, events, EVENTS_MAX, 0)
        cdef int i
        cdef uint64_t tag
        cdef uint32_t flags
        cdef Connection connection
        cdef Link link
        # Whatever ends in this pass is kept until its end, so every tag still names an object.
        for i in range(count):
            tag = events[i].data.u64
            flags = events[i].events
            if tag & LINK_TAG:
                link = <Link><void*>(tag - LINK_TAG)
                if link.is_open:
                    if flags & EPOLLOUT:
                        self.unblock(link)
                    if flags & (EPOLLIN | EPOLLHUP | EPOLLERR) and not link.read(
                        self.input, INPUT_BYTES, deliver_record, <void*>self
                    ):
                        self.lose(link)
                continue
            connection = <Connection><void*>tag
            if connection.is_broken:
                continue
            try:
                if flags & EPOLLOUT:
                    connection.on_writable()
                if flags & (EPOLLIN | EPOLLHUP | EPOLLERR):
                    connection.on_readable()
            except Exception:
                self.give_up(connection)
        self.end_pass(False)

    cdef int end_pass(self, bint confirm_now) except -1:
        cdef Connection connection
        cdef Link link
        cdef list broken
        cdef uint64_t unconfirmed
        while True:
            self.flush()
            broken = self.broken
            self.broken = []
            for connection in broken:
                try:
                    connection.end()
                except Exception:
                    self.handler.on_fault(connection)
            if self.dirty_size or self.broken:
                continue
            if self.ledger.has_news(confirm_now):
                self.tell_news(confirm_now)
                continue
            unconfirmed = 0
            for link in self.open_links:
                # Only now: a batch is dealt with when its messages have left this process.
                link.settle()
                if link.out_size or link.owes:
                    self.write_link(link, confirm_now)
                unconfirmed += link.unconfirmed()
            self.counted[UNCONFIRMED_BYTES] = unconfirmed
            if not self.dirty_size and not self.broken:
                return 0

    cdef int tell_news(self, bint with_freed) except -1:
        """Tell other nodes what of theirs waits here: before it is confirmed, for then they forget it.

        What does no longer is told with the next tick, all together: that is in no hurry.
        """
        try:
            self.handler.on_news(*self.ledger.take_news(with_freed))
        except Exception:
            self.handler.on_fault(None)
        return 0

    cdef int write_link(self, Link link, bint confirm_now) except -1:
        cdef bint was_blocked = link.is_blocked
        if not link.flush(confirm_now):
            # The other worker has died. What it said before is still to be read, up to the end, and that is
            # where the link is lost.
            link.is_blocked = True
        elif link.is_blocked and not was_blocked:
            self.watch(link.fd, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT, <uint64_t><void*>link + LINK_TAG)
        return 0

    cpdef int flush(self) except -1:
        """Write what was queued since: one system call per target."""
        cdef Connection connection
        while self.dirty_size > 0:
            self.dirty_size -= 1
            connection = <Connection>self.dirty[self.dirty_size]
            connection.is_dirty = False
            Py_DECREF(connection)
            try:
                connection.write_out()
            except Exception:
                # Not the fault of those who wrote to it.
                self.give_up(connection)
        return 0

    cdef int mark(self, Connection connection) except -1:
        cdef void** grown
        if connection.is_dirty:
            return 0
        if self.dirty_size == self.dirty_capacity:
            grown = <void**>realloc(self.dirty, (2 * self.dirty_capacity + 16) * sizeof(void*))
            if grown == NULL:
                raise MemoryError()
            self.dirty = grown
            self.dirty_capacity = 2 * self.dirty_capacity + 16
        Py_INCREF(connection)
        self.dirty[self.dirty_size] = <void*>connection
        self.dirty_size += 1
        connection.is_dirty = True
        return 0

    cdef int bury(self, Connection connection) except -1:
        """Let a connection end when this pass does."""
        if not connection.is_broken:
            connection.is_broken = True
            self.broken.append(connection)
        return 0

    cdef int give_up(self, Connection connection) except -1:
        """Let the handler close a connection whose code has raised: what it was reading is lost."""
        connection.is_deaf = True
        connection.held_size = connection.held_total = 0
        self.handler.on_fault(connection)
        return 0

    cdef char* acquire(self) except NULL:
        cdef char* data
        if self.pool_size > 0:
            self.pool_size -= 1
            return <char*>self.pool[self.pool_size]
        data = <char*>malloc(POOLED_BYTES)
        if data == NULL:
            raise MemoryError()
        return data

    cdef void release(self, char* data, uint32_t capacity) noexcept:
        if capacity == POOLED_BYTES and self.pool_size < POOL_MAX:
            self.pool[self.pool_size] = data
            self.pool_size += 1
        else:
            free(data)
            self.has_freed = True

    # --- other workers -------------------------------------------------------------------------

    def add_link(self, int worker, int fd):
        """Talk to another worker over a socket, which the router owns from now on."""
        cdef Link link = Link(worker, fd, ledger=self.ledger)
        cdef Link old = self.links[worker]
        if old is not None:
            # Its end is not read yet.
            while old.is_open and old.read(self.input, INPUT_BYTES, deliver_record, <void*>self):
                if old.is_silent:
                    break
            self.lose(old)
        self.links[worker] = link
        self.open_links.append(link)
        self.watch(fd, EPOLL_CTL_ADD, EPOLLIN, <uint64_t><void*>link + LINK_TAG)

    def linked_workers(self):
        """Return the numbers of the other workers that can be reached."""
        return [link.worker for link in self.open_links if link.is_open]

    def tell(self, int worker, int kind, int origin, uint64_t epoch, bytes data not None):
        """Send another worker a record for its handler; False if it cannot be reached or is behind."""
        cdef Link link = self.link_to(worker)
        return link is not None and link.append(
            LINK_MAX + LINK_RESERVE, kind, origin, 0, epoch, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)
        )

    def account(self, int worker, int kind, bytes data not None):
        """Tell a worker of another node what waits here of its messages, as `tell`; a whole ledger fits."""
        cdef Link link = self.link_to(worker)
        return link is not None and link.append(
            LINK_MAX + LINK_RESERVE + LINK_ACCOUNT, kind, self.worker, 0, 0,
            PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data),
        )

    def pass_on(self, int worker, int kind, int origin, uint64_t epoch, bytes data not None):
        """Send another worker a message that was confirmed to whoever sent it here, as `tell`.

        It stays in the ledger until it is confirmed.
        """
        cdef Link link = self.link_to(worker)
        cdef int number = self.ledger.write(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        if number == NO_ROOM:
            return False
        if not self.tell(worker, kind, origin, epoch, data):
            self.ledger.strike(number)
            return False
        link.answer_for(number)
        return True

    def forward(self, bytes did not None, bytes data not None):
        """Send a message that the handler has to the worker that has the route of `did`.

        Returns:
            None if no other worker has one; else whether that worker takes it.
        """
        cdef Route route
        cdef Link link
        if not self.table.find(PyBytes_AS_STRING(did) + DID_PREFIX_SIZE, &route):
            return None
        if route.worker == self.worker:
            return None
        link = self.link_to(route.worker)
        return link is not None and link.append(
            LINK_MAX + LINK_RESERVE,
            ROUTED,
            self.worker,
            route.connection,
            route.epoch,
            PyBytes_AS_STRING(data),
            PyBytes_GET_SIZE(data),
        )

    cdef int unblock(self, Link link) except -1:
        """The socket to another worker takes bytes again."""
        link.is_blocked = False
        self.watch(link.fd, EPOLL_CTL_MOD, EPOLLIN, <uint64_t><void*>link + LINK_TAG)
        self.write_link(link, False)
        return 0

    cdef int lose(self, Link link) except -1:
        """Another worker has gone: give back what it did not confirm."""
        if self.links[link.worker] is not link:
            return 0
        self.links[link.worker] = None
        self.open_links.remove(link)
        if link.fd >= 0:
            self.watch(link.fd, EPOLL_CTL_DEL, 0, 0)
        link.close()
        self.handler.on_link_lost(link.worker, link.take_unconfirmed())
        return 0

    # --- workers of other nodes ----------------------------------------------------------------

    def add_remote_link(self, int worker, uint16_t node, publish):
        """Talk to a worker of another node.

        Args:
            worker: Its number, see _mesh.pxd.
            node: The number of this node.
            publish: Called with `worker` and each piece of the stream to it.
        """
        cdef RemoteLink link = RemoteLink(
            worker,
            -1,
            ledger=self.ledger,
            node=node,
            source=self.worker,
            publish=publish,
            stream=self.next_stream(),
        )
        if worker < MAX_WORKERS:
            raise ValueError(f"{worker} is a worker of this node")
        self.links.extend([None] * (worker + 1 - len(self.links)))
        self.links[worker] = link
        self.open_links.append(link)
        self.handler.on_stream(worker, True)

    cdef uint64_t next_stream(self) noexcept:
        self.streams += 1
        return (self.life << STREAM_BITS) + self.streams

    def know(self, int worker, uint32_t source):
        """What comes from a worker of another node is from `source`, as far as the ledger is concerned."""
        (<RemoteLink>self.links[worker]).known_as = source

    def take(self, int worker, bytes piece not None):
        """Take what a worker of another node has published; False if our stream to it must begin anew."""
        cdef RemoteLink link = self.links[worker]
        cdef bint is_followed
        self.ledger.source = link.known_as
        try:
            is_followed = link.take(piece, deliver_record, <void*>self)
            self.end_pass(False)
        finally:
            self.ledger.source = 0
        return is_followed

    def begin_anew(self, int worker):
        """Begin another stream to a worker of another node; the handler gets what it did not confirm."""
        cdef RemoteLink link = self.links[worker]
        cdef list records = link.begin_anew(self.next_stream())
        self.handler.on_stream(worker, False)
        self.handler.on_link_lost(worker, records)

    def fall_silent(self, int worker):
        """Say no more to a worker of another node until `begin_anew`, but hear what it says."""
        (<RemoteLink>self.links[worker]).is_open = False

    def opposite(self, int worker):
        """Return the stream of a worker of another node that is heard; 0 if there was none."""
        return (<RemoteLink>self.links[worker]).opposite

    def progress(self, int worker):
        """Return how many bytes a worker of another node has confirmed, and how many wait for that."""
        return (<RemoteLink>self.links[worker]).progress

    def lose_remote_link(self, int worker):
        """Talk to a worker of another node no more."""
        self.lose(self.links[worker])

    def settle(self, bint confirm_now=False):
        """End a pass that did not begin here: what was queued is written.

        Args:
            confirm_now: Say, too, what would wait for the next tick.
        """
        self.end_pass(confirm_now)

    cdef Link link_to(self, uint16_t worker):
        """Return the link to another worker; None if there is none."""
        return self.links[worker] if worker < len(self.links) else None

    cdef int deliver(self, Link link, const Record* record, const char* payload) except -1:
        """Take one record from another worker."""
        cdef Connection target
        cdef uint16_t origin = link.local(record.origin)
        if record.kind != ROUTED:
            self.handler.on_record(
                link.worker, record.kind, origin, record.epoch,
                PyBytes_FromStringAndSize(payload, record.size),
            )
            return 0
        if record.connection < <uint32_t>PyList_GET_SIZE(self.connections):
            target = <object>PyList_GET_ITEM(self.connections, record.connection)
            if target is not None and target.epoch == record.epoch and target.state == REGISTERED:
                if target.is_moving:
                    self.handler.on_moving(target, origin, PyBytes_FromStringAndSize(payload, record.size))
                elif target.queue(TEXT, payload, record.size):
                    self.counted[MESSAGES_ROUTED] += 1
                    self.counted[BYTES_ROUTED] += record.size
                else:
                    self.handler.on_slow_consumer(
                        target, None, PyBytes_FromStringAndSize(payload, record.size)
                    )
                return 0
        self.handler.on_stray(origin, record.epoch, PyBytes_FromStringAndSize(payload, record.size))
        return 0


cdef class Connection:
    """One WebSocket, from the response to its upgrade on.

    Args:
        handshake: What its REGISTER must answer.
        address: Under which it is counted, see `Addresses.place`.
    """

    def __init__(self, Router router not None, handshake, uint32_t address=0):
        self.router = router
        self.handshake = handshake
        self.address = address
        self.timer.owner = <void*>self
        self.fd = -1
        self.state = UNREGISTERED

    def __dealloc__(self):
        # The timer is not armed: while it is, the router's list of connections holds a reference.
        free(self.out)
        free(self.held)
        if self.fd >= 0:
            os.close(self.fd)

    def open(self, int fd, bytes first not None):
        """Begin on a socket, which the connection owns from now on.

        Args:
            fd: It, not blocking.
            first: What is sent: the 101 response and the gateway's first frame.
        """
        cdef Router router = self.router
        self.fd = fd
        if router.free_indices:
            self.index = router.free_indices.pop()
            router.connections[self.index] = self
        else:
            self.index = <uint32_t>len(router.connections)
            router.connections.append(self)
        router.counted[CONNECTIONS] += 1
        router.addresses.add(router.worker, self.address, 1)
        self.last_heard = router.timers.now
        router.timers.arm(&self.timer, router.timers.now + ticks(self.handshake.timeout))
        router.watch(fd, EPOLL_CTL_ADD, EPOLLIN, <uint64_t><void*>self)
        # A new socket takes a few hundred bytes.
        if send(fd, PyBytes_AS_STRING(first), len(first), MSG_DONTWAIT | MSG_NOSIGNAL) != len(first):
            router.bury(self)

    def refuse_early_frame(self):
        """Close a connection of which somebody else has read: where the next frame begins is unknown."""
        if not self.is_deaf:
            self.is_deaf = True
            self.router.handler.on_refused_frame(self, "early_frame", 1002)

    # --- for the handler -----------------------------------------------------------------------

    @property
    def peer(self):
        """Address and port of the other side, for logs; None once the connection has ended."""
        if self.fd < 0:
            return None
        return peer_of(self.fd)

    @property
    def queued_bytes(self):
        """Bytes that wait to be written."""
        return self.out_size - self.head_written

    def register(self, session, bytes did not None, uint64_t epoch):
        """Let the connection send and receive as `did`; bind the route separately."""
        if PyBytes_GET_SIZE(did) != DID_SIZE:
            raise ValueError(f"a DID has {DID_SIZE} characters, not {len(did)}")
        memcpy(self.did, PyBytes_AS_STRING(did), DID_SIZE)
        self.session = session
        self.epoch = epoch
        self.handshake = None
        self.state = REGISTERED
        self.tokens = self.router.message_burst * TOKEN
        self.tokens_at = self.last_message = self.router.timers.now
        self.router.timers.arm(&self.timer, self.router.timers.now + self.next_check())

    def forget_session(self):
        """Take the session away from the connection, which is being closed."""
        self.session = None

    def send(self, bytes data not None):
        """Queue one text message; tell whether it fits. It leaves when the current pass ends."""
        if self.state >= CLOSING:
            return False
        return bool(self.queue(TEXT, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)))

    @property
    def is_open(self):
        """Whether messages can still be sent."""
        return self.state < CLOSING

    def close(self, int code, bytes reason=b""):
        """Send what waits and a CLOSE frame; the connection ends when it is answered or after a timeout."""
        cdef uint32_t patience
        cdef char header[HEADER_MAX]
        cdef uint32_t header_size
        if self.state >= CLOSING:
            return
        self.write_out()
        self.state = CLOSING
        self.close_code = <uint16_t>code
        self.fragments = None
        header_size = write_header(header, CLOSE, 2 + len(reason))
        self.goodbye = PyBytes_FromStringAndSize(header, header_size) + code.to_bytes(2, "big") + reason
        # To one that does not read, the CLOSE frame stands behind megabytes in both kernels.
        patience = BLOCKED_PATIENCE if self.is_blocked else 1
        self.router.timers.arm(&self.timer, self.router.timers.now + patience * self.router.close_ticks)
        self.write_out()

    def abort(self):
        """End the connection without a word."""
        self.router.bury(self)

    def take_undelivered(self):
        """Return the messages that the socket has not taken whole, oldest first, and forget them.

        A message that is written in part may still get through. It stays until that is known: it is
        dropped when it is out, and returned by a call after the connection has ended.
        """
        cdef list messages = []
        cdef uint32_t header, size, kept = 0, position
        if self.head_written and self.state != CLOSED:
            kept = frame_size(self.out, &header)
        position = kept
        while position < self.out_size:
            size = frame_size(self.out + position, &header)
            if self.recorded is not None:
                self.router.ledger.strike(self.recorded.pop())
            if self.out[position] == <char>(0x80 | TEXT):
                messages.append(PyBytes_FromStringAndSize(self.out + position + header, size - header))
            position += size
        self.out_size = kept
        if kept == 0:
            self.head_written = 0
            self.release_queue()
        return messages

    # --- receiving -----------------------------------------------------------------------------

    cdef int on_readable(self) except -1:
        """Read once, and take every frame that is there.

        A connection owns memory for reading only while it has sent part of a frame. A short part is copied
        back before the next read; the rest of a long frame is read behind its beginning, or a client that
        sends byte by byte would have it copied every time.
        """
        cdef Router router = self.router
        cdef ssize_t received
        cdef Py_ssize_t used, size
        cdef char* data = router.input
        cdef size_t room = INPUT_BYTES
        if self.held_size >= HELD_COPY_MAX:
            if self.held_size == self.held_capacity:
                self.hold(NULL, min(<Py_ssize_t>self.held_total, 2 * <Py_ssize_t>self.held_size))
            data = self.held
            room = self.held_capacity
        elif self.held_size:
            memcpy(data, self.held, self.held_size)
        received = recv(self.fd, data + self.held_size, room - self.held_size, MSG_DONTWAIT)
        if received <= 0:
            if received == 0 or (errno != EAGAIN and errno != EINTR):
                router.bury(self)
            return 0
        self.last_heard = router.timers.now
        if self.is_deaf:
            return 0
        size = self.held_size + received
        if data == self.held:
            self.held_size = <uint32_t>size
            if size < <Py_ssize_t>self.held_total:
                return 0
            self.read_frames(data, size)
            self.held_size = self.held_total = 0
        else:
            used = self.read_frames(data, size)
            self.held_size = 0
            if used < size and not self.is_deaf:
                self.hold(data + used, size - used)
                return 0
        if self.held != NULL:
            free(self.held)
            router.has_freed = router.has_freed or self.held_capacity >= HELD_COPY_MAX
            self.held = NULL
            self.held_capacity = 0
        return 0

    cdef int hold(self, const char* data, Py_ssize_t size) except -1:
        """Keep the beginning of a frame; with no `data`, make room for `size` bytes of it."""
        cdef char* grown
        if size > self.held_capacity:
            grown = <char*>realloc(self.held, size)
            if grown == NULL:
                raise MemoryError()
            self.held = grown
            self.held_capacity = <uint32_t>size
        if data != NULL:
            memcpy(self.held, data, size)
            self.held_size = <uint32_t>size
        return 0

    cdef Py_ssize_t read_frames(self, char* data, Py_ssize_t size) except -1:
        """Take the whole frames at the start of `data`; return their size."""
        cdef Py_ssize_t position = 0
        cdef Frame frame
        cdef int status
        while not self.is_deaf and position < size:
            status = read_frame(data + position, size - position, self.router.frame_max, &frame)
            if status == FRAME_WHOLE:
                position += frame.total
                if frame.opcode == TEXT and frame.fin and not frame.rsv and self.fragments is None:
                    self.receive(frame.payload, frame.size)
                else:
                    self.receive_rare(frame.opcode, frame.fin, frame.rsv, frame.payload, frame.size)
            elif status == FRAME_PARTIAL:
                self.held_total = <uint32_t>frame.total
                break
            else:
                self.is_deaf = True
                if self.state < CLOSING:
                    if status == FRAME_TOO_LARGE:
                        self.router.handler.on_refused_frame(self, "too_large", 1009)
                    else:
                        self.router.handler.on_refused_frame(self, "frame", 1002)
        return position

    cdef bint allow(self) noexcept:
        """Take one token of the session's bucket, which fills with time."""
        cdef Router router = self.router
        cdef uint64_t tokens
        if router.message_rate == 0:
            return True
        if router.timers.now != self.tokens_at:
            tokens = self.tokens + <uint64_t>(router.timers.now - self.tokens_at) * (
                <uint64_t>router.message_rate * TOKEN // TICKS_PER_SECOND
            )
            self.tokens = <uint32_t>min(tokens, <uint64_t>router.message_burst * TOKEN)
            self.tokens_at = router.timers.now
        if self.tokens < TOKEN:
            return False
        self.tokens -= TOKEN
        if self.tokens >= router.message_burst * TOKEN // 2:
            self.refused_in_row = 0  # it has slowed down
        return True

    cdef int receive(self, const char* data, Py_ssize_t size) except -1:
        """Route one message, or hand it to the handler."""
        cdef Router router = self.router
        cdef Envelope envelope
        cdef Route route
        cdef Connection target
        cdef Link link
        if self.state >= CLOSING:
            return 0
        router.counted[MESSAGES_RECEIVED] += 1
        if self.state == REGISTERED:
            self.last_message = router.timers.now
            if not self.allow():
                self.refused_in_row += 1
                router.handler.on_too_fast(
                    self,
                    PyBytes_FromStringAndSize(data, size),
                    1000 // TICKS_PER_SECOND + 1000 // router.message_rate,
                    self.refused_in_row >= REFUSALS_MAX,
                )
                return 0
            if (
                size <= router.message_max
                and not self.is_waiting
                and scan_envelope(data, size, &envelope) == OK
                and (ROUTED_TYPES >> envelope.type) & 1
                and memcmp(envelope.from_.data, self.did, DID_SIZE) == 0
                and router.table.find(envelope.to.data + DID_PREFIX_SIZE, &route)
            ):
                if route.worker != router.worker:
                    link = None
                    if route.worker < PyList_GET_SIZE(router.links):
                        link = <Link>PyList_GET_ITEM(router.links, route.worker)
                    if link is not None and link.append(
                        LINK_MAX, ROUTED, router.worker, route.connection, route.epoch, data, size
                    ):
                        router.counted[MESSAGES_CROSSED] += 1
                        return 0
                elif route.connection < <uint32_t>PyList_GET_SIZE(router.connections):  # it is not AWAY
                    target = <object>PyList_GET_ITEM(router.connections, route.connection)
                    # Another worker may have taken the session over just now.
                    if (
                        target is not None
                        and target.epoch == route.epoch
                        and target.state == REGISTERED
                        and not target.is_moving
                    ):
                        if target.queue(TEXT, data, size):
                            router.counted[MESSAGES_ROUTED] += 1
                            router.counted[BYTES_ROUTED] += size
                        else:
                            router.handler.on_slow_consumer(
                                target, self, PyBytes_FromStringAndSize(data, size)
                            )
                        return 0
        router.handler.on_message(self, PyBytes_FromStringAndSize(data, size))
        return 0

    cdef int receive_rare(
        self, uint8_t opcode, bint fin, uint8_t rsv, const char* data, Py_ssize_t size
    ) except -1:
        """Take every frame that is not a whole text message (RFC 6455 sections 5.4 and 5.5)."""
        cdef object handler = self.router.handler
        cdef bytes message
        if self.state == CLOSED or (self.state == CLOSING and opcode != CLOSE):
            return 0
        if rsv:  # no extension is ever negotiated
            handler.on_refused_frame(self, "reserved_bits", 1002)
        elif opcode == CLOSE:
            self.receive_close(data, size)
        elif opcode == PING:
            # A client that does not read gets its answer when it does, and to the latest ping only
            # (section 5.5.3).
            if self.is_blocked:
                self.unanswered_ping = PyBytes_FromStringAndSize(data, size)
            else:
                self.queue(PONG, data, size)
        elif opcode == PONG:
            pass
        elif opcode == CONTINUATION:
            if self.fragments is None:
                handler.on_refused_frame(self, "unexpected_continuation", 1002)
                return 0
            self.fragments += data[:size]
            self.fragment_count += 1
            if self.fragment_count > FRAGMENTS_MAX:
                handler.on_refused_frame(self, "too_many_fragments", 1009)
            elif len(self.fragments) > self.router.message_max:
                message = bytes(self.fragments)
                self.fragments = None
                handler.on_message(self, message)
            elif fin:
                message = bytes(self.fragments)
                self.fragments = None
                self.receive(PyBytes_AS_STRING(message), PyBytes_GET_SIZE(message))
        elif self.fragments is not None:
            handler.on_refused_frame(self, "interrupted_fragments", 1002)
        elif opcode == BINARY:
            handler.on_refused_frame(self, "binary_frame", 1003)
        elif size > self.router.message_max:
            handler.on_message(self, PyBytes_FromStringAndSize(data, size))
        else:  # the first fragment of a text message
            self.fragments = bytearray(data[:size])
            self.fragment_count = 1
        return 0

    cdef int receive_close(self, const char* data, Py_ssize_t size) except -1:
        """Answer a CLOSE frame, or take it as the answer to ours (RFC 6455 section 5.5.1)."""
        cdef int code = 1000
        self.is_deaf = True  # nothing may follow it
        self.is_ending = True
        if size >= 2:
            code = (<uint8_t>data[0] << 8) | <uint8_t>data[1]
        # Section 7.4: these never travel, or belong to nobody. The reason is UTF-8 (section 5.5.1).
        if self.state != CLOSING and (
            size == 1 or code < 1000 or code > 4999 or 1004 <= code <= 1006 or 1015 <= code <= 2999
        ):
            self.router.handler.on_refused_frame(self, "close_code", 1002)
        elif self.state != CLOSING and size > 2 and not is_utf8(data + 2, size - 2):
            self.router.handler.on_refused_frame(self, "close_reason", 1007)
        elif self.state != CLOSING:
            self.received_code = <uint16_t>code if size else 1005
            self.close(code)
            self.close_code = 0
            self.router.handler.on_goodbye(self)
        self.write_out()
        return 0

    # --- sending -------------------------------------------------------------------------------

    cdef bint queue(self, uint8_t opcode, const char* payload, Py_ssize_t size) except -1:
        cdef uint32_t capacity, header
        cdef char* grown
        if self.out_size + size + HEADER_MAX > self.router.write_queue_max:
            return False
        if self.out == NULL:
            self.out = self.router.acquire()
            self.out_capacity = POOLED_BYTES
        if self.out_size + size + HEADER_MAX > self.out_capacity:
            capacity = self.out_capacity
            while self.out_size + size + HEADER_MAX > capacity:
                capacity *= 2
            grown = <char*>realloc(self.out, capacity)
            if grown == NULL:
                raise MemoryError()
            self.out = grown
            self.out_capacity = capacity
        header = write_header(self.out + self.out_size, <Opcode>opcode, size)
        memcpy(self.out + self.out_size + header, payload, size)
        if self.recorded is not None and self.record(self.out + self.out_size) == NO_ROOM:
            self.recorded.pop()
            return False
        self.out_size += header + <uint32_t>size
        self.router.mark(self)
        return True

    cdef int write_out(self) except -1:
        """Write the queue to the socket. What it does not take stays, to follow the agent to its next
        connection if this one ends; but a frame that was begun is finished before a CLOSE."""
        cdef ssize_t sent
        cdef uint32_t limit, position, size, header
        while not self.is_blocked and not self.is_broken:
            if self.state >= CLOSING:
                if self.head_written == 0:
                    self.write_goodbye()
                    return 0
                limit = frame_size(self.out, &header)
            else:
                limit = self.out_size
            if limit == 0:
                return 0
            sent = send(
                self.fd, self.out + self.head_written, limit - self.head_written, MSG_DONTWAIT | MSG_NOSIGNAL
            )
            if sent < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN and errno != ENOBUFS:
                    self.router.bury(self)  # end() follows and saves the queue
                    return 0
                sent = 0
            sent += self.head_written
            self.head_written = 0
            if sent == limit:
                self.drop_head(limit)
                continue
            position = 0
            while True:
                size = frame_size(self.out + position, &header)
                if position + size > <uint32_t>sent:
                    break
                position += size
            self.head_written = <uint32_t>sent - position
            self.drop_head(position)
            self.block()
        return 0

    cdef int write_goodbye(self) except -1:
        cdef ssize_t sent
        if self.goodbye is not None:
            sent = send(
                self.fd, PyBytes_AS_STRING(self.goodbye), len(self.goodbye), MSG_DONTWAIT | MSG_NOSIGNAL
            )
            if sent == len(self.goodbye):
                self.goodbye = None
            elif sent < 0 and errno != EAGAIN and errno != EINTR and errno != ENOBUFS:
                self.router.bury(self)
                return 0
            else:
                self.goodbye = self.goodbye[max(sent, 0):]
                self.block()
                return 0
        if self.is_ending:
            self.router.bury(self)
        elif self.is_deaf:
            # The client broke the framing: no CLOSE of its can be found. It learns that all is said; closing
            # while it still sends would reset the connection, and maybe take the CLOSE frame with it.
            shutdown(self.fd, SHUT_WR)
        return 0

    cdef int block(self) except -1:
        cdef uint32_t position = 0, header
        self.is_blocked = True
        if self.recorded is None:
            # What came for it from other workers is confirmed now: if this one dies, they tell the senders.
            self.recorded = deque()
            while position < self.out_size:
                self.record(self.out + position)
                position += frame_size(self.out + position, &header)
        self.router.watch(self.fd, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT, <uint64_t><void*>self)
        return 0

    cdef int on_writable(self) except -1:
        cdef bytes ping = self.unanswered_ping
        if not self.is_blocked:
            return 0
        self.is_blocked = False
        self.router.watch(self.fd, EPOLL_CTL_MOD, EPOLLIN, <uint64_t><void*>self)
        if ping is not None:
            self.unanswered_ping = None
            if self.state < CLOSING:
                self.queue(PONG, PyBytes_AS_STRING(ping), PyBytes_GET_SIZE(ping))
        self.write_out()
        return 0

    cdef int record(self, const char* frame) except -3:
        cdef uint32_t header, size = frame_size(frame, &header)
        cdef int number = NO_RECORD
        if frame[0] == <char>(0x80 | TEXT):
            number = self.router.ledger.write(frame + header, size - header)
        self.recorded.append(number)
        return number

    cdef int drop_head(self, uint32_t size) except -1:
        """Forget the first `size` bytes of the queue."""
        cdef uint32_t position = 0, header
        if size == 0:
            return 0
        while self.recorded is not None and position < size:
            self.router.ledger.strike(self.recorded.popleft())
            position += frame_size(self.out + position, &header)
        self.out_size -= size
        if self.out_size:
            memmove(self.out, self.out + size, self.out_size)
        else:
            self.release_queue()
            self.recorded = None
        return 0

    cdef void release_queue(self) noexcept:
        if self.out != NULL:
            self.router.release(self.out, self.out_capacity)
            self.out = NULL
            self.out_capacity = 0

    cdef int end(self) except -1:
        """Close the socket and let the handler clean up."""
        cdef Router router = self.router
        if self.state == CLOSED:
            return 0
        self.state = CLOSED
        router.timers.cancel(&self.timer)
        try:
            router.watch(self.fd, EPOLL_CTL_DEL, 0, 0)
            router.handler.on_closed(self)
        finally:
            # Whatever went wrong: the index and the socket are given back. A route that still names the index
            # has another epoch than the next connection there.
            os.close(self.fd)
            self.fd = -1
            router.connections[self.index] = None
            router.free_indices.append(self.index)
            router.counted[CONNECTIONS] -= 1
            router.addresses.add(router.worker, self.address, -1)
            self.session = self.handshake = self.fragments = self.recorded = None
        return 0

    # --- time ----------------------------------------------------------------------------------

    cdef uint32_t next_check(self) noexcept:
        """Ticks until a registered connection must be looked at again."""
        cdef uint32_t idle = self.router.idle_ticks
        return min(self.router.ping_ticks, idle) if idle else self.router.ping_ticks

    cdef int on_timer(self) except -1:
        cdef Router router = self.router
        cdef uint32_t now = router.timers.now
        cdef uint32_t due
        if self.state == CLOSING:
            router.bury(self)
            return 0
        if self.state == UNREGISTERED:
            router.handler.on_timeout(self, "register_timeout")
        elif router.idle_ticks and now - self.last_message >= router.idle_ticks:
            router.handler.on_timeout(self, "idle")
        elif (
            self.is_pinged
            and self.last_heard < self.pinged_at
            and now >= self.pinged_at + router.pong_ticks
        ):
            router.handler.on_timeout(self, "no_pong")
        else:
            if not self.is_pinged or self.last_heard >= self.pinged_at:
                self.is_pinged = False
                due = self.last_heard + router.ping_ticks
                if due <= now:
                    router.counted[PINGS_SENT] += 1
                    self.is_pinged = True
                    self.pinged_at = now
                    self.queue(PING, NULL, 0)
            if self.is_pinged:
                due = self.pinged_at + router.pong_ticks
            if router.idle_ticks:
                due = min(due, self.last_message + router.idle_ticks)
            router.timers.arm(&self.timer, due)
        return 0


cdef extern from "<arpa/inet.h>" nogil:
    enum:
        AF_INET, AF_INET6, INET6_ADDRSTRLEN
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        uint16_t sin6_port
        in6_addr sin6_addr
    struct sockaddr:
        unsigned short sa_family
    struct sockaddr_storage:
        pass
    ctypedef unsigned int socklen_t
    int getpeername(int fd, sockaddr* address, socklen_t* size)
    const char* inet_ntop(int family, const void* address, char* text, socklen_t size)
    uint16_t ntohs(uint16_t value)


cdef str peer_of(int fd):
    """Return address and port of the other side of a socket; None if it has none any more."""
    cdef sockaddr_storage storage
    cdef socklen_t size = sizeof(storage)
    cdef sockaddr* address = <sockaddr*>&storage
    cdef char text[INET6_ADDRSTRLEN]
    if getpeername(fd, address, &size) != 0:
        return None
    if address.sa_family == AF_INET6:
        inet_ntop(AF_INET6, &(<sockaddr_in6*>address).sin6_addr, text, INET6_ADDRSTRLEN)
        return f"[{text.decode()}]:{ntohs((<sockaddr_in6*>address).sin6_port)}"
    inet_ntop(AF_INET, &(<sockaddr_in*>address).sin_addr, text, INET6_ADDRSTRLEN)
    return f"{text.decode()}:{ntohs((<sockaddr_in*>address).sin_port)}"
