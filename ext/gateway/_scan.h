/* Character classes and the loops of the envelope scanner that have to be in C: vector loads and
 * constant tables are out of Cython's reach. Everything else is in _frames.pyx. */

#ifndef AICONEXUS_SCAN_H
#define AICONEXUS_SCAN_H

#include <stdint.h>
#include <string.h>

/* -DAICONEXUS_SCAN_PORTABLE takes the path of a machine without SSE2, to test it on one that has it, and
 * -DAICONEXUS_SCAN_NO_AVX2 that of a machine with SSE2 alone. */
#if defined(__SSE2__) && !defined(AICONEXUS_SCAN_PORTABLE)
#include <immintrin.h>
#define AICONEXUS_SCAN_SSE2 1
#ifdef AICONEXUS_SCAN_NO_AVX2
#define SCAN_PATH "sse2"
#define HAS_AVX2 0
#else
#define SCAN_PATH "avx2"
#define HAS_AVX2 __builtin_cpu_supports("avx2") /* asked once when loaded; here a load and a test */
#endif
#else
#define SCAN_PATH "portable"
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

/* How much of a string is read 16 bytes at a time before AVX2 is worth a call: a multiple of 16. Keys and
 * most values end within it. */
#define NEAR_BYTES 48

/* What a hexadecimal digit is worth; meaningful only where CLASS_OF says CLASS_HEX. */
static inline uint32_t hex_value(uint8_t digit) {
    return digit <= '9' ? digit - (uint32_t)'0' : (digit | 0x20u) - (uint32_t)'a' + 10u;
}

/* Say whether the `size` bytes at `a` and `b` are the same. `size` is a constant of at most 16: what the
 * compiler makes of memcmp is a call from 9 bytes on, and of this a few loads. */
static inline int same_bytes(const uint8_t *a, const char *b, size_t size) {
    if (size <= 8) {
        return memcmp(a, b, size) == 0;
    }
    return memcmp(a, b, 8) == 0 && memcmp(a + size - 8, b + size - 8, 8) == 0;
}

#ifdef AICONEXUS_SCAN_SSE2
/* Set the bytes to 0xff that are from `first` to `last`. */
static inline __m128i in_range(__m128i bytes, char first, char last) {
    const __m128i offset = _mm_sub_epi8(bytes, _mm_set1_epi8(first));
    return _mm_cmpeq_epi8(_mm_min_epu8(offset, _mm_set1_epi8((char)(last - first))), offset);
}

/* Set the bytes to 0xff that are control characters or not ASCII: below a space if taken as signed. */
static inline __m128i below_space(__m128i bytes) {
    return _mm_cmplt_epi8(bytes, _mm_set1_epi8(' '));
}

/* Return one bit for each of the 16 bytes at `p`, set where skip_plain has to stop. */
static inline unsigned special_bits(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    const __m128i special = _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('"')),
                                         _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\')));
    return (unsigned)_mm_movemask_epi8(_mm_or_si128(special, below_space(bytes)));
}

/* Return one bit for each of the 16 bytes at `p`, set where it is a hexadecimal digit. */
static inline uint32_t hex_bits(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    const __m128i lower = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
    return (uint32_t)_mm_movemask_epi8(
        _mm_or_si128(in_range(bytes, '0', '9'), in_range(lower, 'a', 'f')));
}
#endif

/* Say whether the first `size` of the 16 bytes at `a` and at `b` are the same. */
static inline int same_start(const uint8_t *a, const uint8_t *b, unsigned size) {
#ifdef AICONEXUS_SCAN_SSE2
    const __m128i same = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)a),
                                        _mm_loadu_si128((const __m128i *)b));
    return (~(uint32_t)_mm_movemask_epi8(same) & ((1u << size) - 1)) == 0;
#else
    return memcmp(a, b, size) == 0;
#endif
}

/* Say whether the 36 bytes at `p` are 8-4-4-4-12 hexadecimal digits. */
static inline int is_uuid(const uint8_t *p) {
    if (p[8] != '-' || p[13] != '-' || p[18] != '-' || p[23] != '-') {
        return 0;
    }
#ifdef AICONEXUS_SCAN_SSE2
    const uint32_t dashes = 1u << 8 | 1u << 13 | 1u << 18 | 1u << 23;
    return (hex_bits(p) | hex_bits(p + 16) << 16) == ~dashes && hex_bits(p + 20) >> 12 == 0xf;
#else
    uint8_t classes = CLASS_HEX;
    for (int i = 0; i < 36; i++) {
        if (i != 8 && i != 13 && i != 18 && i != 23) {
            classes &= CLASS_OF[p[i]];
        }
    }
    return classes != 0;
#endif
}

/* Say whether the 48 bytes at `p` are all base58. */
static inline int is_base58_48(const uint8_t *p) {
#ifdef AICONEXUS_SCAN_SSE2
    __m128i all = _mm_set1_epi8(-1);
    for (int i = 0; i < 48; i += 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(p + i));
        const __m128i lower = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
        const __m128i left_out =
            _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('I')),
                                      _mm_cmpeq_epi8(bytes, _mm_set1_epi8('O'))),
                         _mm_cmpeq_epi8(bytes, _mm_set1_epi8('l')));
        const __m128i base58 = _mm_andnot_si128(
            left_out, _mm_or_si128(in_range(bytes, '1', '9'), in_range(lower, 'a', 'z')));
        all = _mm_and_si128(all, base58);
    }
    return _mm_movemask_epi8(all) == 0xffff;
