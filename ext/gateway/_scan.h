/* Character classes and the one loop of the envelope scanner that has to be in C: vector loads and
 * constant tables are out of Cython's reach. Everything else is in _frames.pyx. */

#ifndef AICONEXUS_SCAN_H
#define AICONEXUS_SCAN_H

#include <stdint.h>
#include <string.h>

/* -DAICONEXUS_SCAN_PORTABLE takes the path of a machine without SSE2, to test it on one that has it. */
#if defined(__SSE2__) && !defined(AICONEXUS_SCAN_PORTABLE)
#include <emmintrin.h>
#define AICONEXUS_SCAN_SSE2 1
#endif

#define CLASS_HEX 1u    /* 0-9 a-f A-F */
#define CLASS_BASE58 2u /* the Bitcoin alphabet: no 0, O, I, l */
#define CLASS_ESCAPE 4u /* what may stand after a backslash, `u` excepted: RFC 8259 section 7 */
#define CLASS_PLAIN 8u  /* ASCII that stands for itself in a string */

/* Which of the classes above a byte is in; 0 for control characters and all that is not ASCII. */
static const uint8_t CLASS_OF[256] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,                 /* 00-0f */
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,                 /* 10-1f */
    8, 8, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 12,               /* space " ... / */
    9, 11, 11, 11, 11, 11, 11, 11, 11, 11, 8, 8, 8, 8, 8, 8,       /* 0-9 ... ? */
    8, 11, 11, 11, 11, 11, 11, 10, 10, 8, 10, 10, 10, 10, 10, 8,   /* @ A-O */
    10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 8, 4, 8, 8, 8,     /* P-Z [ \ ] ^ _ */
    8, 11, 15, 11, 11, 11, 15, 10, 10, 10, 10, 10, 8, 10, 14, 10,  /* ` a-o */
    10, 10, 14, 10, 14, 10, 10, 10, 10, 10, 10, 8, 8, 8, 8, 8,     /* p-z { | } ~ DEL */
};

/* What a hexadecimal digit is worth; meaningful only where CLASS_OF says CLASS_HEX. */
static inline uint32_t hex_value(uint8_t digit) {
    return digit <= '9' ? digit - (uint32_t)'0' : (digit | 0x20u) - (uint32_t)'a' + 10u;
}

/* Return the first byte from `p` on that is a quote, a backslash, a control character or not ASCII,
 * or `end`. Reads nothing at or after `end`: no terminator and no padding is assumed. */
static inline const uint8_t *skip_plain(const uint8_t *p, const uint8_t *end) {
#ifdef AICONEXUS_SCAN_SSE2
    const __m128i quote = _mm_set1_epi8('"');
    const __m128i backslash = _mm_set1_epi8('\\');
    const __m128i last_control = _mm_set1_epi8(0x1f);
    while (end - p >= 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
        const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(bytes, last_control), bytes);
        const __m128i special =
            _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, backslash));
        /* movemask takes the top bit, which `bytes` itself has set where it is not ASCII. */
        const unsigned hits =
            (unsigned)_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(control, special), bytes));
        if (hits != 0) {
            return p + __builtin_ctz(hits);
        }
        p += 16;
    }
#else
    const uint64_t ones = 0x0101010101010101u;
    while (end - p >= 8) {
        uint64_t word;
        memcpy(&word, p, sizeof word);
        const uint64_t quote = word ^ (ones * '"');
        const uint64_t backslash = word ^ (ones * '\\');
        /* (x - n) & ~x has the top bit where x < n. A borrow can set it for a byte above a true hit,
         * never without one; the bytes are looked at one by one below, so no hit is misplaced and
         * the order of bytes does not matter. */
        const uint64_t hits = ((word - ones * 0x20) & ~word) | ((quote - ones) & ~quote) |
                              ((backslash - ones) & ~backslash) | word;
        if ((hits & (ones * 0x80)) != 0) {
            break;
        }
        p += 8;
    }
#endif
    while (p != end && (CLASS_OF[*p] & CLASS_PLAIN) != 0) {
        p++;
    }
    return p;
}

#endif
