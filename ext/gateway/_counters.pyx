"""Counters of all workers; see _counters.pxd."""

from libc.stdint cimport uint64_t

from gateway._memory cimport map_shared, unmap_shared

# In the order of the enum in _counters.pxd.
_COUNTED = (
    "messages_received",
    "messages_routed",
    "bytes_routed",
    "messages_crossed",
    "pings_sent",
    "connections",
    "sessions",
    "away",
    "waiting",
    "waiting_elsewhere",
    "unconfirmed_bytes",
    "heartbeats",
)


cdef class Counters:
    """One row of counters per worker.

    A worker that dies leaves its counts, and the next one with its number goes on from there: they only grow,
    but for those that say how many there are now (`reset_gauges`).

    Args:
        workers: How many rows.
        names: Of the counters beside those that are counted in C.
    """

    def __cinit__(self, int workers, names=()):
        self.names = (*_COUNTED, *names)
        assert len(_COUNTED) == COUNTS
        self.columns = <int>len(self.names)
        self.column_of = {name: column for column, name in enumerate(self.names)}
        if len(self.column_of) != self.columns:
            raise ValueError("a counter is named twice")
        self.workers = workers
        self.mapped = <size_t>workers * self.columns * sizeof(uint64_t)
        self.cells = <uint64_t*>map_shared(self.mapped)

    def __dealloc__(self):
        unmap_shared(self.cells, self.mapped)

    cdef uint64_t* row(self, int worker) except NULL:
        if not 0 <= worker < self.workers:
            raise IndexError(f"there is no worker {worker}")
        return self.cells + worker * self.columns

    def add(self, int worker, str name not None, uint64_t amount=1):
        """Count at one worker."""
        self.row(worker)[<int>self.column_of[name]] += amount

    def set(self, int worker, str name not None, uint64_t value):
        """Say how many there are now."""
        self.row(worker)[<int>self.column_of[name]] = value

    def get(self, int worker, str name not None):
        """Return what one worker has counted."""
        return self.row(worker)[<int>self.column_of[name]]

    def total(self, str name not None):
        """Return what all workers have counted."""
        cdef int column = self.column_of[name]
        cdef int worker
        cdef uint64_t total = 0
        for worker in range(self.workers):
            total += self.row(worker)[column]
        return total

    def reset_gauges(self, int worker):
        """Forget how many a worker that is gone had."""
        cdef uint64_t* row = self.row(worker)
        row[CONNECTIONS] = row[SESSIONS] = row[AWAY_SESSIONS] = 0
        row[WAITING] = row[WAITING_ELSEWHERE] = row[UNCONFIRMED_BYTES] = 0
