"""Which messages a worker keeps for later; see _ledger.pxd."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from gateway._frames cimport OK, Envelope, scan_envelope
from gateway._memory cimport map_shared, unmap_shared


LEDGER_FULL = NO_ROOM


cdef class Ledger:
    """The messages that wait in the workers of a node."""

    def __cinit__(self, int workers):
        self.workers = workers
        self.mapped = <size_t>workers * GENERATIONS * RECORDS * sizeof(Waiting)
        self.records = <Waiting*>map_shared(self.mapped)
        self.free = []
        self.leaving = []

    def __dealloc__(self):
        unmap_shared(self.records, self.mapped)

    cdef Waiting* of(self, int worker, int generation) except NULL:
        if not 0 <= worker < self.workers:
            raise IndexError(f"there is no worker {worker}")
        return self.records + (worker * GENERATIONS + generation % GENERATIONS) * RECORDS

    def begin(self, int worker, int generation):
        """Write for this process from now on. What the one before the last has left is forgotten."""
        cdef Waiting* own = self.of(worker, generation)
        cdef int number
        for number in range(RECORDS):
            if own[number].size:
                own[number].size = 0
        self.own = own
        self.free = list(range(RECORDS - 1, -1, -1))

    def add(self, bytes data not None):
        """Write down a message that waits.

        Returns:
            Its number; NO_ROOM; or NO_RECORD for what no agent would be told about.
        """
        return self.write(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef int write(self, const char* data, Py_ssize_t size) except -3:
        cdef Envelope envelope
        cdef Waiting* record
        cdef int number
        if scan_envelope(data, size, &envelope) != OK:
            return NO_RECORD
        if not self.free or self.waiting_bytes + size > WAITING_MAX_BYTES:
            return NO_ROOM
        number = self.free.pop()
        record = &self.own[number]
        memcpy(record.sender, envelope.from_.data, 56)
        memcpy(record.target, envelope.to.data, 56)
        memcpy(record.id, envelope.id.data, 36)
        record.size = <uint32_t>size
        self.waiting_bytes += size
        return number

    cpdef int strike(self, int number) except -1:
        """A message leaves in this pass of the loop; it is struck out when that is over."""
        if number >= 0:
            self.leaving.append(number)
        return 0

    @property
    def size(self):
        """How many messages wait in this process."""
        return RECORDS - len(self.free) if self.own != NULL else 0

    def settle(self):
        """Strike out what has left."""
        cdef int number
        for number in self.leaving:
            self.waiting_bytes -= self.own[number].size
            self.own[number].size = 0
        self.free.extend(self.leaving)
        self.leaving.clear()

    def read(self, int worker, int generation):
        """Return (sender, target, id) of every message that waits, or waited, in a worker."""
        cdef Waiting* records = self.of(worker, generation)
        cdef list found = []
        cdef int number
        for number in range(RECORDS):
            if records[number].size:
                found.append((
                    PyBytes_FromStringAndSize(records[number].sender, 56).decode(),
                    PyBytes_FromStringAndSize(records[number].target, 56).decode(),
                    PyBytes_FromStringAndSize(records[number].id, 36).decode(),
                ))
        return found
