"""Read one IoAP envelope strictly, without a Python object and without the GIL.

The gateway routes by what stands here and the receiver reads the same bytes with orjson, so the two
must never disagree: whatever a JSON parser could read in two ways is refused, not interpreted.
"""


# Everything larger is refused: one SDP with 100 candidates is 12 KiB.
cdef enum:
    MESSAGE_MAX_BYTES = 65_536
    # What is larger than MESSAGE_MAX_BYTES but not than this is still searched for its id, so that
    # the refusal can name it.
    SCAN_MAX_BYTES = 262_144
    # The envelope object is level 1, so payload and ext are level 2.
    DEPTH_MAX = 32


# The `type` of an envelope. DISCOVER and PRESENCE pass between an agent and its gateway only.
cdef enum MessageType:
    TYPE_NONE = 0           # not known: absent, malformed, given twice
    REGISTER
    UNREGISTER
    OFFER
    ANSWER
    ICE_CANDIDATE
    INTENT
    EXEC_REQUEST
    EXEC_RESPONSE
    ERROR
    PING
    PONG
    DISCOVER
    PRESENCE


# The members that an envelope may have.
cdef enum EnvelopeField:
    FIELD_NONE = 0
    FIELD_ID
    FIELD_TIMESTAMP
    FIELD_FROM
    FIELD_TO
    FIELD_TYPE
    FIELD_PAYLOAD
    FIELD_VERSION
    FIELD_CORRELATION_ID    # this and the following may be absent
    FIELD_SIGNATURE
    FIELD_EXT


# Why a message is refused. The names that go on the wire (STATUS_NAMES) are stable, the numbers
# are not.
cdef enum ScanStatus:
    OK = 0
    TOO_LARGE               # over MESSAGE_MAX_BYTES; wins over every other reason
    # These end the scan; what had been read before them is kept.
    INVALID_UTF8            # somewhere in the message: RFC 6455 section 8.1 wants close code 1007
    NOT_JSON                # not one RFC 8259 value with nothing but white space around it
    NOT_OBJECT              # one value, but no object
    # These do not end the scan, so that the id is found behind them. The first one is reported.
    TOO_DEEP                # over DEPTH_MAX
    LONE_SURROGATE          # `\ud800` without its other half: grammatical, but no Unicode text
    NUMBER_OUT_OF_RANGE     # overflows a double, so orjson refuses it
    DUPLICATE_KEY           # of the envelope; parsers differ in which one they keep
    ESCAPED_KEY             # of the envelope, as in `"fr\u006fm"`
    ESCAPED_VALUE           # in id, correlation_id, from, to, type or version
    # These may be the fault of a version that the gateway does not speak: UNSUPPORTED_VERSION takes
    # their place wherever it stands in the message.
    UNKNOWN_FIELD
    MISSING_FIELD
    WRONG_TYPE              # of JSON: a string where an object belongs
    BAD_ID                  # id or correlation_id is not a UUID of RFC 9562
    BAD_DID                 # from or to cannot be an Ed25519 did:key
    UNKNOWN_TYPE
    UNSUPPORTED_VERSION


# How many members the enums have, to size a table or a row of counters by them.
cdef enum:
    TYPE_COUNT = PRESENCE + 1
    FIELD_COUNT = FIELD_EXT + 1
    STATUS_COUNT = UNSUPPORTED_VERSION + 1


# Bytes within the scanned message, without the quotes around them. Not owned: gone with the message.
cdef struct Span:
    const char* data        # NULL where there is none
    Py_ssize_t size         # in bytes


# What a scan found. A span is set, and `type` known, only where the value is well formed and, as far as
# the message was read, the only one of its name. That holds for refused messages too, so that a refusal
# can name the id it is about.
cdef struct Envelope:
    MessageType type
    EnvelopeField field     # at fault, or in which the fault lies; FIELD_NONE where it lies in none
    Span id                 # 36 bytes
    Span correlation_id     # 36 bytes; NULL where it is absent or null
    Span from_              # 56 bytes; begins "did:key:z6Mk", the rest is base58btc but not decoded
    Span to                 # likewise


# Scan `data` as one envelope into `out`, every field of which is written whatever the outcome.
# Nothing is read at or after `data + size`; no terminator is needed. The spans in `out` point into
# `data`.
cdef ScanStatus scan_envelope(const char* data, Py_ssize_t size, Envelope* out) noexcept nogil

# Say whether `data` is UTF-8 (RFC 3629: no overlong form, no surrogate, nothing over U+10FFFF).
cdef bint is_utf8(const char* data, Py_ssize_t size) noexcept nogil


cdef class Scan:
    """An Envelope as Python objects, for tests and benchmarks."""

    cdef readonly str status
    cdef readonly str field
    cdef readonly str type
    cdef readonly str id
    cdef readonly str correlation_id
    cdef readonly str from_
    cdef readonly str to
