"""Which messages a worker keeps for later, in shared memory: if it dies, the others can tell their senders.

A worker confirms a batch once its messages have left it, or wait in it for an agent that is away, on its way
or slow. For those that wait it writes down who sent what to whom, and strikes it out when they have left.

What came from another node is answerable for elsewhere, too: if this whole node dies, nobody can read its
memory. So the ledger remembers from where each message came and what is new in it, see gateway.custody.
"""

from cpython.list cimport PyList_GET_SIZE
from libc.stdint cimport uint32_t

cdef enum:
    RECORDS = 65_536     # per worker; 10 MiB of memory, of which only what is used is real
    WAITING_MAX_BYTES = 268_435_456  # that wait in one worker: 4,000 agents that are away with full queues
    GENERATIONS = 2      # the next process with a worker's number writes elsewhere, while others still read

# Instead of a number.
cdef enum:
    NO_ROOM = -1
    NO_RECORD = -2       # what is no envelope, or the gateway's own: nobody would be told

cdef enum:
    ENTRY_BYTES = 4 + 56 + 56 + 36  # of one record for another node: number, sender, target, id

cdef struct Waiting:
    char sender[56]      # DIDs
    char target[56]      # the gateway itself where only an ERROR is left of the message
    char id[36]
    uint32_t source      # from where it came: see Ledger.source
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
        char did[56]      # of the gateway; zeros: not known
        # The worker of another node from which comes what is being dealt with, by its number in
        # gateway.custody; 0: this node.
        public uint32_t source
        dict sources      # of what came from other nodes: sender and id -> (source, number)
        list kept         # numbers of those that wait since the last `take_news`
        list freed        # ... and of those that do no longer

    # Whether `take_news` has something to tell.
    cdef inline bint has_news(self, bint with_freed) noexcept:
        return PyList_GET_SIZE(self.kept) > 0 or (with_freed and PyList_GET_SIZE(self.freed) > 0)

    cdef int write(self, const char* data, Py_ssize_t size) except -3
    cdef int write_down(
        self, const char* sender, const char* target, const char* id, Py_ssize_t size
    ) except -3
    cpdef int strike(self, int number) except -1
    cdef int area(self, int worker, int generation) except -1
    cdef bytes entry(self, uint32_t number)
