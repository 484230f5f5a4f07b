"""Routing table of the node: from a DID to the worker and the connection that serve it.

One piece of shared memory, made before the workers are forked. A lookup takes no lock: a slot is one cache
line with a sequence number, which is odd while the slot is being written (a sequence lock). Writers hold
one process-shared robust mutex, for the time of one slot. The head names the slot that is being written and
keeps what it held before, so that whoever finds the owner of the mutex dead can restore it.

Routes to agents at other nodes stand in the same table (their worker is no number of this node, see
_mesh.pxd). They are a cache: there is room for so many, and the next one takes the place of another.

The key is what distinguishes one DID from another: the 44 characters after `did:key:z6Mk`. They are canonical
(strictly decoded at registration), so no base58 is computed per message.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef enum:
    KEY_SIZE = 44
    DID_SIZE = 56
    DID_PREFIX_SIZE = 12  # "did:key:z6Mk"

cdef enum:
    # Instead of a connection: the session dropped and may resume (see gateway.registry).
    AWAY = 0x7FFFFFFF

cdef enum SlotState:
    EMPTY = 0   # ends every search
    USED

cdef struct Route:
    char key[KEY_SIZE]
    uint32_t sequence    # odd: being written
    uint64_t epoch       # of the session that owns the route; grows with every registration on the node
    uint32_t connection  # index into that worker's Router.connections, or AWAY
    uint16_t worker
    uint16_t state

cdef struct Head

cdef class RoutingTable:
    cdef:
        Head* head         # shared; the slots follow it
        Route* slots
        size_t mapped      # bytes
        uint64_t mask      # capacity - 1; the capacity is a power of two

    # Copy the route of `key` (KEY_SIZE characters); False if there is none.
    cdef bint find(self, const char* key, Route* out) noexcept nogil
    # Give the route of `key` to a connection and return its new epoch; `replaced` gets what was there
    # before, with state USED, if anything was.
    cdef uint64_t bind_key(
        self, const char* key, uint16_t worker, uint32_t connection, Route* replaced
    ) except 0
    cdef bint search(self, const char* key, Route* out) noexcept nogil
    cdef bint read(self, uint64_t index, Route* out) noexcept nogil
    cdef int lock(self) except -1
    cdef bint try_lock(self, long nanoseconds) noexcept nogil
    cdef void unlock(self) noexcept nogil
    cdef void repair(self) noexcept nogil
    cdef void put(self, uint64_t index, const Route* value) noexcept nogil
    cdef void clear(self, uint64_t index) noexcept nogil
    cdef void close_gap(self, uint64_t hole) noexcept nogil
    cdef uint64_t purge_once(self, uint32_t first, uint32_t end) except? 0
    cdef void evict(self) noexcept nogil
    cdef Route* own(self, const char* key, uint64_t epoch) noexcept nogil
