"""Routing table: open addressing with linear probing in shared memory, at most half full; see _routing.pxd.

Removing a route closes the gap (Knuth 6.4, algorithm R), so searches stay short for ever. Routes move then,
and a reader that holds no lock might miss one; so whoever finds nothing looks again if a gap was closed
meanwhile.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

import os

from gateway._memory cimport map_shared, unmap_shared
from gateway._mesh cimport MAX_WORKERS

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <string.h>
    #include <time.h>

    /* 64 x 64 -> 128 bit multiplication, folded: one strong mixing step per 16 bytes of key. */
    static inline uint64_t aic_mix(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }

    static inline uint64_t aic_hash_key(const char *key, const uint64_t *secret) {
        uint64_t word[6] = {0};
        memcpy(word, key, 44);
        uint64_t h = aic_mix(word[0] ^ secret[0], word[1] ^ secret[1]);
        h ^= aic_mix(word[2] ^ secret[1] ^ h, word[3] ^ secret[0]);
        h ^= aic_mix(word[4] ^ secret[0] ^ h, word[5] ^ secret[1]);
        return aic_mix(h ^ secret[0], secret[1]);
    }

    static inline uint32_t aic_load(const uint32_t *from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
    static inline void aic_store(uint32_t *to, uint32_t value) {
        __atomic_store_n(to, value, __ATOMIC_RELEASE);
    }
    static inline void aic_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline void aic_relax(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #endif
    }

    static int aic_mutex_init(pthread_mutex_t *mutex) {
        pthread_mutexattr_t attributes;
        int error = pthread_mutexattr_init(&attributes);
        if (!error) error = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        if (!error) error = pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        if (!error) error = pthread_mutex_init(mutex, &attributes);
        return error;
    }

    #ifdef __GLIBC__
    #define AIC_LOCK_CLOCK CLOCK_MONOTONIC
    #else
    #define AIC_LOCK_CLOCK CLOCK_REALTIME
    #endif

    static int aic_mutex_lock(pthread_mutex_t *mutex, long nanoseconds) {
        struct timespec until;
        int error = pthread_mutex_trylock(mutex);
        if (error != EBUSY)
            return error;
        clock_gettime(AIC_LOCK_CLOCK, &until);
        until.tv_nsec += nanoseconds;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
    #ifdef __GLIBC__
        return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
    #else
        return pthread_mutex_timedlock(mutex, &until);
    #endif
    }
    """
    int EOWNERDEAD
    ctypedef struct pthread_mutex_t:
        pass
    uint64_t aic_hash_key(const char* key, const uint64_t* secret) noexcept nogil
    uint32_t aic_load(const uint32_t* source) noexcept nogil
    void aic_store(uint32_t* target, uint32_t value) noexcept nogil
    void aic_fence() noexcept nogil
    void aic_relax() noexcept nogil
    int aic_mutex_init(pthread_mutex_t* mutex) noexcept nogil
    int aic_mutex_lock(pthread_mutex_t* mutex, long nanoseconds) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t* mutex) noexcept nogil
    int pthread_mutex_consistent(pthread_mutex_t* mutex) noexcept nogil

AWAY_INDEX = AWAY

cdef enum:
    NONE = 0
    SPINS = 2_000
    # A writer holds the mutex for a few microseconds, or for as long as the system lets others run just then.
    # One that does not give it back was stopped (SIGSTOP, a debugger).
    LOCK_NANOSECONDS = 50_000_000

cdef struct Head:
    pthread_mutex_t mutex
    uint64_t epoch       # the latest
    uint64_t size        # slots in use
    uint64_t cached      # ... by routes to other nodes
    uint64_t hand        # where the next of them is looked for that has to go
    uint64_t secret[2]   # keys are chosen by strangers: the hash is keyed
    uint64_t limit       # of slots in use by routes of this node
    uint64_t cache_limit
    uint64_t writing     # 1 + index of the slot that is being written, or NONE
    Route before         # what it held
    uint64_t hole        # 1 + index of the slot that is to be removed, or NONE
    uint32_t closing     # grows when a gap begins to be closed, and when it is closed: odd in between


class TableFullError(Exception):
    """There is no room for another agent."""


class TableBusyError(Exception):
    """A process stopped in the middle of a change; it may go on."""


cdef const char* key_of(bytes did) except NULL:
    """Return where the key of a DID begins; the DID was decoded strictly before."""
    if PyBytes_GET_SIZE(did) != DID_SIZE:
        raise ValueError(f"a DID has {DID_SIZE} characters, not {len(did)}")
    return PyBytes_AS_STRING(did) + DID_PREFIX_SIZE


