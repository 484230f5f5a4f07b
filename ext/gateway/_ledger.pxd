"""Which messages a worker keeps for later, in shared memory: if it dies, the others can tell their senders.

A worker confirms a batch once its messages have left it, or wait in it for an agent that is away, on its way
or slow. For those that wait it writes down who sent what to whom, and strikes it out when they have left.
"""

from libc.stdint cimport uint32_t

cdef enum:
    RECORDS = 65_536     # per worker; 10 MiB of memory, of which only what is used is real
    WAITING_MAX_BYTES = 268_435_456  # that wait in one worker: 4,000 agents that are away with full queues
    GENERATIONS = 2      # the next process with a worker's number writes elsewhere, while others still read

# Instead of a number.
cdef enum:
    NO_ROOM = -1
    NO_RECORD = -2       # what is no envelope

cdef struct Waiting:
    char sender[56]      # DIDs
    char target[56]
    char id[36]
    uint32_t size        # bytes of the message; 0: no record. Written last

cdef class Ledger:
    cdef:
        Waiting* records  # shared: by worker, generation and number
        size_t mapped
        readonly int workers
        uint32_t* tops    # shared: by worker and generation, how many numbers were ever used
        Waiting* own      # those of this process; NULL in the supervisor
        uint32_t* top
        list free         # numbers below the top
        list leaving      # numbers that are struck out at the next `settle`
        size_t waiting_bytes

    cdef int write(self, const char* data, Py_ssize_t size) except -3
    cpdef int strike(self, int number) except -1
    cdef int area(self, int worker, int generation) except -1
