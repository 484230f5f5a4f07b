"""Which messages a worker keeps for later; see _ledger.pxd."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

cdef extern from *:
    """
    static inline void aic_publish(uint32_t *to, uint32_t value) {
        __atomic_store_n(to, value, __ATOMIC_RELEASE);
    }
    """
    void aic_publish(uint32_t* target, uint32_t value) noexcept nogil

from gateway._frames cimport OK, Envelope, scan_envelope
from gateway._memory cimport map_shared, unmap_shared


LEDGER_FULL = NO_ROOM


cdef class Ledger:
    """The messages that wait in the workers of a node."""

    def __cinit__(self, int workers):
        self.workers = workers
        self.mapped = <size_t>workers * GENERATIONS * RECORDS * sizeof(Waiting)
        self.records = <Waiting*>map_shared(self.mapped)
        self.tops = <uint32_t*>map_shared(<size_t>workers * GENERATIONS * sizeof(uint32_t))
        self.free = []
        self.leaving = []

    def __dealloc__(self):
        unmap_shared(self.records, self.mapped)
        unmap_shared(self.tops, <size_t>self.workers * GENERATIONS * sizeof(uint32_t))

    cdef int area(self, int worker, int generation) except -1:
        if not 0 <= worker < self.workers:
            raise IndexError(f"there is no worker {worker}")
        return worker * GENERATIONS + generation % GENERATIONS

    def begin(self, int worker, int generation):
        """Write for this process from now on. What the one before the last has left is forgotten."""
        cdef int area = self.area(worker, generation)
        self.own = self.records + <size_t>area * RECORDS
        self.top = &self.tops[area]
        self.top[0] = 0

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
        if self.waiting_bytes + size > WAITING_MAX_BYTES:
            return NO_ROOM
        if self.free:
            number = self.free.pop()
            record = &self.own[number]
        elif self.top[0] < RECORDS:
            number = self.top[0]
            record = &self.own[number]
            record.size = 0  # before it can be read
            aic_publish(self.top, number + 1)
        else:
            return NO_ROOM
        memcpy(record.sender, envelope.from_.data, 56)
        memcpy(record.target, envelope.to.data, 56)
        memcpy(record.id, envelope.id.data, 36)
        aic_publish(&record.size, <uint32_t>size)
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
        return self.top[0] - len(self.free) if self.own != NULL else 0

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
        cdef int area = self.area(worker, generation)
        cdef Waiting* records = self.records + <size_t>area * RECORDS
        cdef list found = []
        cdef uint32_t number
        for number in range(self.tops[area]):
            if records[number].size:
                found.append((
                    PyBytes_FromStringAndSize(records[number].sender, 56).decode(),
                    PyBytes_FromStringAndSize(records[number].target, 56).decode(),
                    PyBytes_FromStringAndSize(records[number].id, 36).decode(),
                ))
        return found
