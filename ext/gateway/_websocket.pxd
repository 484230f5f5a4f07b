"""Frames of RFC 6455 as a server reads and writes them, without I/O, objects or the GIL."""

from libc.stdint cimport uint8_t, uint32_t

# Section 5.2. Everything from 8 on is a control frame.
cdef enum Opcode:
    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10

cdef enum:
    HEADER_MAX = 10             # of a frame that a server sends: they are not masked
    CONTROL_PAYLOAD_MAX = 125   # section 5.5

cdef enum FrameStatus:
    FRAME_WHOLE
    FRAME_PARTIAL    # more bytes are needed
    FRAME_BROKEN     # breaks the protocol: where the next frame begins is unknown
    FRAME_TOO_LARGE

cdef struct Frame:
    char* payload    # within the bytes that were read; unmasked in place
    Py_ssize_t size  # of the payload, in bytes
    Py_ssize_t total  # of the frame, in bytes; 0 while its header is not complete
    uint8_t opcode
    uint8_t rsv      # the three reserved bits
    bint fin

# Read the frame at the start of `data`, and unmask its payload if all of it is there.
cdef FrameStatus read_frame(char* data, Py_ssize_t size, Py_ssize_t payload_max, Frame* out) noexcept nogil
# Write the header of an unfragmented, unmasked frame; return its size.
cdef uint32_t write_header(char* out, Opcode opcode, Py_ssize_t size) noexcept nogil
# Return the size of a frame that `write_header` began, and that of its header.
cdef uint32_t frame_size(const char* frame, uint32_t* header) noexcept nogil
