"""The stream between two workers; see _mesh.pxd."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

import os
import socket

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void* data, size_t size, int flags)
    ssize_t recv(int fd, void* data, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef enum:
    # An empty link gives memory over this back.
    KEPT_BYTES = 262_144

cdef enum:
    MAGIC = 0x41494332  # "AIC2"

ROUTED_KIND = ROUTED
FIRST_OTHER_KIND = FIRST_OTHER
NODE_WORKERS = MAX_WORKERS


def socket_pair():
    """Return the two ends of a new link."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return ends


cdef size_t padded(size_t size) noexcept nogil:
    return (size + 7) & ~<size_t>7


cdef class Link:
    """One end of the stream between two workers.

    Args:
        worker: The number of the worker at the other end.
        fd: The socket, not blocking. The link owns it.
        ledger: Where it is written down what is passed on.
    """

    def __cinit__(self, int worker, int fd, *, Ledger ledger, **_):
        self.worker = worker
        self.fd = fd
        self.ledger = ledger
        self.passed = []
        self.is_open = True

    def __dealloc__(self):
        free(self.out)
        free(self.held)
        self.close()

    def close(self):
        """Close the socket; what was not confirmed stays to be taken."""
        self.is_open = False
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    cdef uint16_t local(self, uint16_t number) noexcept:
        return number

    # --- sending -------------------------------------------------------------------------------

    cdef int reserve(self, size_t more) except -1:
        cdef size_t capacity = self.out_capacity or 16_384
        cdef char* grown
        if self.out_size + more <= self.out_capacity:
            return 0
        while capacity < self.out_size + more:
            capacity *= 2
        grown = <char*>realloc(self.out, capacity)
        if grown == NULL:
            raise MemoryError()
        self.out = grown
        self.out_capacity = capacity
        return 0

    cdef bint append(
        self,
        size_t limit,
        uint16_t kind,
        uint16_t origin,
        uint32_t connection,
        uint64_t epoch,
        const char* payload,
        size_t size,
    ) except -1:
        cdef size_t needed = sizeof(Record) + padded(size)
        cdef Record* record
        if not self.is_open or self.out_size + needed + sizeof(BatchHead) > limit:
            return False
        self.reserve(needed + sizeof(BatchHead))
        if self.out_size - self.batch >= BATCH_MAX:
            self.end_batch()
        if self.batch == self.out_size:
            memset(self.out + self.out_size, 0, sizeof(BatchHead))
            self.out_size += sizeof(BatchHead)
        record = <Record*>(self.out + self.out_size)
        record.size = <uint32_t>size
        record.origin = origin
        record.kind = kind
        record.connection = connection
        record.unused = 0
        record.epoch = epoch
        memcpy(self.out + self.out_size + sizeof(Record), payload, size)
        memset(self.out + self.out_size + sizeof(Record) + size, 0, padded(size) - size)
        self.out_size += needed
        return True

    cdef int answer_for(self, int number) except -1:
        if number >= 0:
            self.passed.append((self.base + self.out_size, number))
        return 0

    cdef int hand_off(self, uint64_t position) except -1:
        """Strike out what was passed on and is confirmed, or goes back to its sender."""
        cdef Py_ssize_t count = 0
        while count < len(self.passed) and self.passed[count][0] <= position:
            self.ledger.strike(self.passed[count][1])
            count += 1
        del self.passed[:count]
        return 0

    cdef void end_batch(self) noexcept:
        """Close the open batch, if there is one."""
        cdef BatchHead* head
        if self.batch < self.out_size:
            head = <BatchHead*>(self.out + self.batch)
            head.size = <uint32_t>(self.out_size - self.batch - sizeof(BatchHead))
            head.confirmed = self.told = self.written_out
            self.owes = False
            self.batch = self.out_size
            if head.size:
                self.asked = self.base + self.out_size

    cdef size_t unconfirmed(self) noexcept:
        return self.out_size if self.asked > self.base else 0

    cdef void settle(self) noexcept:
        self.written_out = self.dealt_with
        # A confirmation is not confirmed, or two idle workers would never stop.
        self.owes = self.owes or self.has_records
        self.has_records = False

    cdef int seal(self, bint confirm_now) except -1:
        if self.batch < self.out_size:
            self.end_batch()
        elif (
            self.owes
            and (confirm_now or self.written_out - self.told >= CONFIRM_BYTES)
            and self.written == self.out_size
        ):
            # Nothing to say but the confirmation: a batch without records.
            self.reserve(sizeof(BatchHead))
            memset(self.out + self.out_size, 0, sizeof(BatchHead))
            self.out_size += sizeof(BatchHead)
            self.end_batch()
        return 0

    cdef bint flush(self, bint confirm_now) except -1:
        cdef ssize_t sent
        if not self.is_open:
            return False
        self.seal(confirm_now)
        while self.written < self.out_size and not self.is_blocked:
            sent = send(
                self.fd, self.out + self.written, self.out_size - self.written, MSG_DONTWAIT | MSG_NOSIGNAL
            )
            if sent >= 0:
                self.written += sent
            elif errno == EAGAIN:
                self.is_blocked = True
            elif errno != EINTR:
                return False
        return True

    cdef int confirm(self, uint64_t position) except -1:
        """Forget what the other worker has dealt with."""
        cdef size_t done = position - self.base
        if position < self.base or done > self.written:
            raise RuntimeError(f"worker {self.worker} confirms what it was not told")
        if done == 0:
            return 0
        if self.passed:
            self.hand_off(position)
        self.base = position
        self.out_size -= done
        self.written -= done
        self.batch -= done
        if self.out_size:
            memmove(self.out, self.out + done, self.out_size)
        elif self.out_capacity > KEPT_BYTES:
            free(self.out)
            self.out = NULL
            self.out_capacity = 0
        return 0

    def take_unconfirmed(self):
        """Return (kind, origin, epoch, payload) of every record that was not confirmed, and forget them."""
        cdef list records = []
        cdef size_t position = 0, end
        cdef Record* record
        self.end_batch()
        while position < self.out_size:
            end = position + sizeof(BatchHead) + (<BatchHead*>(self.out + position)).size
            position += sizeof(BatchHead)
            while position < end:
                record = <Record*>(self.out + position)
                position += sizeof(Record)
                records.append((
                    record.kind,
                    record.origin,
                    record.epoch,
                    PyBytes_FromStringAndSize(self.out + position, record.size),
                ))
                position += padded(record.size)
        self.base += self.out_size
        self.hand_off(self.base)
        self.out_size = self.written = self.batch = 0
        return records

    # --- receiving -----------------------------------------------------------------------------

    cdef bint read(self, char* buffer, size_t capacity, Deliver deliver, void* owner) except -1:
        cdef ssize_t received
        cdef size_t size, used
        cdef char* grown
        # A batch is BATCH_MAX and one message at most: the rest of one always fits behind its beginning.
        if self.held_size:
            memcpy(buffer, self.held, self.held_size)
        received = recv(self.fd, buffer + self.held_size, capacity - self.held_size, MSG_DONTWAIT)
        self.is_silent = received < 0
        if received == 0 or (received < 0 and errno != EAGAIN and errno != EINTR):
            return False
        if received < 0:
            return True
        size = self.held_size + received
        used = self.deliver_batches(buffer, size, deliver, owner)
        self.held_size = size - used
        if self.held_size > self.held_capacity:
            grown = <char*>realloc(self.held, self.held_size)
            if grown == NULL:
                raise MemoryError()
            self.held = grown
            self.held_capacity = self.held_size
        memcpy(self.held, buffer + used, self.held_size)
        return True

    cdef size_t deliver_batches(self, char* data, size_t size, Deliver deliver, void* owner) except? 0:
        """Deliver the whole batches at the start of `data`; return their size."""
        cdef size_t position = 0, end
        cdef BatchHead* head
        cdef Record* record
        while size - position >= sizeof(BatchHead):
            head = <BatchHead*>(data + position)
            end = position + sizeof(BatchHead) + head.size
            if end > size:
                break
            self.confirm(head.confirmed)
            self.dealt_with += end - position
            self.has_records = self.has_records or head.size > 0
            position += sizeof(BatchHead)
            while position < end:
                record = <Record*>(data + position)
                position += sizeof(Record)
                deliver(owner, self, record, data + position)
                position += padded(record.size)
        return position


