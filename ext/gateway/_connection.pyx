"""The connections of one worker; see _connection.pxd for the design."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove

from gateway._frames cimport ANSWER, ERROR, ICE_CANDIDATE, OFFER, OK, Envelope, scan_envelope
from gateway._routing cimport AWAY, DID_PREFIX_SIZE, DID_SIZE, Route, RoutingTable
from gateway._timers cimport TICKS_PER_SECOND, TimerWheel
from picows.picows cimport WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int socket, const void* data, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef enum:
    POOLED_BYTES = 4096  # six messages of the usual size; longer queues grow by realloc
    POOL_MAX = 4096      # buffers kept: 16 MiB
    FRAGMENTS_MAX = 4096  # of one message; without an end a connection would cost for nothing
    BLOCKED_PATIENCE = 5  # times close_timeout

# What one agent may send to another through the gateway.
cdef uint32_t ROUTED = (1 << OFFER) | (1 << ANSWER) | (1 << ICE_CANDIDATE) | (1 << ERROR)


cdef uint32_t ticks(double seconds) noexcept:
    return <uint32_t>(seconds * TICKS_PER_SECOND + 0.999)


cdef uint32_t write_header(char* out, Py_ssize_t size) noexcept nogil:
    """Write the header of an unfragmented, unmasked text frame (RFC 6455 section 5.2); return its size."""
    out[0] = <char>0x81
    if size < 126:
        out[1] = <char>size
        return 2
    if size < 65536:
        out[1] = 126
        out[2] = <char>(size >> 8)
        out[3] = <char>(size & 0xFF)
        return 4
    out[1] = 127
    cdef int i
    for i in range(8):
        out[2 + i] = <char>((<uint64_t>size >> (56 - 8 * i)) & 0xFF)
    return 10


cdef uint32_t frame_size(const char* frame, uint32_t* header) noexcept nogil:
    """Return the size of a frame that `write_header` began, and that of its header."""
    cdef const uint8_t* byte = <const uint8_t*>frame
    cdef uint64_t size = byte[1]
    cdef int i
    header[0] = 2
    if size == 126:
        size = (<uint64_t>byte[2] << 8) | byte[3]
        header[0] = 4
    elif size == 127:
        size = 0
        for i in range(8):
            size = (size << 8) | byte[2 + i]
        header[0] = 10
    return <uint32_t>size + header[0]


cdef int fire(void* owner) except -1:
    cdef Connection connection = <Connection>owner
    try:
        connection.on_timer()
    except Exception:
        # The fault of one must not stop the clock of the others.
        connection.router.handler.on_fault(connection)
    return 0


cdef class Router:
    """The connections of one worker, their routing table, timers, counters and write buffers.

    Args:
        handler: Gets what is not routed: `on_message(connection, data)`, `on_refused_frame(connection,
            name, close_code)`, `on_slow_consumer(target, sender, data)`, `on_timeout(connection, name)`,
            `on_fault(connection)` and `on_closed(connection)`.
        message_max: Bytes of a message that is routed.
        write_queue_max: Bytes that may wait at one connection.
        ping_interval: Seconds of silence before a WebSocket ping.
        pong_timeout: Seconds after it before the connection is dead.
        idle_timeout: Seconds without a message before a session is closed; 0 for never.
        close_timeout: Seconds between our CLOSE frame and the end of the connection; five times as many
            for one that does not read.
    """

    def __cinit__(self):
        self.pool = <void**>malloc(POOL_MAX * sizeof(void*))
        if self.pool == NULL:
            raise MemoryError()

    def __init__(
        self,
        handler,
        *,
        Py_ssize_t message_max,
        Py_ssize_t write_queue_max,
        double ping_interval,
        double pong_timeout,
        double idle_timeout,
        double close_timeout,
    ):
        self.handler = handler
        self.table = RoutingTable()
        self.timers = TimerWheel()
        self.connections = []
        self.free_indices = []
        self.message_max = message_max
        self.write_queue_max = write_queue_max
        self.ping_ticks = ticks(ping_interval)
        self.pong_ticks = ticks(pong_timeout)
        self.idle_ticks = ticks(idle_timeout) if idle_timeout > 0 else 0
        self.close_ticks = ticks(close_timeout)

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.pool_size):
            free(self.pool[i])
        free(self.pool)
        for i in range(self.dirty_size):
            Py_DECREF(<object>self.dirty[i])
        free(self.dirty)

    def advance(self, double seconds):
        """Let time pass up to `seconds` since the worker started: timers fire."""
        self.timers.advance(<uint32_t>(seconds * TICKS_PER_SECOND), fire)

    @property
    def counters(self):
        """Counts since the worker started."""
        return {
            "messages_received": self.counted.messages_received,
            "messages_routed": self.counted.messages_routed,
            "bytes_routed": self.counted.bytes_routed,
            "pings_sent": self.counted.pings_sent,
        }

    @property
    def connection_count(self):
        """Connections that are open, registered or not."""
        return len(self.connections) - len(self.free_indices)

    def open_connections(self):
        """Return the connections that are open."""
        return [connection for connection in self.connections if connection is not None]

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

    cpdef int flush(self) except -1:
        """Write what the read that ends now has queued: one system call per target."""
        cdef Connection connection
        while self.dirty_size > 0:
            self.dirty_size -= 1
            connection = <Connection>self.dirty[self.dirty_size]
            connection.is_dirty = False
            Py_DECREF(connection)
            try:
                connection.write_out()
            except Exception:
                # Not the fault of the sender, whose read this is.
                self.handler.on_fault(connection)
        return 0


cdef class Connection(WSListener):
    """One WebSocket. picows calls `on_ws_*`; the handler calls the rest."""

    def __init__(self, Router router not None, handshake):
        self.router = router
        self.handshake = handshake
        self.timer.owner = <void*>self
        self.socket = -1
        self.state = UNREGISTERED

    def __dealloc__(self):
        # The timer is not armed: while it is, the router's list of connections holds a reference.
        free(self.out)

    # --- for the handler -----------------------------------------------------------------------

    @property
    def peer(self):
        """Address and port of the other side, for logs."""
        if self.transport is None:
            return None
        address = self.transport.underlying_transport.get_extra_info("peername")
        return f"{address[0]}:{address[1]}" if address else None

    @property
    def close_handshake(self):
        """What picows knows of the CLOSE frames of both sides."""
        return self.transport.close_handshake

    @property
    def silent_seconds(self):
        """Seconds since anything was heard."""
        return (self.router.timers.now - self.last_heard) / <double>TICKS_PER_SECOND

    @property
    def queued_bytes(self):
        """Bytes that wait to be written."""
        return self.out_size

    def register(self, session, bytes did not None):
        """Let the connection send and receive as `did`; bind the route separately."""
        if PyBytes_GET_SIZE(did) != DID_SIZE:
            raise ValueError(f"a DID has {DID_SIZE} characters, not {len(did)}")
        memcpy(self.did, PyBytes_AS_STRING(did), DID_SIZE)
        self.session = session
        self.handshake = None
        self.state = REGISTERED
        self.last_message = self.router.timers.now
        self.router.timers.arm(&self.timer, self.router.timers.now + self.next_check())

    def forget_session(self):
        """Take the session away from the connection, which is being closed."""
        self.session = None

    def send(self, bytes data not None):
        """Queue one text message; tell whether it fits. It leaves when the current read ends."""
        if self.state >= CLOSING:
            return False
        return bool(self.queue(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)))

    @property
    def is_open(self):
        """Whether messages can still be sent."""
        return self.state < CLOSING

    def close(self, int code, bytes reason=b""):
        """Send what waits and a CLOSE frame; the connection ends when it is answered or after a timeout."""
        cdef uint32_t patience
        if self.state >= CLOSING or self.transport is None:
            return
        self.write_out()
        if self.state >= CLOSING:  # writing found the connection broken
            return
        self.state = CLOSING
        self.close_code = <uint16_t>code
        self.fragments = None
        # To one that does not read, the CLOSE frame stands behind megabytes in both kernels.
        patience = BLOCKED_PATIENCE if self.is_blocked else 1
        self.transport.send_close(<WSCloseCode>code, reason)
        self.router.timers.arm(&self.timer, self.router.timers.now + patience * self.router.close_ticks)

    def abort(self):
        """End the connection without a word."""
        if self.transport is not None and not self.transport.is_disconnected:
            self.transport.underlying_transport.abort()

    def take_undelivered(self):
        """Return the messages that the socket has not taken whole, oldest first, and forget them.

        A frame whose rest uvloop is writing may still get through. It stays until that is known: it is
        dropped when it is out, and returned by a call after the connection has ended.
        """
        cdef list messages = []
        cdef uint32_t kept = self.in_flight if self.state != CLOSED else 0
        cdef uint32_t position = kept
        cdef uint32_t header, size
        while position < self.out_size:
            size = frame_size(self.out + position, &header)
            messages.append(PyBytes_FromStringAndSize(self.out + position + header, size - header))
            position += size
        self.out_size = self.in_flight = kept
        if kept == 0:
            self.release_queue()
        return messages

    # --- picows --------------------------------------------------------------------------------

    cpdef on_ws_connected(self, WSTransport transport):
        cdef Router router = self.router
        # First of all: whatever fails below, on_ws_disconnected gives this index back.
        if router.free_indices:
            self.index = router.free_indices.pop()
            router.connections[self.index] = self
        else:
            self.index = <uint32_t>len(router.connections)
            router.connections.append(self)
        self.transport = transport
        self.socket = transport._socket
        # 2 KiB of parsed headers that nobody asks for again.
        transport.request = None
        transport.response = None
        # From now on uvloop reports every byte that it could not write at once, and when it is out.
        transport.underlying_transport.set_write_buffer_limits(high=0)
        self.last_heard = router.timers.now
        router.timers.arm(&self.timer, router.timers.now + ticks(self.handshake.timeout))

    cpdef on_ws_frame(self, WSTransport transport, WSFrame frame):
        self.last_heard = self.router.timers.now
        if (
            frame.msg_type == WSMsgType.TEXT
            and frame.fin
            and self.fragments is None
            and not (frame.rsv1 | frame.rsv2 | frame.rsv3)
        ):
            self.receive(frame.payload_ptr, frame.payload_size)
        else:
            self.receive_rare(frame)
        if frame.last_in_buffer:
            self.router.flush()

    cpdef on_ws_disconnected(self, WSTransport transport):
        cdef Router router = self.router
        cdef Route* route
        self.state = CLOSED
        router.timers.cancel(&self.timer)
        router.connections[self.index] = None
        router.free_indices.append(self.index)
        try:
            router.handler.on_closed(self)
            router.flush()
        finally:
            # Whatever went wrong: the next connection with this index must not get this agent's messages.
            route = router.table.find(self.did + DID_PREFIX_SIZE)
            if route != NULL and route.connection == self.index:
                router.table.unbind(self.did + DID_PREFIX_SIZE, route.epoch)
            self.session = self.handshake = self.fragments = self.transport = None

    cpdef pause_writing(self):
        self.is_blocked = True

    cpdef resume_writing(self):
        self.is_blocked = False
        if self.state == CLOSED:
            return
        self.drop_head(self.in_flight)
        if self.unanswered_ping is not None and self.state < CLOSING:
            self.transport.send_pong(self.unanswered_ping)
        self.unanswered_ping = None
        self.write_out()

    # --- receiving -----------------------------------------------------------------------------

    cdef int receive(self, const char* data, Py_ssize_t size) except -1:
        """Route one message, or hand it to the handler."""
        cdef Router router = self.router
        cdef Envelope envelope
        cdef Route* route
        cdef Connection target
        if self.state >= CLOSING:
            return 0
        router.counted.messages_received += 1
        if self.state == REGISTERED:
            self.last_message = router.timers.now
            if (
                size <= router.message_max
                and scan_envelope(data, size, &envelope) == OK
                and (ROUTED >> envelope.type) & 1
                and memcmp(envelope.from_.data, self.did, DID_SIZE) == 0
            ):
                route = router.table.find(envelope.to.data + DID_PREFIX_SIZE)
                if route != NULL and route.connection != AWAY:
                    target = <Connection>PyList_GET_ITEM(router.connections, route.connection)
                    if target is None:
                        raise RuntimeError("a route outlived its connection")
                    if target.queue(data, size):
                        router.counted.messages_routed += 1
                        router.counted.bytes_routed += size
                    else:
                        router.handler.on_slow_consumer(
                            target, self, PyBytes_FromStringAndSize(data, size)
                        )
                    return 0
        router.handler.on_message(self, PyBytes_FromStringAndSize(data, size))
        return 0

    cdef int receive_rare(self, WSFrame frame) except -1:
        """Take every frame that is not a whole text message (RFC 6455 sections 5.4 and 5.5)."""
        cdef object handler = self.router.handler
        cdef bytes data
        if self.state == CLOSED or (self.state == CLOSING and frame.msg_type != WSMsgType.CLOSE):
            return 0
        if frame.rsv1 | frame.rsv2 | frame.rsv3:  # no extension is ever negotiated
            handler.on_refused_frame(self, "reserved_bits", 1002)
        elif frame.msg_type == WSMsgType.CLOSE:
            self.receive_close(frame)
        elif frame.msg_type == WSMsgType.PING:
            # A client that does not read gets its answer when it does, and to the latest ping only
            # (section 5.5.3).
            if self.is_blocked:
                self.unanswered_ping = frame.get_payload_as_bytes()
            else:
                self.transport.send_pong(frame.get_payload_as_bytes())
        elif frame.msg_type == WSMsgType.PONG:
            pass
        elif frame.msg_type == WSMsgType.CONTINUATION:
            if self.fragments is None:
                handler.on_refused_frame(self, "unexpected_continuation", 1002)
                return 0
            self.fragments += frame.get_payload_as_bytes()
            self.fragment_count += 1
            if self.fragment_count > FRAGMENTS_MAX:
                handler.on_refused_frame(self, "too_many_fragments", 1009)
            elif len(self.fragments) > self.router.message_max:
                data = bytes(self.fragments)
                self.fragments = None
                handler.on_message(self, data)
            elif frame.fin:
                data = bytes(self.fragments)
                self.fragments = None
                self.receive(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        elif self.fragments is not None:
            handler.on_refused_frame(self, "interrupted_fragments", 1002)
        elif frame.msg_type == WSMsgType.BINARY:
            handler.on_refused_frame(self, "binary_frame", 1003)
        elif frame.payload_size > self.router.message_max:
            handler.on_message(self, frame.get_payload_as_bytes())
        else:  # the first fragment of a text message
            self.fragments = bytearray(frame.get_payload_as_bytes())
            self.fragment_count = 1
        return 0

    def receive_close(self, WSFrame frame not None):
        """Answer a CLOSE frame, or take it as the answer to ours (RFC 6455 section 5.5.1)."""
        cdef int code = frame.get_close_code() if frame.payload_size >= 2 else 1000
        # Section 7.4: these never travel, or belong to nobody.
        if code < 1000 or code > 4999 or 1004 <= code <= 1006 or 1015 <= code <= 2999:
            self.router.handler.on_refused_frame(self, "close_code", 1002)
            self.transport.disconnect()  # both sides have said it
            return
        if self.state != CLOSING:
            self.state = CLOSING
            self.transport.send_close(<WSCloseCode>code, b"")
            self.router.timers.arm(&self.timer, self.router.timers.now + self.router.close_ticks)
        self.transport.disconnect()

    # --- sending -------------------------------------------------------------------------------

    cdef bint queue(self, const char* payload, Py_ssize_t size) except -1:
        cdef uint32_t capacity
        cdef char* grown
        if self.out_size + size + 10 > self.router.write_queue_max:
            return False
        if self.out == NULL:
            self.out = self.router.acquire()
            self.out_capacity = POOLED_BYTES
        if self.out_size + size + 10 > self.out_capacity:
            capacity = self.out_capacity
            while self.out_size + size + 10 > capacity:
                capacity *= 2
            grown = <char*>realloc(self.out, capacity)
            if grown == NULL:
                raise MemoryError()
            self.out = grown
            self.out_capacity = capacity
        self.out_size += write_header(self.out + self.out_size, size)
        memcpy(self.out + self.out_size, payload, size)
        self.out_size += <uint32_t>size
        self.router.mark(self)
        return True

    cdef int write_out(self) except -1:
        """Write the queue to the socket.

        What the socket does not take: uvloop gets the rest of one frame, never more, and tells when it is
        out. All later frames stay here, whole, so that they can follow the agent to its next connection.
        """
        cdef ssize_t sent
        cdef uint32_t position, size, header
        while self.out_size > 0 and not self.is_blocked and self.state < CLOSING:
            if self.transport.is_close_frame_sent:
                return 0  # by picows, for a frame that it refused: nothing may follow (section 5.5.1)
            if self.transport.underlying_transport.is_closing():
                # The other side has gone in this pass of the loop. Its socket would take bytes that nobody
                # reads; here they stay until on_ws_disconnected, which follows, saves them.
                self.is_blocked = True
                return 0
            sent = send(self.socket, self.out, self.out_size, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent == <ssize_t>self.out_size:
                self.out_size = 0
                self.release_queue()
                return 0
            if sent < 0:
                if errno not in (EAGAIN, EINTR, ENOBUFS):
                    self.abort()  # broken: on_ws_disconnected follows and saves the queue
                    return 0
                sent = 0
            position = 0
            while True:
                size = frame_size(self.out + position, &header)
                if position + size > <uint32_t>sent:
                    break
                position += size
            self.drop_head(position)
            sent -= position
            rest = PyBytes_FromStringAndSize(self.out + sent, size - sent)
            self.in_flight = size
            self.transport.underlying_transport.write(rest)
            if not self.is_blocked:  # it could be written after all
                self.drop_head(size)
        return 0

    cdef int drop_head(self, uint32_t size) except -1:
        """Forget the first `size` bytes of the queue."""
        self.in_flight = 0
        if size == 0:
            return 0
        self.out_size -= size
        if self.out_size:
            memmove(self.out, self.out + size, self.out_size)
        else:
            self.release_queue()
        return 0

    cdef void release_queue(self) noexcept:
        if self.out != NULL:
            self.router.release(self.out, self.out_capacity)
            self.out = NULL
            self.out_capacity = 0

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
            self.abort()
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
                    router.counted.pings_sent += 1
                    self.is_pinged = True
                    self.pinged_at = now
                    self.transport.send_ping(b"")
            if self.is_pinged:
                due = self.pinged_at + router.pong_ticks
            if router.idle_ticks:
                due = min(due, self.last_message + router.idle_ticks)
            router.timers.arm(&self.timer, due)
        router.flush()
        return 0
