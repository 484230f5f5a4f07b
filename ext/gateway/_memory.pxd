"""Memory that all processes forked later share, full of zeros. Pages that nobody touches cost nothing."""

cdef void* map_shared(size_t size) except NULL
cdef void unmap_shared(void* memory, size_t size) noexcept