cdef class RoutingTable:
    """The routes of a node. The Python methods are for registration and tests.

    Args:
        routes: How many there may be at once.
        cached: How many of other nodes beside them.
    """

    def __cinit__(self, uint64_t routes=100_000, uint64_t cached=0):
        cdef uint64_t capacity = 1024
        if routes + cached > 1 << 26:
            raise ValueError(f"{routes + cached} routes are more than one machine can serve")
        while capacity < 2 * (routes + cached):
            capacity *= 2
        # The head takes a page of its own, so that every slot is one cache line.
        self.mapped = 4096 + capacity * sizeof(Route)
        self.head = <Head*>map_shared(self.mapped)
        self.slots = <Route*>(<char*>self.head + 4096)
        self.mask = capacity - 1
        if aic_mutex_init(&self.head.mutex):
            raise OSError("no process-shared robust mutex on this system")
        self.head.limit = routes
        self.head.cache_limit = cached
        # Sessions of several nodes meet in one table.
        self.head.epoch = int.from_bytes(os.urandom(4), "little") << 31
        # Odd: a factor of a multiplication should lose no bits.
        self.head.secret[0] = int.from_bytes(os.urandom(8), "little") | 1
        self.head.secret[1] = int.from_bytes(os.urandom(8), "little") | 1

    def __dealloc__(self):
        unmap_shared(self.head, self.mapped)

    # --- reading -------------------------------------------------------------------------------

    cdef bint find(self, const char* key, Route* out) noexcept nogil:
        cdef uint32_t closing
        cdef int spins = 0
        while True:
            closing = aic_load(&self.head.closing)
            if self.search(key, out):
                return True
            aic_fence()
            if not closing & 1 and aic_load(&self.head.closing) == closing:
                return False
            # A gap was being closed: it may have moved behind the search.
            spins += 1
            if spins < SPINS:
                aic_relax()
            elif spins > SPINS or not self.try_lock(LOCK_NANOSECONDS):
                return False  # the writer is stopped
            else:
                self.unlock()

    cdef bint search(self, const char* key, Route* out) noexcept nogil:
        cdef uint64_t index = aic_hash_key(key, self.head.secret) & self.mask
        cdef uint64_t start = index
        while self.read(index, out):
            if memcmp(out.key, key, KEY_SIZE) == 0:
                return True
            index = (index + 1) & self.mask
            if index == start:
                break
        return False

    cdef bint read(self, uint64_t index, Route* out) noexcept nogil:
        """Copy a slot as it stood at one instant; False if it is empty."""
        cdef Route* slot = &self.slots[index]
        cdef uint32_t sequence
        cdef int spins = 0
        while True:
            sequence = aic_load(&slot.sequence)
            if not sequence & 1:
                memcpy(out, slot, sizeof(Route))
                aic_fence()
                if aic_load(&slot.sequence) == sequence:
                    return out.state != EMPTY
            spins += 1
            if spins < SPINS:
                aic_relax()
            elif spins == SPINS and self.try_lock(LOCK_NANOSECONDS):
                # Its writer had died, and the slot is repaired; or it was only slow.
                self.unlock()
            elif spins > SPINS:
                # Its writer is stopped. For now there is no such route; whatever follows it can be found.
                memset(out, 0, sizeof(Route))
                return True

    # --- writing -------------------------------------------------------------------------------

    cdef bint try_lock(self, long nanoseconds) noexcept nogil:
        cdef int error = aic_mutex_lock(&self.head.mutex, nanoseconds)
        if error == EOWNERDEAD:
            self.repair()
            pthread_mutex_consistent(&self.head.mutex)
            return True
        return error == 0

    cdef int lock(self) except -1:
        if not self.try_lock(LOCK_NANOSECONDS):
            raise TableBusyError("the routing table is being changed by a process that does not go on")
        return 0

    cdef void unlock(self) noexcept nogil:
        pthread_mutex_unlock(&self.head.mutex)

    cdef void repair(self) noexcept nogil:
        """Undo what the owner of the mutex died in."""
        cdef uint64_t index, used = 0, cached = 0
        if self.head.writing != NONE:
            index = self.head.writing - 1
            aic_store(&self.slots[index].sequence, self.slots[index].sequence | 1)
            aic_fence()
            memcpy(self.slots[index].key, self.head.before.key, KEY_SIZE)
            self.slots[index].epoch = self.head.before.epoch
            self.slots[index].connection = self.head.before.connection
            self.slots[index].worker = self.head.before.worker
            self.slots[index].state = self.head.before.state
            aic_fence()
            aic_store(&self.slots[index].sequence, self.slots[index].sequence + 1)
            aic_fence()
            self.head.writing = NONE
        if self.head.hole != NONE:
            self.close_gap(self.head.hole - 1)
        self.head.closing = (self.head.closing + 1) & ~<uint32_t>1
        for index in range(self.mask + 1):
            if self.slots[index].state == USED:
                used += 1
                cached += self.slots[index].worker >= MAX_WORKERS
        self.head.size = used
        self.head.cached = cached

    cdef void put(self, uint64_t index, const Route* value) noexcept nogil:
        """Write a slot, whole for every reader. The mutex is held."""
        cdef Route* slot = &self.slots[index]
        memcpy(&self.head.before, slot, sizeof(Route))
        aic_fence()
        self.head.writing = index + 1
        aic_store(&slot.sequence, slot.sequence + 1)
        aic_fence()
        memcpy(slot.key, value.key, KEY_SIZE)
        slot.epoch = value.epoch
        slot.connection = value.connection
        slot.worker = value.worker
        slot.state = value.state
        aic_fence()
        aic_store(&slot.sequence, slot.sequence + 1)
        aic_fence()
        self.head.writing = NONE

    cdef uint64_t bind_key(
        self, const char* key, uint16_t worker, uint32_t connection, Route* replaced
    ) except 0:
        cdef uint64_t index, own
        cdef Route value
        self.lock()
        try:
            index = aic_hash_key(key, self.head.secret) & self.mask
            replaced.state = EMPTY
            while self.slots[index].state == USED:  # half of them are not
                if memcmp(self.slots[index].key, key, KEY_SIZE) == 0:
                    memcpy(replaced, &self.slots[index], sizeof(Route))
                    break
                index = (index + 1) & self.mask
            if replaced.state == EMPTY or replaced.worker >= MAX_WORKERS:
                own = self.head.size - self.head.cached
                if own >= self.head.limit:
                    raise TableFullError(f"{own} agents are registered or away; there is no room")
            self.head.epoch += 1
            memcpy(value.key, key, KEY_SIZE)
            value.epoch = self.head.epoch
            value.connection = connection
            value.worker = worker
            value.state = USED
            self.put(index, &value)
            if replaced.state == EMPTY:
                self.head.size += 1
            elif replaced.worker >= MAX_WORKERS:
                self.head.cached -= 1
            return value.epoch
        finally:
            self.unlock()

    cdef Route* own(self, const char* key, uint64_t epoch) noexcept nogil:
        """Return the slot of `key` if `epoch` owns it. The mutex is held."""
        cdef uint64_t index = aic_hash_key(key, self.head.secret) & self.mask
        while self.slots[index].state == USED:
            if memcmp(self.slots[index].key, key, KEY_SIZE) == 0:
                return &self.slots[index] if self.slots[index].epoch == epoch else NULL
            index = (index + 1) & self.mask
        return NULL

    cdef void clear(self, uint64_t index) noexcept nogil:
        """Remove a slot. The mutex is held."""
        self.head.cached -= self.slots[index].worker >= MAX_WORKERS
        aic_store(&self.head.closing, self.head.closing + 1)
        aic_fence()
        self.head.hole = index + 1
        self.close_gap(index)
        aic_fence()
        aic_store(&self.head.closing, self.head.closing + 1)
        self.head.size -= 1

    cdef void close_gap(self, uint64_t hole) noexcept nogil:
        """Move what was pushed past the hole back into it, and so on, until nothing is.

        Whoever finds that this was interrupted begins again at `head.hole`: what was moved already is then
        moved once more to where it is.
        """
        cdef Route nothing
        cdef uint64_t index = hole, home
        while True:
            index = (index + 1) & self.mask
            if self.slots[index].state == EMPTY:
                break
            home = aic_hash_key(self.slots[index].key, self.head.secret) & self.mask
            if ((index - home) & self.mask) >= ((index - hole) & self.mask):
                self.put(hole, &self.slots[index])
                hole = index
                self.head.hole = hole + 1
        memset(&nothing, 0, sizeof(Route))
        self.put(hole, &nothing)
        self.head.hole = NONE

    def bind(self, bytes did not None, uint16_t worker, uint32_t connection):
        """Give the route of a DID (ASCII) to a connection of a worker: the newest proven session wins.

        Returns:
            The epoch of the new session, and (worker, connection, epoch) of the one it replaced, or None.

        Raises:
            TableFullError: No room.
            TableBusyError: A process stopped while it held the lock.
        """
        cdef Route replaced
        cdef uint64_t epoch = self.bind_key(key_of(did), worker, connection, &replaced)
        if replaced.state == EMPTY:
            return epoch, None
        return epoch, (replaced.worker, replaced.connection, replaced.epoch)

    def cache(self, bytes did not None, uint16_t worker, uint32_t connection, uint64_t epoch):
        """Take note of an agent that is at another node, unless it is at this one."""
        cdef const char* key = key_of(did)
        cdef uint64_t index
        cdef Route value
        memcpy(value.key, key, KEY_SIZE)
        value.epoch = epoch
        value.connection = connection
        value.worker = worker
        value.state = USED
        self.lock()
        try:
            if self.head.cached >= self.head.cache_limit:
                self.evict()
            index = aic_hash_key(key, self.head.secret) & self.mask
            while self.slots[index].state == USED:
                if memcmp(self.slots[index].key, key, KEY_SIZE) == 0:
                    if self.slots[index].worker >= MAX_WORKERS:
                        self.put(index, &value)
                    return
                index = (index + 1) & self.mask
            if self.head.cached < self.head.cache_limit:
                self.put(index, &value)
                self.head.size += 1
                self.head.cached += 1
        finally:
            self.unlock()

    cdef void evict(self) noexcept nogil:
        """Remove one route to another node. The mutex is held."""
        cdef uint64_t _turn
        for _turn in range(self.mask + 1):
            self.head.hand = (self.head.hand + 1) & self.mask
            if self.slots[self.head.hand].state == USED and self.slots[self.head.hand].worker >= MAX_WORKERS:
                self.clear(self.head.hand)
                return

    def redirect(
        self, bytes did not None, uint64_t epoch, uint16_t worker, uint32_t connection, uint64_t new_epoch
    ):
        """Let the route that `epoch` owns lead to where its agent is now, at another node."""
        cdef Route* slot
        cdef Route value
        cdef const char* key = key_of(did)
        self.lock()
        try:
            slot = self.own(key, epoch)
            if slot == NULL:
                return
            memcpy(&value, slot, sizeof(Route))
            self.head.cached += value.worker < MAX_WORKERS
            value.epoch = new_epoch
            value.connection = connection
            value.worker = worker
            self.put(slot - self.slots, &value)
        finally:
            self.unlock()

    def set_away(self, bytes did not None, uint64_t epoch):
        """Mark the session as away if `epoch` still owns the route; tell whether it does."""
        cdef Route* slot
        cdef Route value
        cdef const char* key = key_of(did)
        self.lock()
        try:
            slot = self.own(key, epoch)
            if slot == NULL:
                return False
            memcpy(&value, slot, sizeof(Route))
            value.connection = AWAY
            self.put(slot - self.slots, &value)
            return True
        finally:
            self.unlock()

    def remove(self, bytes did not None, uint64_t epoch):
        """Remove the route if `epoch` still owns it; tell whether it did."""
        cdef Route* slot
        cdef const char* key = key_of(did)
        self.lock()
        try:
            slot = self.own(key, epoch)
            if slot == NULL:
                return False
            self.clear(slot - self.slots)
            return True
        finally:
            self.unlock()

    def purge(self, uint16_t worker, uint32_t count=1):
        """Remove the routes of a worker that is gone, or of `count` from it on; return their number."""
        cdef uint64_t before, removed = 0
        while True:
            before = removed
            removed += self.purge_once(worker, worker + count)
            # Others may have moved one to where the scan had been.
            if removed == before:
                return removed

    cdef uint64_t purge_once(self, uint32_t first, uint32_t end) except? 0:
        cdef uint64_t index
        cdef uint64_t removed = 0
        for index in range(self.mask + 1):
            # Removing one may move another into its place.
            while self.slots[index].state == USED and first <= self.slots[index].worker < end:
                self.lock()
                try:
                    if self.slots[index].state == USED and first <= self.slots[index].worker < end:
                        self.clear(index)
                        removed += 1
                finally:
                    self.unlock()
        return removed

    def forget_others(self):
        """Remove every route to another node."""
        if self.head.cached:
            self.purge(MAX_WORKERS, 0x10000 - MAX_WORKERS)

    def get(self, bytes did not None):
        """Return (worker, connection, epoch), or None."""
        cdef Route route
        if not self.find(key_of(did), &route):
            return None
        return route.worker, route.connection, route.epoch

    @property
    def cached(self):
        """Routes to other nodes."""
        return self.head.cached

    def __len__(self):
        return self.head.size - self.head.cached

    def check(self):
        """Count slots that are half written, that no search can reach, and the longest search; for tests."""
        cdef uint64_t index, torn = 0, lost = 0, used = 0, longest = 0
        cdef Route route
        cdef bint found
        cdef uint64_t home
        self.lock()
        self.unlock()
        for index in range(self.mask + 1):
            torn += self.slots[index].sequence & 1
            if self.slots[index].state == USED:
                used += 1
                home = aic_hash_key(self.slots[index].key, self.head.secret) & self.mask
                longest = max(longest, (index - home) & self.mask)
                found = self.find(self.slots[index].key, &route)
                lost += not (found and route.epoch == self.slots[index].epoch)
        return {"torn": torn, "lost": lost, "used": used, "longest": longest}
