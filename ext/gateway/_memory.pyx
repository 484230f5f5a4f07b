"""Shared memory; see _memory.pxd."""

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t size)
    void* MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_ANONYMOUS, MAP_NORESERVE


cdef void* map_shared(size_t size) except NULL:
    cdef void* memory = mmap(
        NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
    )
    if memory == MAP_FAILED:
        raise MemoryError(f"{size} bytes of shared memory")
    return memory


cdef void unmap_shared(void* memory, size_t size) noexcept:
    if memory != NULL:
        munmap(memory, size)
