"""Timer wheel (Varghese and Lauck, 1987): arming and cancelling are a few pointer writes.

Activity does not touch a timer: it only stamps its connection, and the timer that
fires too early is armed again for the rest.
"""

from libc.stdint cimport uint32_t

cdef class TimerWheel:
    """Deadlines in ticks since the worker started."""

    def __cinit__(self):
        cdef int i
        self.now = 0
        for i in range(WHEEL_SLOTS):
            self.slots[i].prev = self.slots[i].next = &self.slots[i]

    cdef void arm(self, Timer* timer, uint32_t due) noexcept nogil:
        cdef uint32_t ahead
        cdef Timer* head
        if timer.next != NULL:
            self.cancel(timer)
        if due <= self.now:
            due = self.now + 1
        timer.due = due
        ahead = due - self.now
        if ahead >= WHEEL_SLOTS:
            ahead = WHEEL_SLOTS - 1
        head = &self.slots[(self.now + ahead) % WHEEL_SLOTS]
        timer.prev = head.prev
        timer.next = head
        head.prev.next = timer
        head.prev = timer

    cdef void cancel(self, Timer* timer) noexcept nogil:
        if timer.next != NULL:
            timer.prev.next = timer.next
            timer.next.prev = timer.prev
            timer.prev = timer.next = NULL

    cdef int advance(self, uint32_t tick, Fire fire) except -1:
        cdef Timer* head
        cdef Timer* timer
        while self.now < tick:
            self.now += 1
            head = &self.slots[self.now % WHEEL_SLOTS]
            while head.next != head:
                timer = head.next
                self.cancel(timer)
                if timer.due > self.now:
                    self.arm(timer, timer.due)
                else:
                    fire(timer.owner)
        return 0
