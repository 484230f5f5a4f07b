"""Connections of the node by the address that they come from, in shared memory."""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    ROWS = 2
    BUCKETS = 65_536

cdef class Addresses:
    cdef:
        uint32_t* cells    # shared: per worker ROWS rows of BUCKETS
        size_t mapped
        readonly int workers
        bytes secret

    cpdef int add(self, int worker, uint32_t place, int change) except -1
