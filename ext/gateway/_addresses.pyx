"""How many connections come from one address: a count-min sketch (Cormode and Muthukrishnan, 2005).

Each worker writes only its own, so nobody locks, and what a dead worker held is forgotten by zeroing. The
count is never too small. It is too large only for an address that collides with others in both rows: of
10,000 addresses, two in a hundred.
"""

from hashlib import blake2b
from libc.stdint cimport uint32_t
from libc.string cimport memset

import os
import socket

from gateway._memory cimport map_shared, unmap_shared


cdef class Addresses:
    """Counts of connections by address, for all workers of a node."""

    def __cinit__(self, int workers):
        self.workers = workers
        self.mapped = <size_t>workers * ROWS * BUCKETS * sizeof(uint32_t)
        self.cells = <uint32_t*>map_shared(self.mapped)
        self.secret = os.urandom(16)  # or strangers could choose addresses that collide

    def __dealloc__(self):
        unmap_shared(self.cells, self.mapped)

    def place(self, str address not None):
        """Return the number under which an address is counted; an IPv6 network of 64 bits is one address."""
        cdef bytes counted
        if ":" in address:
            # The smallest network that a site gets: it has all of its addresses to dial from (RFC 6177).
            counted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8]
        else:
            counted = address.encode()
        return int.from_bytes(blake2b(counted, key=self.secret, digest_size=4).digest(), "little")

    def count(self, uint32_t place):
        """Return how many connections there are from an address."""
        cdef uint32_t first = place % BUCKETS, second = BUCKETS + place // BUCKETS
        cdef uint32_t by_first = 0, by_second = 0
        cdef int _worker
        cdef uint32_t* cells = self.cells
        for _worker in range(self.workers):
            by_first += cells[first]
            by_second += cells[second]
            cells += ROWS * BUCKETS
        return min(by_first, by_second)

    cpdef int add(self, int worker, uint32_t place, int change) except -1:
        """Count a connection that begins (1) or ends (-1) at a worker."""
        cdef uint32_t* cells = self.cells + <size_t>worker * ROWS * BUCKETS
        cells[place % BUCKETS] += change
        cells[BUCKETS + place // BUCKETS] += change
        return 0

    def forget(self, int worker):
        """Forget the connections of a worker that is gone."""
        memset(self.cells + <size_t>worker * ROWS * BUCKETS, 0, ROWS * BUCKETS * sizeof(uint32_t))
