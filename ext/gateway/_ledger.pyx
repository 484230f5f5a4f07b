"""Which messages a worker keeps for later; see _ledger.pxd."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t
from libc.string cimport memcmp, memcpy

cdef extern from *:
    """
    static inline void aic_publish(uint32_t *to, uint32_t value) {
        __atomic_store_n(to, value, __ATOMIC_RELEASE);
    }
    """
    void aic_publish(uint32_t* target, uint32_t value) noexcept nogil

from gateway._frames cimport ERROR, OK, Envelope, scan_envelope
from gateway._memory cimport map_shared, unmap_shared


LEDGER_FULL = NO_ROOM
LEDGER_NO_RECORD = NO_RECORD
LEDGER_RECORDS = RECORDS
LEDGER_ENTRY_BYTES = ENTRY_BYTES


cdef bytes key_of(const char* sender, const char* id):
    return PyBytes_FromStringAndSize(sender, 56) + PyBytes_FromStringAndSize(id, 36)


cdef class Ledger:
    """The messages that wait in the workers of a node."""

    def __cinit__(self, int workers):
        self.workers = workers
        self.mapped = <size_t>workers * GENERATIONS * RECORDS * sizeof(Waiting)
        self.records = <Waiting*>map_shared(self.mapped)
        self.tops = <uint32_t*>map_shared(<size_t>workers * GENERATIONS * sizeof(uint32_t))
        self.free = []
        self.leaving = []
        self.sources = {}
        self.kept = []
        self.freed = []

    def __dealloc__(self):
        unmap_shared(self.records, self.mapped)
        unmap_shared(self.tops, <size_t>self.workers * GENERATIONS * sizeof(uint32_t))

    cdef int area(self, int worker, int generation) except -1:
        if not 0 <= worker < self.workers:
            raise IndexError(f"there is no worker {worker}")
        return worker * GENERATIONS + generation % GENERATIONS

    def begin(self, int worker, int generation, bytes did=b""):
        """Write for this process from now on. What the one before the last has left is forgotten.

        Args:
            worker: Its number.
            generation: How many processes have had that number before.
            did: Of the gateway, whose own messages need no record.
        """
        cdef int area = self.area(worker, generation)
        if len(did) == 56:
            memcpy(self.did, PyBytes_AS_STRING(did), 56)
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
        if scan_envelope(data, size, &envelope) != OK or memcmp(envelope.from_.data, self.did, 56) == 0:
            return NO_RECORD
        return self.write_down(envelope.from_.data, envelope.to.data, envelope.id.data, size)

    def owe(self, bytes error not None):
        """Write down the message that an ERROR of the gateway answers, for that is not on its way yet.

        Returns:
            As `add`; NO_RECORD for what is no such ERROR.
        """
        cdef Envelope envelope
        cdef const char* target
        cdef Py_ssize_t size = PyBytes_GET_SIZE(error)
        if (
            scan_envelope(PyBytes_AS_STRING(error), size, &envelope) != OK
            or envelope.type != ERROR
            or envelope.correlation_id.data == NULL
            or memcmp(envelope.from_.data, self.did, 56) != 0
        ):
            return NO_RECORD
        target = envelope.from_.data
        found = self.sources.get(key_of(envelope.to.data, envelope.correlation_id.data))
        if found is not None:
            target = self.own[<int>found[1]].target  # two records of one message are to be alike
        return self.write_down(envelope.to.data, target, envelope.correlation_id.data, size)

    cdef int write_down(
        self, const char* sender, const char* target, const char* id, Py_ssize_t size
    ) except -3:
        cdef Waiting* record
        cdef int number
        cdef uint32_t source = self.source
        cdef bytes key = None
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
        memcpy(record.sender, sender, 56)
        memcpy(record.target, target, 56)
        memcpy(record.id, id, 36)
        if source or self.sources:
            # One that has waited already, elsewhere in this process, still comes from where it came.
            key = key_of(record.sender, record.id)
            source = self.sources.get(key, (source,))[0]
        record.source = source
        if source:
            self.sources[key] = source, number
            self.kept.append(number)
        aic_publish(&record.size, <uint32_t>size)
        self.waiting_bytes += size
        return number

    cpdef int strike(self, int number) except -1:
        """A message leaves in this pass of the loop; it is struck out when that is over."""
        if number >= 0:
            self.leaving.append(number)
            if self.own[number].source:
                self.freed.append(number)
        return 0

    @property
    def size(self):
        """How many messages wait in this process."""
        return self.top[0] - len(self.free) if self.own != NULL else 0

    def settle(self):
        """Strike out what has left."""
        cdef int number
        cdef bytes key
        for number in self.leaving:
            if self.own[number].source:
                key = key_of(self.own[number].sender, self.own[number].id)
                if self.sources.get(key, (0, -1))[1] == number:
                    del self.sources[key]
            self.waiting_bytes -= self.own[number].size
            self.own[number].size = 0
        self.free.extend(self.leaving)
        self.leaving.clear()

    # --- what other nodes are told -------------------------------------------------------------

    cdef bytes entry(self, uint32_t number):
        """Describe a record in ENTRY_BYTES; the number is in the byte order of the machine."""
        return (
            PyBytes_FromStringAndSize(<const char*>&number, 4)
            + PyBytes_FromStringAndSize(self.own[number].sender, ENTRY_BYTES - 4)
        )

    def take_news(self, bint with_freed):
        """Return what came from other nodes and waits, and what does no longer, since the last time.

        Args:
            with_freed: Tell the latter now. That may be late, but must be before `settle`.

        Returns:
            Two lists of (source, entry). Of one that does not wait any more the entry is its number only.
        """
        cdef set both = set(self.kept) & set(self.freed)
        cdef list kept = [], freed = []
        cdef uint32_t number
        for number in self.kept:
            if number not in both:
                kept.append((self.own[number].source, self.entry(number)))
        self.kept.clear()
        if both:
            self.freed = [each for each in self.freed if each not in both]
        if with_freed:
            for number in self.freed:
                freed.append((self.own[number].source, self.entry(number)[:4]))
            self.freed.clear()
        return kept, freed

    def waiting_from(self, uint32_t source):
        """Return the entries of all that came from a source and waits."""
        cdef set leaving = set(self.leaving)
        cdef list entries = []
        cdef uint32_t origin, number
        for origin, number in self.sources.values():
            if origin == source and number not in leaving:
                entries.append(self.entry(number))
        return entries

    def knows(self, uint32_t source):
        """Tell whether anything that came from a source waits here, or did until just now."""
        return source in {each for each, _ in self.sources.values()}

    def source_of(self, bytes data not None):
        """Return from where a message came that waits here, or did until just now; 0 for this node."""
        cdef Envelope envelope
        if not self.sources or scan_envelope(
            PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), &envelope
        ) != OK:
            return 0
        return self.sources.get(key_of(envelope.from_.data, envelope.id.data), (0,))[0]

    def read(self, int worker, int generation):
        """Return (sender, target, id, source) of every message that waits, or waited, in a worker."""
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
                    records[number].source,
                ))
        return found
