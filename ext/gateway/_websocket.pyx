"""Frames of RFC 6455; see _websocket.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <string.h>

    /* RFC 6455 section 5.3. Eight bytes at a time; the compiler makes vectors of it. */
    static inline void aic_unmask(char *payload, size_t size, const char *key)
    {
        uint64_t key8, word;
        memcpy(&key8, key, 4);
        memcpy((char *)&key8 + 4, key, 4);
        size_t i = 0;
        for (; i + 8 <= size; i += 8) {
            memcpy(&word, payload + i, 8);
            word ^= key8;
            memcpy(payload + i, &word, 8);
        }
        for (; i < size; i++)
            payload[i] ^= key[i % 4];
    }
    """
    void aic_unmask(char* payload, size_t size, const char* key) noexcept nogil


cdef uint64_t big_endian(const uint8_t* data, int count) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(count):
        value = (value << 8) | data[i]
    return value


cdef FrameStatus read_frame(char* data, Py_ssize_t size, Py_ssize_t payload_max, Frame* out) noexcept nogil:
    cdef const uint8_t* byte = <const uint8_t*>data
    cdef uint64_t payload
    cdef Py_ssize_t header = 6
    out.total = 0
    if size < 2:
        return FRAME_PARTIAL
    out.fin = byte[0] >> 7
    out.rsv = (byte[0] >> 4) & 7
    out.opcode = byte[0] & 0xF
    payload = byte[1] & 0x7F
    # Opcodes 3 to 7 and 11 to 15 are reserved; a client's frames are masked (section 5.1).
    if not byte[1] & 0x80 or (0xF8F8 >> out.opcode) & 1:
        return FRAME_BROKEN
    if out.opcode >= CLOSE and (payload > CONTROL_PAYLOAD_MAX or not out.fin):
        return FRAME_BROKEN
    if payload == 126:
        header = 8
        if size < 4:
            return FRAME_PARTIAL
        payload = big_endian(byte + 2, 2)
        if payload < 126:  # the shortest form must be used (section 5.2)
            return FRAME_BROKEN
    elif payload == 127:
        header = 14
        if size < 10:
            return FRAME_PARTIAL
        payload = big_endian(byte + 2, 8)
        if payload < 65_536 or payload >> 63:
            return FRAME_BROKEN
    if payload > <uint64_t>payload_max:
        return FRAME_TOO_LARGE
    out.size = <Py_ssize_t>payload
    out.total = header + out.size
    if size < out.total:
        return FRAME_PARTIAL
    out.payload = data + header
    aic_unmask(out.payload, out.size, data + header - 4)
    return FRAME_WHOLE


cdef uint32_t write_header(char* out, Opcode opcode, Py_ssize_t size) noexcept nogil:
    cdef int i
    out[0] = <char>(0x80 | opcode)
    if size < 126:
        out[1] = <char>size
        return 2
    if size < 65_536:
        out[1] = 126
        out[2] = <char>(size >> 8)
        out[3] = <char>(size & 0xFF)
        return 4
    out[1] = 127
    for i in range(8):
        out[2 + i] = <char>((<uint64_t>size >> (56 - 8 * i)) & 0xFF)
    return 10


cdef uint32_t frame_size(const char* frame, uint32_t* header) noexcept nogil:
    cdef const uint8_t* byte = <const uint8_t*>frame
    cdef uint64_t size = byte[1]
    header[0] = 2
    if size == 126:
        size = big_endian(byte + 2, 2)
        header[0] = 4
    elif size == 127:
        size = big_endian(byte + 2, 8)
        header[0] = 10
    return <uint32_t>size + header[0]
