"""Read one IoAP envelope strictly, without a Python object and without the GIL.

One pass over the message, no recursion, no copy. Three layers: strings, numbers and nesting by
RFC 8259; above them the members of the envelope; above them the verdict. A fault of grammar ends the
scan. A fault of meaning is noted, the first one only, and the scan goes on: it is the id that the
ERROR to the sender needs, and it may stand last.

What is accepted here is accepted by orjson with the same `type`, `from`, `to` and `id`
(tests/gateway/test_frames_oracle.py holds the two against each other).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset


cdef extern from "_scan.h" nogil:
    const char* SCAN_PATH
    const uint8_t[256] CLASS_OF
    enum:
        CLASS_HEX
        CLASS_ESCAPE
    uint32_t hex_value(uint8_t digit) noexcept
    bint same_bytes(const uint8_t* a, const char* b, size_t size) noexcept
    bint same_start(const uint8_t* a, const uint8_t* b, unsigned size) noexcept
    bint is_uuid(const uint8_t* p) noexcept
    bint is_base58_48(const uint8_t* p) noexcept
    const uint8_t* skip_plain(const uint8_t* p, const uint8_t* begin, const uint8_t* end) noexcept
    const uint8_t* skip_lines(const uint8_t* p, const uint8_t* begin, const uint8_t* end) noexcept


cdef enum:
    # How many open containers a refused message is followed through, 64 to a word. orjson reads no
    # deeper either; what nests more ends the scan, and an id behind it is not found.
    LEVELS_MAX = 1024
    LEVEL_WORDS = LEVELS_MAX // 64
    ID_BYTES = 36           # 8-4-4-4-12 hexadecimal digits
    DID_BYTES = 56          # "did:key:", "z", base58btc of 34 bytes
    DID_PREFIX_BYTES = 12   # "did:key:z6Mk": the two bytes of ed25519-pub make the "6Mk"
    DID_SCHEME_BYTES = 8    # "did:key:"; what follows is base58btc, its "z" too
    KEY_MAX_BYTES = 14      # correlation_id
    KEY_BLOCK_BYTES = 16    # the same with the quote and the colon behind it
    KEY_SLOTS = 32          # a power of two, large enough that key_slot puts no two names into one
    DOUBLE_MAX_EXPONENT = 308
    # The digits of a number count in exponents, so every exponent beyond the length of a message is
    # as good as any other.
    EXPONENT_MAX = 4 * SCAN_MAX_BYTES

# The fields that an envelope must have, as a set of bits: the enum has them first.
cdef enum:
    REQUIRED_FIELDS = (1 << FIELD_CORRELATION_ID) - (1 << FIELD_ID)

# 2^1024 - 2^970, halfway from the largest double to what would be the next: from here on rounding to
# nearest, ties to even, gives infinity (IEEE 754-2019 section 4.3.1), and orjson refuses it.
cdef const char* OVERFLOW_DIGITS = (
    b"17976931348623158079372897140530341507993413271003782693617377898044496829276475094664901797758720"
    b"70963302864166928879109465555478519404026306574886715058206819089020007083836762738548458177115317"
    b"64475730270069855571366959622842914819860834936475292719074168444365510704342711559699508093042880"
    b"177904174497792"
)

cdef const char *STATUS_NAME_OF[STATUS_COUNT]
STATUS_NAME_OF[<int> OK] = b"ok"
STATUS_NAME_OF[<int> TOO_LARGE] = b"too_large"
STATUS_NAME_OF[<int> INVALID_UTF8] = b"invalid_utf8"
STATUS_NAME_OF[<int> NOT_JSON] = b"not_json"
STATUS_NAME_OF[<int> NOT_OBJECT] = b"not_object"
STATUS_NAME_OF[<int> TOO_DEEP] = b"too_deep"
STATUS_NAME_OF[<int> LONE_SURROGATE] = b"lone_surrogate"
STATUS_NAME_OF[<int> NUMBER_OUT_OF_RANGE] = b"number_out_of_range"
STATUS_NAME_OF[<int> DUPLICATE_KEY] = b"duplicate_key"
STATUS_NAME_OF[<int> ESCAPED_KEY] = b"escaped_key"
STATUS_NAME_OF[<int> ESCAPED_VALUE] = b"escaped_value"
STATUS_NAME_OF[<int> UNKNOWN_FIELD] = b"unknown_field"
STATUS_NAME_OF[<int> MISSING_FIELD] = b"missing_field"
STATUS_NAME_OF[<int> WRONG_TYPE] = b"wrong_type"
STATUS_NAME_OF[<int> BAD_ID] = b"bad_id"
STATUS_NAME_OF[<int> BAD_DID] = b"bad_did"
STATUS_NAME_OF[<int> UNKNOWN_TYPE] = b"unknown_type"
STATUS_NAME_OF[<int> UNSUPPORTED_VERSION] = b"unsupported_version"

cdef const char *FIELD_NAME_OF[FIELD_COUNT]
FIELD_NAME_OF[<int> FIELD_NONE] = NULL
FIELD_NAME_OF[<int> FIELD_ID] = b"id"
FIELD_NAME_OF[<int> FIELD_TIMESTAMP] = b"timestamp"
FIELD_NAME_OF[<int> FIELD_FROM] = b"from"
FIELD_NAME_OF[<int> FIELD_TO] = b"to"
FIELD_NAME_OF[<int> FIELD_TYPE] = b"type"
FIELD_NAME_OF[<int> FIELD_PAYLOAD] = b"payload"
FIELD_NAME_OF[<int> FIELD_VERSION] = b"version"
FIELD_NAME_OF[<int> FIELD_CORRELATION_ID] = b"correlation_id"
FIELD_NAME_OF[<int> FIELD_SIGNATURE] = b"signature"
FIELD_NAME_OF[<int> FIELD_EXT] = b"ext"

cdef const char *TYPE_NAME_OF[TYPE_COUNT]
TYPE_NAME_OF[<int> TYPE_NONE] = NULL
TYPE_NAME_OF[<int> REGISTER] = b"REGISTER"
TYPE_NAME_OF[<int> UNREGISTER] = b"UNREGISTER"
TYPE_NAME_OF[<int> OFFER] = b"OFFER"
TYPE_NAME_OF[<int> ANSWER] = b"ANSWER"
TYPE_NAME_OF[<int> ICE_CANDIDATE] = b"ICE_CANDIDATE"
TYPE_NAME_OF[<int> INTENT] = b"INTENT"
TYPE_NAME_OF[<int> EXEC_REQUEST] = b"EXEC_REQUEST"
TYPE_NAME_OF[<int> EXEC_RESPONSE] = b"EXEC_RESPONSE"
TYPE_NAME_OF[<int> ERROR] = b"ERROR"
TYPE_NAME_OF[<int> PING] = b"PING"
TYPE_NAME_OF[<int> PONG] = b"PONG"
TYPE_NAME_OF[<int> DISCOVER] = b"DISCOVER"
TYPE_NAME_OF[<int> PRESENCE] = b"PRESENCE"


# A member's name as it is mostly written, so that one comparison finds the field and where its value begins.
cdef struct KnownKey:
    uint8_t[KEY_BLOCK_BYTES] text   # with the quote and the colon behind it
    unsigned size                   # of that, in bytes; 0 in a slot that no name is in
    EnvelopeField field             # FIELD_NONE in such a slot

cdef KnownKey[KEY_SLOTS] KNOWN_KEYS


cdef inline Py_ssize_t key_slot(const uint8_t* key) noexcept nogil:
    """Return where in KNOWN_KEYS the name is that begins with the two bytes at `key`."""
    return (4 * key[0] + key[1]) & (KEY_SLOTS - 1)


cdef int fill_known_keys() except -1:
    cdef KnownKey* known
    cdef bytes text
    cdef int i
    memset(KNOWN_KEYS, 0, sizeof(KNOWN_KEYS))
    for i in range(<int> FIELD_ID, <int> FIELD_COUNT):
        text = <bytes> FIELD_NAME_OF[i] + b'":'
        known = &KNOWN_KEYS[key_slot(text)]
        assert known.size == 0, "two names in one slot"
        known.size = <unsigned> len(text)
        known.field = <EnvelopeField> i
        memcpy(known.text, <const char*> text, known.size)
    return 0


fill_known_keys()


cdef str text_of_name(const char* name):
    return None if name is NULL else name.decode("ascii")


# Which path through _scan.h was built: "avx2" (where the machine has it), "sse2" or "portable".
INSTRUCTIONS = (<bytes>SCAN_PATH).decode()

# By number, as the counters and the ERROR of a refusal want them.
STATUS_NAMES = tuple([text_of_name(STATUS_NAME_OF[i]) for i in range(STATUS_COUNT)])
FIELD_NAMES = tuple([text_of_name(FIELD_NAME_OF[i]) for i in range(FIELD_COUNT)])
TYPE_NAMES = tuple([text_of_name(TYPE_NAME_OF[i]) for i in range(TYPE_COUNT)])


# Where a scan stands. The position itself is passed from function to function, so that it stays in a
# register; NULL for a position says that the scan has ended and `status` why.
cdef struct Scanner:
    const uint8_t* begin
    const uint8_t* end
    ScanStatus status           # the verdict so far
    EnvelopeField field         # where the verdict was made
    EnvelopeField current       # the member being read
    bint escaped                # the last string that skip_text read had an escape


cdef inline void note(Scanner* s, ScanStatus reason, EnvelopeField field) noexcept nogil:
    """Refuse the message, but read on. The first reason stands.

    A sender that speaks another version may well send fields, types and ids that this one does not
    know. To be told of the version is of use to it, and to be told of one of them is not.
    """
    if s.status == OK or (reason == UNSUPPORTED_VERSION and s.status >= UNKNOWN_FIELD):
        s.status = reason
        s.field = field


cdef const uint8_t* stop(Scanner* s, ScanStatus reason) noexcept nogil:
    """Refuse the message for its grammar, whatever was noted before, and read no further."""
    s.status = reason
    s.field = s.current
    return NULL


cdef inline const uint8_t* skip_space(const uint8_t* p, const uint8_t* end) noexcept nogil:
    """Return the first byte from `p` on that is not white space, or `end` (RFC 8259 section 2)."""
    while p != end and p[0] <= c' ' and (p[0] == c' ' or p[0] == c'\n' or p[0] == c'\r' or p[0] == c'\t'):
        p += 1
    return p


cdef const uint8_t* skip_multibyte(const uint8_t* p, const uint8_t* end) noexcept nogil:
    """Return what follows the UTF-8 sequences at `p`, none of them ASCII, or NULL if one is malformed.

    The ranges are those of RFC 3629 section 4; only the second byte has a range of its own.
    """
    cdef uint8_t lead, low, high
    cdef Py_ssize_t size, i
    while p != end and p[0] >= 0x80:
        lead = p[0]
        low = 0x80
        high = 0xbf
        if lead < 0xc2:
            return NULL             # a continuation byte, or the overlong forms of ASCII
        elif lead < 0xe0:
            size = 2
        elif lead < 0xf0:
            size = 3
            if lead == 0xe0:
                low = 0xa0          # below: overlong
            elif lead == 0xed:
                high = 0x9f         # above: surrogates
        elif lead < 0xf5:
            size = 4
            if lead == 0xf0:
                low = 0x90          # below: overlong
            elif lead == 0xf4:
                high = 0x8f         # above: over U+10FFFF
        else:
            return NULL
        if end - p < size or p[1] < low or p[1] > high:
            return NULL
        for i in range(2, size):
            if p[i] & 0xc0 != 0x80:
                return NULL
        p += size
    return p


cdef bint is_utf8(const char* data, Py_ssize_t size) noexcept nogil:
    cdef const uint8_t* p = <const uint8_t*> data
    cdef const uint8_t* begin = p
    cdef const uint8_t* end = p + size
    while p != end:
        p = skip_plain(p, begin, end)
        if p == end:
            break
        if p[0] < 0x80:
            p += 1
            continue
        p = skip_multibyte(p, end)
        if p is NULL:
            return False
    return True


cdef int code_unit(const uint8_t* p, const uint8_t* end) noexcept nogil:
    """Return the UTF-16 code unit of the escape `\\uXXXX` at `p`, or -1 if there is none."""
    cdef Py_ssize_t i
    cdef int value = 0
    if end - p < 6 or p[0] != c'\\' or p[1] != c'u':
        return -1
    for i in range(2, 6):
        if not CLASS_OF[p[i]] & CLASS_HEX:
            return -1
        value = value << 4 | <int> hex_value(p[i])
    return value


cdef const uint8_t* skip_escapes(const uint8_t* p, Scanner* s) noexcept nogil:
    """Return what follows the escapes at `p`, which is at a backslash (RFC 8259 section 7)."""
    cdef const uint8_t* end = s.end
    cdef int unit
    s.escaped = True
    while p != end and p[0] == c'\\':
        if end - p < 2:
            return stop(s, NOT_JSON)
        if CLASS_OF[p[1]] & CLASS_ESCAPE:
            p += 2
            continue
        unit = code_unit(p, end)
        if unit < 0:
            return stop(s, NOT_JSON)
        p += 6
        if unit & 0xfc00 == 0xd800:
            unit = code_unit(p, end)
            if unit & 0xfc00 == 0xdc00:
                p += 6
            else:
                note(s, LONE_SURROGATE, s.current)
        elif unit & 0xfc00 == 0xdc00:
            note(s, LONE_SURROGATE, s.current)
    return p


cdef const uint8_t* skip_special(const uint8_t* p, Scanner* s) noexcept nogil:
    """Return what follows the bytes at `p`, within a string, that are not plain and not its end."""
    cdef const uint8_t* end = s.end
    if p == end:
        return stop(s, NOT_JSON)
    if p[0] == c'\\':
        return skip_escapes(p, s)
    if p[0] < 0x80:
        return stop(s, NOT_JSON)        # a control character
    p = skip_multibyte(p, end)
    if p is NULL:
        return stop(s, INVALID_UTF8)
    return p


cdef const uint8_t* skip_text(const uint8_t* p, Scanner* s) noexcept nogil:
    """Return what follows the string whose first byte after the opening quote is at `p`.

    Tell by `s.escaped` whether it is written as it reads.
    """
    s.escaped = False
    while True:
        p = skip_plain(p, s.begin, s.end)
        if p != s.end and p[0] == c'"':
            return p + 1
        p = skip_special(p, s)
        if p is NULL:
            return NULL


cdef const uint8_t* skip_string(const uint8_t* p, Scanner* s) noexcept nogil:
    """Return the same as skip_text, sooner, but leave `s.escaped` without a meaning."""
    while True:
        p = skip_lines(p, s.begin, s.end)
        if p != s.end and p[0] == c'"':
            return p + 1
        p = skip_special(p, s)
        if p is NULL:
            return NULL


cdef bint overflows(const uint8_t* p, const uint8_t* end, Py_ssize_t magnitude) noexcept nogil:
    """Say whether the decimal digits from `p` to `end` are beyond the largest double.

    Args:
        p: the first digit; the digits may have a point among them.
        end: what follows the last digit.
        magnitude: the power of ten that the first digit counts.
    """
    cdef Py_ssize_t i
    cdef uint8_t digit
    while p != end and (p[0] == c'0' or p[0] == c'.'):
        if p[0] == c'0':
            magnitude -= 1
        p += 1
    if p == end or magnitude < DOUBLE_MAX_EXPONENT:
        return False
    if magnitude > DOUBLE_MAX_EXPONENT:
        return True
    for i in range(DOUBLE_MAX_EXPONENT + 1):
        if p != end and p[0] == c'.':
            p += 1
        digit = c'0'
        if p != end:
            digit = p[0]
            p += 1
        if digit != <uint8_t> OVERFLOW_DIGITS[i]:
            return digit > <uint8_t> OVERFLOW_DIGITS[i]
    return True


cdef inline bint is_digit(const uint8_t* p, const uint8_t* end) noexcept nogil:
    return p != end and c'0' <= p[0] <= c'9'


cdef const uint8_t* skip_number(const uint8_t* p, Scanner* s) noexcept nogil:
    """Return what follows the number at `p`, which is at a minus or a digit (RFC 8259 section 6).

    Integers of any length are numbers; a reader makes doubles of the long ones.
    """
    cdef const uint8_t* end = s.end
    cdef const uint8_t* first
    cdef const uint8_t* mantissa_end
    cdef Py_ssize_t integer_digits, exponent = 0
    cdef bint negative = False
    if p[0] == c'-':
        p += 1
    first = p
    if not is_digit(p, end):
        return stop(s, NOT_JSON)
    if p[0] == c'0':
        p += 1                          # nothing may follow a leading zero
    else:
        while is_digit(p, end):
            p += 1
    integer_digits = p - first
    if p != end and p[0] == c'.':
        p += 1
        if not is_digit(p, end):
            return stop(s, NOT_JSON)
        while is_digit(p, end):
            p += 1
    mantissa_end = p
    if p != end and (p[0] == c'e' or p[0] == c'E'):
        p += 1
        if p != end and (p[0] == c'+' or p[0] == c'-'):
            negative = p[0] == c'-'
            p += 1
        if not is_digit(p, end):
            return stop(s, NOT_JSON)
        while is_digit(p, end):
            if exponent < EXPONENT_MAX:
                exponent = exponent * 10 + (p[0] - c'0')
            p += 1
        if negative:
            exponent = -exponent
    if integer_digits + exponent > DOUBLE_MAX_EXPONENT:
        if overflows(first, mantissa_end, integer_digits - 1 + exponent):
            note(s, NUMBER_OUT_OF_RANGE, s.current)
    return p


cdef const uint8_t* skip_scalar(const uint8_t* p, Scanner* s) noexcept nogil:
    """Return what follows the number or literal at `p` (RFC 8259 section 3)."""
    cdef Py_ssize_t left = s.end - p
    if left > 0:
        if p[0] == c'-' or c'0' <= p[0] <= c'9':
            return skip_number(p, s)
        if left >= 4 and (memcmp(p, b"null", 4) == 0 or memcmp(p, b"true", 4) == 0):
            return p + 4
        if left >= 5 and memcmp(p, b"false", 5) == 0:
            return p + 5
    return stop(s, NOT_JSON)


cdef const uint8_t* skip_key(const uint8_t* p, Scanner* s) noexcept nogil:
    """Return where the value begins of the member of an object that begins at `p`."""
    if p == s.end or p[0] != c'"':
        return stop(s, NOT_JSON)
    p = skip_string(p + 1, s)
    if p is NULL:
        return NULL
    p = skip_space(p, s.end)
    if p == s.end or p[0] != c':':
        return stop(s, NOT_JSON)
    return skip_space(p + 1, s.end)


cdef const uint8_t* skip_value(const uint8_t* p, Scanner* s, Py_ssize_t outside) noexcept nogil:
    """Return what follows the value at `p`, any value, or NULL where it is not JSON.

    Args:
        p: where the value begins; may be the end of the message.
        s: the scan.
        outside: how many containers the value is in.
    """
    # One bit per open container, set for an object. A word is cleared when its first one opens.
    cdef uint64_t[LEVEL_WORDS] objects
    cdef const uint8_t* end = s.end
    cdef Py_ssize_t open = 0
    cdef bint in_object = False
    cdef uint8_t opening
    while True:
        # A value begins.
        if p != end and p[0] == c'"':
            p = skip_string(p + 1, s)
            if p is NULL:
                return NULL
        elif p != end and (p[0] == c'{' or p[0] == c'['):
            opening = p[0]
            if outside + open >= DEPTH_MAX:
                note(s, TOO_DEEP, s.current)
                if open == LEVELS_MAX:
                    return NULL
            p = skip_space(p + 1, end)
            if p != end and p[0] == opening + 2:
                # Closed at once: ASCII has ']' and '}' two after '[' and '{'.
                p += 1
            else:
                in_object = opening == c'{'
                if open & 63 == 0:
                    objects[open >> 6] = 0
                objects[open >> 6] &= ~(<uint64_t> 1 << (open & 63))
                objects[open >> 6] |= <uint64_t> in_object << (open & 63)
                open += 1
                if in_object:
                    p = skip_key(p, s)
                    if p is NULL:
                        return NULL
                continue
        else:
            p = skip_scalar(p, s)
            if p is NULL:
                return NULL
        # A value has ended, and with it perhaps the containers that it was the last one of.
        while open > 0:
            p = skip_space(p, end)
            if p == end:
                return stop(s, NOT_JSON)
            if p[0] == c',':
                p = skip_space(p + 1, end)
                if in_object:
                    p = skip_key(p, s)
                    if p is NULL:
                        return NULL
                break
            if p[0] != (c'}' if in_object else c']'):
                return stop(s, NOT_JSON)
            p += 1
            open -= 1
            if open > 0:
                in_object = objects[(open - 1) >> 6] >> ((open - 1) & 63) & 1
        else:
            return p


cdef EnvelopeField field_of(const uint8_t* key, Py_ssize_t size) noexcept nogil:
    """Return the field of that name, or FIELD_NONE."""
    if size == 2:
        if same_bytes(key, b"id", 2):
            return FIELD_ID
        if same_bytes(key, b"to", 2):
            return FIELD_TO
    elif size == 3:
        if same_bytes(key, b"ext", 3):
            return FIELD_EXT
    elif size == 4:
        if same_bytes(key, b"from", 4):
            return FIELD_FROM
        if same_bytes(key, b"type", 4):
            return FIELD_TYPE
    elif size == 7:
        if same_bytes(key, b"payload", 7):
            return FIELD_PAYLOAD
        if same_bytes(key, b"version", 7):
            return FIELD_VERSION
    elif size == 9:
        if same_bytes(key, b"timestamp", 9):
            return FIELD_TIMESTAMP
        if same_bytes(key, b"signature", 9):
            return FIELD_SIGNATURE
    elif size == 14:
        if same_bytes(key, b"correlation_id", 14):
            return FIELD_CORRELATION_ID
    return FIELD_NONE


cdef EnvelopeField escaped_field_of(const uint8_t* p, const uint8_t* end) noexcept nogil:
    """Return the field whose name is written from `p` to `end` with escapes, or FIELD_NONE.

    The names have letters and `_` only, so of the escapes no other than `\\uXXXX` can spell them.
    """
    cdef uint8_t[KEY_MAX_BYTES] key
    cdef Py_ssize_t size = 0
    cdef int unit
    while p != end:
        unit = p[0]
        if unit == c'\\':
            unit = code_unit(p, end)
            p += 5
        if size == KEY_MAX_BYTES or unit < 0 or unit >= 0x80:
            return FIELD_NONE
        key[size] = <uint8_t> unit
        size += 1
        p += 1
    return field_of(key, size)


cdef MessageType type_of(const uint8_t* name, Py_ssize_t size) noexcept nogil:
    """Return the message type of that name, or TYPE_NONE."""
    if size == 4:
        if same_bytes(name, b"PING", 4):
            return PING
        if same_bytes(name, b"PONG", 4):
            return PONG
    elif size == 5:
        if same_bytes(name, b"OFFER", 5):
            return OFFER
        if same_bytes(name, b"ERROR", 5):
            return ERROR
    elif size == 6:
        if same_bytes(name, b"ANSWER", 6):
            return ANSWER
        if same_bytes(name, b"INTENT", 6):
            return INTENT
    elif size == 8:
        if same_bytes(name, b"REGISTER", 8):
            return REGISTER
        if same_bytes(name, b"DISCOVER", 8):
            return DISCOVER
        if same_bytes(name, b"PRESENCE", 8):
            return PRESENCE
    elif size == 10:
        if same_bytes(name, b"UNREGISTER", 10):
            return UNREGISTER
    elif size == 12:
        if same_bytes(name, b"EXEC_REQUEST", 12):
            return EXEC_REQUEST
    elif size == 13:
        if same_bytes(name, b"ICE_CANDIDATE", 13):
            return ICE_CANDIDATE
        if same_bytes(name, b"EXEC_RESPONSE", 13):
            return EXEC_RESPONSE
    return TYPE_NONE


cdef inline const uint8_t* scan_id(const uint8_t* text, Scanner* s, Span* out) noexcept nogil:
    """Return what follows the UUID whose first digit is at `text`, or NULL if there is none.

    It has the form of RFC 9562 section 4; no version or variant is asked for.
    """
    if s.end - text <= ID_BYTES or text[ID_BYTES] != c'"' or not is_uuid(text):
        return NULL
    out.data = <const char*> text
    out.size = ID_BYTES
    return text + ID_BYTES + 1


cdef inline const uint8_t* scan_did(const uint8_t* text, Scanner* s, Span* out) noexcept nogil:
    """Return what follows the DID whose first byte is at `text`, or NULL if there is none.

    It can be the did:key of an Ed25519 key; what is decoded at registration is.
    """
    if (
        s.end - text <= DID_BYTES
        or text[DID_BYTES] != c'"'
        or not same_bytes(text, b"did:key:z6Mk", DID_PREFIX_BYTES)
        or not is_base58_48(text + DID_SCHEME_BYTES)
    ):
        return NULL
    out.data = <const char*> text
    out.size = DID_BYTES
    return text + DID_BYTES + 1


cdef void check(
    EnvelopeField field, const uint8_t* text, Py_ssize_t size, Scanner* s, Envelope* out
) noexcept nogil:
    """Check the text of a string member, which has no escapes and is no id and no DID."""
    if field == FIELD_TYPE:
        out.type = type_of(text, size)
        if out.type == TYPE_NONE:
            note(s, UNKNOWN_TYPE, field)
    elif field == FIELD_VERSION:
        if size != 3 or memcmp(text, b"1.0", 3) != 0:
            note(s, UNSUPPORTED_VERSION, field)
    elif field == FIELD_FROM or field == FIELD_TO:
        note(s, BAD_DID, field)
    else:
        note(s, BAD_ID, field)


cdef void drop(EnvelopeField field, Envelope* out) noexcept nogil:
    """Forget what was kept of a member, because it came again."""
    if field == FIELD_ID:
        out.id.data = NULL
        out.id.size = 0
    elif field == FIELD_CORRELATION_ID:
        out.correlation_id.data = NULL
        out.correlation_id.size = 0
    elif field == FIELD_FROM:
        out.from_.data = NULL
        out.from_.size = 0
    elif field == FIELD_TO:
        out.to.data = NULL
        out.to.size = 0
    elif field == FIELD_TYPE:
        out.type = TYPE_NONE


cdef const uint8_t* scan_value(const uint8_t* p, Scanner* s, Envelope* out) noexcept nogil:
    """Return what follows the value at `p` of the member `s.current`, of which this is the first."""
    cdef EnvelopeField field = s.current
    cdef const uint8_t* text
    cdef uint8_t begin
    if p == s.end:
        return stop(s, NOT_JSON)
    begin = p[0]
    if field == FIELD_PAYLOAD or field == FIELD_EXT:
        if begin != c'{':
            note(s, WRONG_TYPE, field)
        return skip_value(p, s, 1)
    if begin != c'"':
        # Of what else begins with an n the grammar makes short work.
        if begin != c'n' or (field != FIELD_CORRELATION_ID and field != FIELD_SIGNATURE):
            note(s, WRONG_TYPE, field)
        return skip_value(p, s, 1)
    text = p + 1
    if field == FIELD_TIMESTAMP or field == FIELD_SIGNATURE:
        return skip_string(text, s)
    # What is well formed is no longer read as a string: it has nothing in it that could be wrong.
    p = NULL
    if field == FIELD_FROM:
        p = scan_did(text, s, &out.from_)
    elif field == FIELD_TO:
        p = scan_did(text, s, &out.to)
    elif field == FIELD_ID:
        p = scan_id(text, s, &out.id)
    elif field == FIELD_CORRELATION_ID:
        p = scan_id(text, s, &out.correlation_id)
    if p is not NULL:
        return p
    p = skip_text(text, s)
    if p is NULL:
        return NULL
    if s.escaped:
        note(s, ESCAPED_VALUE, field)
    else:
        check(field, text, p - 1 - text, s, out)
    return p


cdef const uint8_t* scan_members(const uint8_t* p, Scanner* s, Envelope* out) noexcept nogil:
    """Return what follows the envelope, of which `p` is the first byte after the opening brace."""
    cdef const uint8_t* end = s.end
    cdef const uint8_t* key
    cdef const uint8_t* key_end
    cdef const KnownKey* known
    cdef EnvelopeField field
    cdef uint32_t seen = 0
    cdef int i
    p = skip_space(p, end)
    if p != end and p[0] == c'}':
        p += 1
    else:
        while True:
            key = p + 1
            if p == end or p[0] != c'"':
                return stop(s, NOT_JSON)
            field = FIELD_NONE
            if end - key >= KEY_BLOCK_BYTES:
                known = &KNOWN_KEYS[key_slot(key)]
                if same_start(key, known.text, known.size):
                    field = known.field
                    p = key + known.size
                    s.escaped = False
            if field == FIELD_NONE:
                # Another name, or one of the known written otherwise.
                p = skip_text(key, s)
                if p is NULL:
                    return NULL
                key_end = p - 1
                if not s.escaped:
                    field = field_of(key, key_end - key)
                else:
                    field = escaped_field_of(key, key_end)
                    if field != FIELD_NONE:
                        note(s, ESCAPED_KEY, field)
                p = skip_space(p, end)
                if p == end or p[0] != c':':
                    return stop(s, NOT_JSON)
                p += 1
            p = skip_space(p, end)
            s.current = field
            if field == FIELD_NONE:
                note(s, UNKNOWN_FIELD, FIELD_NONE)
                p = skip_value(p, s, 1)
            elif seen & <uint32_t> 1 << <int> field:
                note(s, DUPLICATE_KEY, field)
                drop(field, out)
                p = skip_value(p, s, 1)
            elif s.escaped:
                p = skip_value(p, s, 1)
            else:
                p = scan_value(p, s, out)
            if p is NULL:
                return NULL
            s.current = FIELD_NONE
            seen |= <uint32_t> 1 << <int> field
            p = skip_space(p, end)
            if p == end:
                return stop(s, NOT_JSON)
            if p[0] == c'}':
                p += 1
                break
            if p[0] != c',':
                return stop(s, NOT_JSON)
            p = skip_space(p + 1, end)
    if seen & REQUIRED_FIELDS != REQUIRED_FIELDS:
        for i in range(<int> FIELD_ID, <int> FIELD_CORRELATION_ID):
            if not seen & <uint32_t> 1 << i:
                note(s, MISSING_FIELD, <EnvelopeField> i)
    return p


cdef ScanStatus scan_envelope(const char* data, Py_ssize_t size, Envelope* out) noexcept nogil:
    cdef const uint8_t* p = <const uint8_t*> data
    cdef Scanner s
    memset(out, 0, sizeof(Envelope))
    if size > SCAN_MAX_BYTES:
        return TOO_LARGE
    s.begin = p
    s.end = p + size
    s.status = OK
    s.field = FIELD_NONE
    s.current = FIELD_NONE
    s.escaped = False
    p = skip_space(p, s.end)
    if p != s.end and p[0] == c'{':
        p = scan_members(p + 1, &s, out)
    else:
        p = skip_value(p, &s, 0)
        if p is not NULL:
            s.status = NOT_OBJECT
            s.field = FIELD_NONE
    if p is not NULL:
        p = skip_space(p, s.end)
        if p != s.end:
            p = stop(&s, NOT_JSON)
    if p is NULL and s.status != INVALID_UTF8 and not is_utf8(data, size):
        # Where the scan ended early the rest is unread. That it is no text at all is the more
        # telling reason, and the WebSocket has to be closed for it.
        s.status = INVALID_UTF8
        s.field = FIELD_NONE
    if size > MESSAGE_MAX_BYTES:
        s.status = TOO_LARGE
        s.field = FIELD_NONE
    out.field = s.field
    return s.status


cdef str text_of(Span span):
    return None if span.data is NULL else span.data[:span.size].decode("ascii")


cdef class Scan:
    def __repr__(self):
        return (
            f"Scan(status={self.status!r}, field={self.field!r}, type={self.type!r}, id={self.id!r}, "
            f"correlation_id={self.correlation_id!r}, from_={self.from_!r}, to={self.to!r})"
        )


def scan(bytes data not None):
    """Scan one WebSocket text message as an envelope.

    Args:
        data: the whole message, unmasked.

    Returns:
        What `scan_envelope` found, with the names of reason, field and type.
    """
    cdef Envelope envelope
    cdef ScanStatus status = scan_envelope(data, len(data), &envelope)
    cdef Scan found = Scan.__new__(Scan)
    found.status = STATUS_NAMES[<int> status]
    found.field = FIELD_NAMES[<int> envelope.field]
    found.type = TYPE_NAMES[<int> envelope.type]
    found.id = text_of(envelope.id)
    found.correlation_id = text_of(envelope.correlation_id)
    found.from_ = text_of(envelope.from_)
    found.to = text_of(envelope.to)
    return found