cdef class RemoteLink(Link):
    """The stream to a worker of another node, and what that worker says to this one.

    Args:
        worker: Its number.
        node: The number of this node.
        source: The number of this worker at this node.
        publish: Called with the number of the other worker and each piece for it.
        stream: Number of the first stream.
    """

    def __init__(
        self, int worker, int fd, *, Ledger ledger, uint16_t node, uint16_t source, publish, uint64_t stream
    ):
        self.node = node
        self.source = node * MAX_WORKERS + source
        self.publish = publish
        self.stream = stream
        self.formers = set()

    @property
    def progress(self):
        """Bytes that were confirmed since the stream began, and bytes that wait for it."""
        return self.base, self.unconfirmed()

    def begin_anew(self, uint64_t stream):
        """Begin the stream of that number; return what was not confirmed of the last (`take_unconfirmed`)."""
        cdef list records = self.take_unconfirmed()
        self.base = self.asked = 0
        self.stream = stream
        self.is_open = True
        return records

    cdef uint16_t local(self, uint16_t number) noexcept:
        return number % MAX_WORKERS if number // MAX_WORKERS == self.node else number

    cdef bint append(
        self,
        size_t limit,
        uint16_t kind,
        uint16_t origin,
        uint32_t connection,
        uint64_t epoch,
        const char* payload,
        size_t size,
    ) except -1:
        if origin < MAX_WORKERS:
            origin += self.node * MAX_WORKERS
        return Link.append(self, limit, kind, origin, connection, epoch, payload, size)

    cdef bint flush(self, bint confirm_now) except -1:
        cdef bytes piece
        cdef RemoteHead* head
        cdef BatchHead* batch
        cdef size_t size
        if not self.is_open:
            return True
        self.seal(confirm_now)
        size = self.out_size - self.written
        if size == 0:
            return True
        piece = PyBytes_FromStringAndSize(NULL, sizeof(RemoteHead) + size)
        head = <RemoteHead*>PyBytes_AS_STRING(piece)
        head.magic = MAGIC
        head.kind = PIECE
        head.source = self.source
        head.stream = self.stream
        head.position = self.base + self.written
        head.confirms = self.opposite
        # What a batch confirms may be of the opposite stream's time before it began anew.
        while self.written < self.out_size:
            batch = <BatchHead*>(self.out + self.written)
            batch.confirmed = self.written_out
            self.written += sizeof(BatchHead) + batch.size
        memcpy(<char*>head + sizeof(RemoteHead), self.out + self.out_size - size, size)
        self.publish(self.worker, piece)
        return True

    cdef int confirm(self, uint64_t position) except -1:
        if self.may_confirm and self.base <= position <= self.base + self.written:
            Link.confirm(self, position)
        return 0

    cdef bint is_next(self, uint64_t stream) except -1:
        """Tell whether a stream is newer than the one that is followed."""
        if stream >> STREAM_BITS == self.opposite >> STREAM_BITS:
            return stream > self.opposite
        # Of a process that is gone, Redis may still hand over what it had said last.
        return stream >> STREAM_BITS not in self.formers

    cdef int say_reset(self, uint64_t stream) except -1:
        cdef bytes piece = PyBytes_FromStringAndSize(NULL, sizeof(RemoteHead))
        cdef RemoteHead* head = <RemoteHead*>PyBytes_AS_STRING(piece)
        memset(head, 0, sizeof(RemoteHead))
        head.magic = MAGIC
        head.kind = RESET
        head.source = self.source
        head.stream = stream
        self.publish(self.worker, piece)
        return 0

    cdef bint take(self, bytes piece, Deliver deliver, void* owner) except -1:
        cdef const RemoteHead* head = <const RemoteHead*>PyBytes_AS_STRING(piece)
        cdef char* batches = PyBytes_AS_STRING(piece) + sizeof(RemoteHead)
        cdef size_t size = PyBytes_GET_SIZE(piece) - sizeof(RemoteHead)
        if head.kind == RESET:
            return head.stream != self.stream
        if not are_batches(batches, size):
            self.say_reset(head.stream)
            return True
        if head.position == 0 and self.is_next(head.stream):
            if head.stream >> STREAM_BITS != self.opposite >> STREAM_BITS:
                self.formers.add(self.opposite >> STREAM_BITS)
            self.opposite = head.stream
            self.dealt_with = self.written_out = self.told = 0
            self.has_records = self.owes = False
        elif head.stream != self.opposite or head.position != self.dealt_with:
            self.say_reset(head.stream)
            return True
        self.may_confirm = head.confirms == self.stream
        self.deliver_batches(batches, size, deliver, owner)
        return True


cdef bint are_batches(const char* data, size_t size) noexcept nogil:
    """Whether sizes add up: Redis is another program, and what it hands over was not made by this one."""
    cdef size_t position = 0, end
    while position < size:
        if size - position < sizeof(BatchHead):
            return False
        end = position + sizeof(BatchHead) + (<const BatchHead*>(data + position)).size
        position += sizeof(BatchHead)
        if end > size:
            return False
        while position < end:
            if end - position < sizeof(Record):
                return False
            position += sizeof(Record) + padded((<const Record*>(data + position)).size)
        if position != end:
            return False
    return True


def source_of(bytes piece not None):
    """Return the number of the worker that published a piece; None if it is none."""
    cdef const RemoteHead* head = <const RemoteHead*>PyBytes_AS_STRING(piece)
    if PyBytes_GET_SIZE(piece) < <Py_ssize_t>sizeof(RemoteHead) or head.magic != MAGIC:
        return None
    return head.source
