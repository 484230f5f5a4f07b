"""Routing table: open addressing with linear probing, at most half full."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

import os

cdef extern from *:
    """
    #include <string.h>

    /* 64 x 64 -> 128 bit multiplication, folded: one strong mixing step per 16 bytes of key. */
    static inline uint64_t aic_mix(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }

    static inline uint64_t aic_hash48(const char *key, const uint64_t *secret) {
        uint64_t word[6];
        memcpy(word, key, sizeof word);
        uint64_t h = aic_mix(word[0] ^ secret[0], word[1] ^ secret[1]);
        h ^= aic_mix(word[2] ^ secret[1] ^ h, word[3] ^ secret[0]);
        h ^= aic_mix(word[4] ^ secret[0] ^ h, word[5] ^ secret[1]);
        return aic_mix(h ^ secret[0], secret[1]);
    }
    """
    uint64_t aic_hash48(const char* key, const uint64_t* secret) noexcept nogil

AWAY_INDEX = AWAY

cdef uint64_t INITIAL_CAPACITY = 1024


cdef const char* key_of(bytes did) except NULL:
    """Return where the key of a DID begins; the DID was decoded strictly before."""
    if PyBytes_GET_SIZE(did) != DID_SIZE:
        raise ValueError(f"a DID has {DID_SIZE} characters, not {len(did)}")
    return PyBytes_AS_STRING(did) + DID_PREFIX_SIZE


cdef class RoutingTable:
    """Map DIDs to (connection, epoch). The Python methods are for registration and tests."""

    def __cinit__(self):
        self.slots = <Route*>calloc(INITIAL_CAPACITY, sizeof(Route))
        if self.slots == NULL:
            raise MemoryError()
        self.mask = INITIAL_CAPACITY - 1
        self.size = 0
        # Odd: a factor of a multiplication should lose no bits.
        self.secret[0] = int.from_bytes(os.urandom(8), "little") | 1
        self.secret[1] = int.from_bytes(os.urandom(8), "little") | 1

    def __dealloc__(self):
        free(self.slots)

    cdef uint64_t home(self, const char* key) noexcept nogil:
        return aic_hash48(key, self.secret) & self.mask

    cdef Route* find(self, const char* key) noexcept nogil:
        cdef uint64_t index = self.home(key)
        while self.slots[index].epoch != 0:
            if memcmp(self.slots[index].key, key, KEY_SIZE) == 0:
                return &self.slots[index]
            index = (index + 1) & self.mask
        return NULL

    cdef int bind(self, const char* key, uint32_t connection, uint64_t epoch) except -1:
        cdef Route* route = self.find(key)
        cdef uint64_t index
        if route == NULL:
            if 2 * (self.size + 1) > self.mask:
                self.grow()
            index = self.home(key)
            while self.slots[index].epoch != 0:
                index = (index + 1) & self.mask
            route = &self.slots[index]
            memcpy(route.key, key, KEY_SIZE)
            self.size += 1
        route.connection = connection
        route.worker = 0
        route.epoch = epoch
        return 0

    cdef bint unbind(self, const char* key, uint64_t epoch) noexcept nogil:
        cdef Route* route = self.find(key)
        cdef uint64_t hole, index, home
        if route == NULL or route.epoch != epoch:
            return False
        # Close the gap (Knuth 6.4, algorithm R): no tombstones, so lookups stay short.
        hole = route - self.slots
        index = hole
        while True:
            index = (index + 1) & self.mask
            if self.slots[index].epoch == 0:
                break
            home = self.home(self.slots[index].key)
            if ((index - home) & self.mask) >= ((index - hole) & self.mask):
                self.slots[hole] = self.slots[index]
                hole = index
        self.slots[hole].epoch = 0
        self.size -= 1
        return True

    cdef int grow(self) except -1:
        cdef Route* old = self.slots
        cdef uint64_t capacity = self.mask + 1
        cdef uint64_t i, index
        cdef Route* fresh = <Route*>calloc(2 * capacity, sizeof(Route))
        if fresh == NULL:
            raise MemoryError()
        self.slots = fresh
        self.mask = 2 * capacity - 1
        for i in range(capacity):
            if old[i].epoch != 0:
                index = self.home(old[i].key)
                while fresh[index].epoch != 0:
                    index = (index + 1) & self.mask
                fresh[index] = old[i]
        free(old)
        return 0

    def set(self, bytes did not None, uint32_t connection, uint64_t epoch):
        """Point `did` (ASCII) to a connection index, or to AWAY. Epochs begin at 1."""
        if epoch == 0:
            raise ValueError("epoch 0 marks a free slot")
        self.bind(key_of(did), connection, epoch)

    def get(self, bytes did not None):
        """Return (connection, epoch), or None."""
        cdef Route* route = self.find(key_of(did))
        if route == NULL:
            return None
        return route.connection, route.epoch

    def remove(self, bytes did not None, uint64_t epoch):
        """Remove the route if `epoch` still owns it; tell whether it did."""
        return bool(self.unbind(key_of(did), epoch))

    def __len__(self):
        return self.size
