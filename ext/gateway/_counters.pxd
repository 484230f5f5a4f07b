"""Counters of all workers in shared memory: each worker writes its own row, everybody reads all of them."""

from libc.stdint cimport uint64_t

# Those that are counted in C; more are known by name only.
cdef enum:
    MESSAGES_RECEIVED   # text messages of any kind
    MESSAGES_ROUTED     # queued at their target
    BYTES_ROUTED
    MESSAGES_CROSSED    # handed to another worker
    PINGS_SENT
    CONNECTIONS         # now
    SESSIONS            # now, with those that are away
    AWAY_SESSIONS       # now
    WAITING             # messages now, for agents that are away, on their way or slow
    WAITING_ELSEWHERE   # messages now, of agents here, at other nodes
    UNCONFIRMED_BYTES   # now, of what was handed to other workers
    HEARTBEATS          # of the worker's event loop
    COUNTS

cdef class Counters:
    cdef:
        uint64_t* cells    # shared: rows of `columns`
        size_t mapped
        readonly int workers
        readonly int columns
        dict column_of     # of a name
        readonly tuple names

    cdef uint64_t* row(self, int worker) except NULL
