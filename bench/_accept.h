/* Sec-WebSocket-Accept (RFC 6455 §4.2.2): base64(SHA-1(key + GUID)).
 *
 * SHA-1 (RFC 3174) and base64 (RFC 4648 §4) stand here in full so that the floor links against
 * nothing but libc. They run once per connection and are written to be read, not to be fast. */
#ifndef BENCH_ACCEPT_H
#define BENCH_ACCEPT_H

#include <stdint.h>
#include <string.h>

#define WEBSOCKET_KEY_CHARS 24    /* base64 of the client's 16 random bytes */
#define WEBSOCKET_ACCEPT_CHARS 28 /* base64 of the 20 bytes of a SHA-1 */
#define WEBSOCKET_GUID "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

static inline uint32_t rotate_left(uint32_t word, unsigned bits)
{
    return word << bits | word >> (32 - bits);
}

static void sha1_block(uint32_t state[5], const uint8_t block[64])
{
    uint32_t w[80];
    for (int t = 0; t < 16; t++)
        w[t] = (uint32_t)block[4 * t] << 24 | (uint32_t)block[4 * t + 1] << 16 |
               (uint32_t)block[4 * t + 2] << 8 | block[4 * t + 3];
    for (int t = 16; t < 80; t++)
        w[t] = rotate_left(w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16], 1);

    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
    for (int t = 0; t < 80; t++) {
        uint32_t f, k;
        if (t < 20)
            f = (b & c) | (~b & d), k = 0x5A827999;
        else if (t < 40)
            f = b ^ c ^ d, k = 0x6ED9EBA1;
        else if (t < 60)
            f = (b & c) | (b & d) | (c & d), k = 0x8F1BBCDC;
        else
            f = b ^ c ^ d, k = 0xCA62C1D6;
        uint32_t next = rotate_left(a, 5) + f + e + w[t] + k;
        e = d, d = c, c = rotate_left(b, 30), b = a, a = next;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e;
}

/* Write the accept value of `key` (WEBSOCKET_KEY_CHARS long) and a NUL to `accept`. */
static void websocket_accept(const char *key, char accept[WEBSOCKET_ACCEPT_CHARS + 1])
{
    /* 24 + 36 characters, the 0x80 and the 8 bytes of length always take two blocks. */
    uint8_t message[128] = {0};
    const size_t length = WEBSOCKET_KEY_CHARS + sizeof WEBSOCKET_GUID - 1;
    memcpy(message, key, WEBSOCKET_KEY_CHARS);
    memcpy(message + WEBSOCKET_KEY_CHARS, WEBSOCKET_GUID, sizeof WEBSOCKET_GUID - 1);
    message[length] = 0x80;
    message[126] = (uint8_t)(length * 8 >> 8);
    message[127] = (uint8_t)(length * 8);

    uint32_t state[5] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
    sha1_block(state, message);
    sha1_block(state, message + 64);

    uint8_t digest[21] = {0}; /* one zero byte more: 7 groups of 3 */
    for (int i = 0; i < 20; i++)
        digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int group = 0; group < 7; group++) {
        uint32_t bits = (uint32_t)digest[3 * group] << 16 | (uint32_t)digest[3 * group + 1] << 8 |
                        digest[3 * group + 2];
        for (int i = 0; i < 4; i++)
            accept[4 * group + i] = alphabet[bits >> (18 - 6 * i) & 63];
    }
    accept[WEBSOCKET_ACCEPT_CHARS - 1] = '='; /* 20 bytes leave one group short by one */
    accept[WEBSOCKET_ACCEPT_CHARS] = '\0';
}

#endif
