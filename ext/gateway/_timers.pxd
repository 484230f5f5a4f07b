"""Timer wheel: one per worker, for every deadline of every connection."""

from libc.stdint cimport uint32_t

cdef enum:
    TICKS_PER_SECOND = 10
    WHEEL_SLOTS = 512  # 51.2 s ahead; what is due later is looked at once on the way

cdef struct Timer:
    # Embedded in its owner, which cancels it before it goes away.
    Timer* prev
    Timer* next  # NULL: not armed
    uint32_t due  # tick
    void* owner

ctypedef int (*Fire)(void* owner) except -1

cdef class TimerWheel:
    cdef:
        readonly uint32_t now  # tick; stamps of activity are copies of it
        Timer slots[WHEEL_SLOTS]  # heads of circular lists

    cdef void arm(self, Timer* timer, uint32_t due) noexcept nogil
    cdef void cancel(self, Timer* timer) noexcept nogil
    # Move to `tick`, calling `fire` with the owner of each timer that is due.
    cdef int advance(self, uint32_t tick, Fire fire) except -1
