"""Routing table: from a DID to the connection that serves it.

The key is the 48 characters after `did:key:`. They are canonical (strictly decoded at registration), so
no base58 is computed per message. A slot is one cache line.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    KEY_SIZE = 48
    DID_SIZE = 56
    DID_PREFIX_SIZE = 8  # "did:key:"

cdef enum:
    # Instead of a connection: the session dropped and may resume (see gateway.registry).
    AWAY = 0x7FFFFFFF

cdef struct Route:
    char key[KEY_SIZE]
    uint64_t epoch       # of the session that owns the route; 0: the slot is free
    uint32_t connection  # index into Router.connections, or AWAY
    uint32_t worker      # always 0 with one worker

cdef class RoutingTable:
    cdef:
        Route* slots         # owned
        uint64_t mask        # capacity - 1; the capacity is a power of two
        readonly uint64_t size
        uint64_t secret[2]   # keys are chosen by strangers: the hash is keyed

    # `key` points to KEY_SIZE characters. The route is valid until the table changes.
    cdef Route* find(self, const char* key) noexcept nogil
    cdef int bind(self, const char* key, uint32_t connection, uint64_t epoch) except -1
    # Only the owner may: False if the route belongs to another epoch or is gone.
    cdef bint unbind(self, const char* key, uint64_t epoch) noexcept nogil
    cdef uint64_t home(self, const char* key) noexcept nogil
    cdef int grow(self) except -1