#else
    uint8_t classes = CLASS_BASE58;
    for (int i = 0; i < 48; i++) {
        classes &= CLASS_OF[p[i]];
    }
    return classes != 0;
#endif
}

/* Return the first byte from `p` on that is a quote, a backslash, a control character or not ASCII,
 * or `end`. Reads nothing before `begin`, where the message begins, and nothing at or after `end`: no
 * terminator and no padding is assumed. */
static inline const uint8_t *skip_plain(const uint8_t *p, const uint8_t *begin, const uint8_t *end) {
#ifdef AICONEXUS_SCAN_SSE2
    while (end - p >= 16) {
        const unsigned hits = special_bits(p);
        if (hits != 0) {
            return p + __builtin_ctz(hits);
        }
        p += 16;
    }
    if (end - begin >= 16) {
        /* The last 16 bytes of the message, without those that are before `p`. */
        const unsigned hits = special_bits(end - 16) >> (16 - (end - p));
        return hits != 0 ? p + __builtin_ctz(hits) : end;
    }
#else
    (void)begin;
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

#ifdef AICONEXUS_SCAN_SSE2
/* Return one bit for each of the 16 bytes at `p`, set where skip_lines has to stop. Reads 17 bytes.
 *
 * A backslash is no hit where the byte behind it is `r` or `n`. Nor is that byte one, so it may well be
 * the first of the next block. Of two backslashes in a row the first is a hit, whatever follows the
 * second. */
static inline unsigned line_bits(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    const __m128i next = _mm_loadu_si128((const __m128i *)(p + 1));
    const __m128i line_end = _mm_or_si128(_mm_cmpeq_epi8(next, _mm_set1_epi8('r')),
                                          _mm_cmpeq_epi8(next, _mm_set1_epi8('n')));
    const __m128i escape = _mm_andnot_si128(line_end, _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\')));
    const __m128i special = _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('"')), escape);
    return (unsigned)_mm_movemask_epi8(_mm_or_si128(special, below_space(bytes)));
}

/* Look for the same, 32 bytes at a time. Returns the first hit, or where fewer than 33 bytes are left. */
__attribute__((target("avx2"))) static const uint8_t *skip_lines_avx2(const uint8_t *p,
                                                                      const uint8_t *end) {
    const __m256i quote = _mm256_set1_epi8('"');
    const __m256i backslash = _mm256_set1_epi8('\\');
    const __m256i r = _mm256_set1_epi8('r');
    const __m256i n = _mm256_set1_epi8('n');
    const __m256i space = _mm256_set1_epi8(' ');
    while (end - p > 32) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)p);
        const __m256i next = _mm256_loadu_si256((const __m256i *)(p + 1));
        const __m256i line_end =
            _mm256_or_si256(_mm256_cmpeq_epi8(next, r), _mm256_cmpeq_epi8(next, n));
        const __m256i escape = _mm256_andnot_si256(line_end, _mm256_cmpeq_epi8(bytes, backslash));
        const __m256i special = _mm256_or_si256(_mm256_cmpeq_epi8(bytes, quote), escape);
        const unsigned hits = (unsigned)_mm256_movemask_epi8(
            _mm256_or_si256(special, _mm256_cmpgt_epi8(space, bytes)));
        if (hits != 0) {
            return p + __builtin_ctz(hits);
        }
        p += 32;
    }
    return p;
}
#endif

/* The part of skip_lines that is not worth inlining. */
__attribute__((noinline)) static const uint8_t *skip_more_lines(const uint8_t *p, const uint8_t *begin,
                                                                const uint8_t *end) {
#ifdef AICONEXUS_SCAN_SSE2
    if (end - p > 32 && HAS_AVX2) {
        p = skip_lines_avx2(p, end);
    }
    while (end - p > 16) {
        const unsigned hits = line_bits(p);
        if (hits != 0) {
            return p + __builtin_ctz(hits);
        }
        p += 16;
    }
#endif
    for (;;) {
        p = skip_plain(p, begin, end);
        if (end - p < 2 || p[0] != '\\' || (p[1] != 'r' && p[1] != 'n')) {
            return p;
        }
        p += 2;
    }
}

/* Like skip_plain, but pass over `\r` and `\n` as well: an SDP has both at the end of every line. `p`
 * must not be in the middle of an escape. */
static inline const uint8_t *skip_lines(const uint8_t *p, const uint8_t *begin, const uint8_t *end) {
#ifdef AICONEXUS_SCAN_SSE2
    if (end - p > NEAR_BYTES) {
        for (int i = 0; i < NEAR_BYTES; i += 16) {
            const unsigned hits = line_bits(p + i);
            if (hits != 0) {
                return p + i + __builtin_ctz(hits);
            }
        }
        p += NEAR_BYTES;
    }
#endif
    return skip_more_lines(p, begin, end);
}

#endif
