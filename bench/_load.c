/* The load client of the relay benchmark, a shared library for bench/load.py.
 *
 * It drives connections that are already open and registered. They come in pairs: connection 2i
 * sends to connection 2i+1 and back. Every message is the sender's template with a sequence number
 * in eight hex digits; the receiver compares each one whole with what it must be, so a message that
 * was lost, reordered, altered or misrouted ends the run; or it is counted, where the run shall go on
 * (load_count_faults). One thread, level-triggered epoll, one recv() per readable connection, one
 * send() per burst.
 *
 * A frame from the server is a message; or, where the connection `streams`, a piece of a byte stream
 * in which messages follow each other, and the server may ask for a sign of life between two of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000u        /* ns */
#define SILENCE (5ull * SECOND)   /* ns without a message after which the rest counts as lost */
#define READ_BUFFER_BYTES 1048576 /* a pass over a late reader's socket buffer */
#define PASS_EVENTS 1024
#define SEQUENCE_DIGITS 8         /* hex: 2^32 messages per connection */
#define FRAME_HEADER_BYTES 8      /* masked, 16-bit length: payloads of 126..65535 bytes */
#define FRAME_MAX_BYTES (READ_BUFFER_BYTES / 2) /* from the server; a frame is read whole */
#define SHORT_PAYLOAD_BYTES 125   /* with a 7-bit length; a control frame has no other (RFC 6455 §5.5) */

enum { OPCODE_CLOSE = 0x8, OPCODE_PING = 0x9, OPCODE_PONG = 0xA };

/* One connection as Python describes it. `bench/load.py` has the same structs. */
struct load_connection {
    const uint8_t *sends;    /* payload it sends, borrowed for the call */
    const uint8_t *receives; /* payload it must receive: its partner's, as the server forwards it */
    uint32_t sends_bytes, receives_bytes;
    uint32_t sends_sequence, receives_sequence; /* offset of the hex digits in the payload */
    int32_t fd;
    uint32_t opcode; /* of the frames it sends */
    uint32_t streams; /* 0: a frame is a message */
    const uint8_t *asks, *answers; /* of a stream: the server's question, and what is sent for it */
    uint32_t asks_bytes, answers_bytes; /* up to 125; 0: it never asks */
};

struct load_result {
    uint64_t sent, received;
    uint64_t elapsed_ns;        /* first send to last receipt */
    uint64_t client_cpu_ns;     /* of this thread */
    uint64_t p50_ns, p99_ns;    /* 1.6 % coarse, rounded up */
    /* Only where faults are counted. `received` then counts every message once. */
    uint64_t reordered;         /* arrived after one that was sent later */
    uint64_t repeated;
    uint64_t foreign;           /* not what the partner sent: ERRORs of the server, altered messages */
    uint64_t ended;             /* connections that the server closed or dropped */
    char failure[256];          /* empty: every message arrived, once, unaltered, in order */
};

struct connection {
    int fd;
    uint32_t frame_bytes;
    uint8_t *frames;         /* `burst` masked frames, one after the other */
    uint32_t frame_sequence; /* offset of the digits in a frame */
    uint8_t digit_mask[SEQUENCE_DIGITS];
    uint32_t next_sent;
    uint64_t sent_at; /* ns, of the latest burst; the next one waits until it has arrived */

    uint8_t *expected; /* the next message, in full */
    uint32_t expected_bytes, expected_sequence;
    uint32_t next_received;
    uint32_t burst_received;
    uint64_t seen;  /* where faults are counted: bit i is message next_received - 1 - i */
    bool has_ended;
    uint8_t *held; /* the beginning of a frame whose rest has not arrived */
    size_t held_bytes;

    bool streams;
    uint8_t *partial; /* the beginning of a message whose rest is in another frame */
    size_t partial_bytes;
    uint8_t asks[SHORT_PAYLOAD_BYTES], answers[SHORT_PAYLOAD_BYTES];
    uint8_t asks_bytes, answers_bytes, opcode;
};

/* Latencies, log-linear: 64 buckets per power of two. */
#define BUCKET_BITS 6
#define BUCKETS ((65 - BUCKET_BITS) << BUCKET_BITS)

struct load {
    int epoll_fd;
    uint32_t count, burst;
    bool spins; /* never sleeps: has a core of its own, so waking up adds nothing to a latency */
    bool counts_faults;
    struct connection *connections;
    uint8_t *read_buffer;

    /* Of the current run. */
    uint64_t interval_ns; /* between messages of all connections; 0: closed loop */
    uint64_t start_ns, end_ns, last_ns;
    uint32_t first_of_run; /* sequence number, the same for all connections when paced */
    struct load_result *result;
    uint32_t histogram[BUCKETS];
};

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

static bool note(struct load *load, const char *format, va_list arguments)
{
    if (!load->result->failure[0])
        vsnprintf(load->result->failure, sizeof load->result->failure, format, arguments);
    return false;
}

/* Note why the run ends; the first reason stays. Return false, for `return fail(...)`. */
__attribute__((format(printf, 2, 3))) static bool fail(struct load *load, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    note(load, format, arguments);
    va_end(arguments);
    return false;
}

/* Note that a connection has ended: so has the run, unless faults are counted. */
__attribute__((format(printf, 3, 4))) static bool end(struct load *load, struct connection *c,
                                                      const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    note(load, format, arguments);
    va_end(arguments);
    if (!load->counts_faults)
        return false;
    c->has_ended = true;
    load->result->ended++;
    epoll_ctl(load->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    return true;
}

static size_t bucket_of(uint64_t ns)
{
    if (ns < 1u << BUCKET_BITS)
        return ns;
    unsigned shift = 63 - (unsigned)__builtin_clzll(ns) - BUCKET_BITS;
    return ((size_t)(shift + 1) << BUCKET_BITS) + (ns >> shift) - (1u << BUCKET_BITS);
}

/* The largest latency in a bucket, in ns. */
static uint64_t bucket_end(size_t bucket)
{
    if (bucket < 1u << BUCKET_BITS)
        return bucket;
    unsigned shift = (unsigned)(bucket >> BUCKET_BITS) - 1;
    uint64_t digits = (bucket & ((1u << BUCKET_BITS) - 1)) + (1u << BUCKET_BITS);
    return ((digits + 1) << shift) - 1;
}

/* Return the latency, in ns, that so many of 10,000 messages of the latest run did not exceed. */
uint64_t load_percentile(const struct load *load, uint32_t of_10000)
{
    uint64_t total = 0, seen = 0;
    for (size_t bucket = 0; bucket < BUCKETS; bucket++)
        total += load->histogram[bucket];
    const uint64_t rank = (total * of_10000 + 9999) / 10000;
    for (size_t bucket = 0; bucket < BUCKETS; bucket++) {
        seen += load->histogram[bucket];
        if (seen >= rank)
            return seen ? bucket_end(bucket) : 0;
    }
    return 0;
}

static void write_sequence(uint8_t digits[SEQUENCE_DIGITS], uint32_t sequence)
{
    for (int i = SEQUENCE_DIGITS - 1; i >= 0; i--, sequence >>= 4)
        digits[i] = (uint8_t)"0123456789abcdef"[sequence & 15];
}

static uint32_t read_sequence(const uint8_t digits[SEQUENCE_DIGITS])
{
    char text[SEQUENCE_DIGITS + 1] = {0};
    memcpy(text, digits, SEQUENCE_DIGITS);
    return (uint32_t)strtoul(text, NULL, 16);
}

/* Send the next `count` messages of connection `c` in one write. */
static bool send_messages(struct load *load, struct connection *c, uint32_t count)
{
    if (c->has_ended) {
        c->next_sent += count; /* all stay at the same number */
        return true;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *digits = c->frames + i * c->frame_bytes + c->frame_sequence;
        write_sequence(digits, c->next_sent++);
        for (int j = 0; j < SEQUENCE_DIGITS; j++)
            digits[j] ^= c->digit_mask[j];
    }
    c->sent_at = clock_ns(CLOCK_MONOTONIC);
    ssize_t bytes = (ssize_t)count * c->frame_bytes;
    ssize_t sent = send(c->fd, c->frames, (size_t)bytes, MSG_NOSIGNAL);
    if (sent < 0)
        return errno == EPIPE || errno == ECONNRESET ? end(load, c, "send: %s", strerror(errno))
                                                     : fail(load, "send: %s", strerror(errno));
    if (sent < bytes) /* hundreds of KiB wait in the socket: no figure of such a run means anything */
        return fail(load, "the server does not keep up with the load");
    load->result->sent += count;
    return true;
}

/* Send a frame with a payload of at most SHORT_PAYLOAD_BYTES. */
static bool send_short(struct load *load, struct connection *c, uint8_t opcode, const uint8_t *payload,
                       uint8_t bytes)
{
    uint8_t frame[6 + SHORT_PAYLOAD_BYTES] = {0x80 | opcode, 0x80 | bytes}; /* mask of zeros */
    memcpy(frame + 6, payload, bytes);
    if (send(c->fd, frame, 6u + bytes, MSG_NOSIGNAL) != 6 + bytes)
        return fail(load, "send: no room for a PONG");
    return true;
}

/* When message `sequence` for `c` was sent or, in an open loop, was due to be. */
static uint64_t sent_at(const struct load *load, const struct connection *c, uint32_t sequence)
{
    const uint64_t index = (uint64_t)(c - load->connections), partner = index ^ 1;
    if (!load->interval_ns)
        return load->connections[partner].sent_at;
    const uint64_t pairs = load->count / 2, lap = sequence - load->first_of_run;
    const uint64_t turn = lap * load->count + (partner & 1) * pairs + partner / 2;
    return load->start_ns + turn * load->interval_ns;
}

/* Say what is wrong with a message that is not the expected one. */
static bool diagnose(struct load *load, struct connection *c, const uint8_t *message, size_t bytes)
{
    if (bytes == c->expected_bytes) {
        const uint8_t *digits = message + c->expected_sequence;
        memcpy(c->expected + c->expected_sequence, digits, SEQUENCE_DIGITS);
        if (memcmp(message, c->expected, bytes) == 0)
            return fail(load, "message %u came where %u was due: lost, repeated or reordered",
                        read_sequence(digits), c->next_received);
    }
    return fail(load, "unexpected message of %zu bytes: %.*s", bytes, (int)(bytes < 200 ? bytes : 200),
                (const char *)message);
}

/* Count the receipt of message `sequence`. */
static void receive(struct load *load, struct connection *c, uint32_t sequence, uint64_t now)
{
    uint32_t *bucket = &load->histogram[bucket_of(now - sent_at(load, c, sequence))];
    *bucket += 1;
    load->result->received++;
    load->last_ns = now;
}

/* Count what is wrong with a message that is not the expected one, and expect the next. */
static bool count_fault(struct load *load, struct connection *c, const uint8_t *message, size_t bytes,
                        uint64_t now)
{
    uint8_t *digits = c->expected + c->expected_sequence;
    diagnose(load, c, message, bytes); /* puts the digits of `message` into `expected` */
    const uint32_t sequence = read_sequence(digits), first = load->first_of_run;
    const uint32_t sent = (c - load->connections) % 2 ? c[-1].next_sent : c[1].next_sent;
    write_sequence(digits, sequence); /* digits that are none do not pass */
    if (bytes != c->expected_bytes || memcmp(message, c->expected, bytes) != 0 ||
        sequence - first >= sent - first) {
        load->result->foreign++;
    } else if (sequence - first >= c->next_received - first) {
        /* Those in between are late or lost. */
        const uint32_t ahead = sequence - c->next_received + 1;
        c->seen = (ahead < 64 ? c->seen << ahead : 0) | 1;
        c->next_received = sequence + 1;
        receive(load, c, sequence, now);
    } else {
        const uint32_t behind = c->next_received - 1 - sequence;
        /* What is further behind than `seen` reaches is held to be late, not repeated. */
        if (behind < 64 && c->seen >> behind & 1) {
            load->result->repeated++;
        } else {
            c->seen |= behind < 64 ? 1ull << behind : 0;
            load->result->reordered++;
            receive(load, c, sequence, now);
        }
    }
    write_sequence(digits, c->next_received);
    return true;
}

static bool on_message(struct load *load, struct connection *c, const uint8_t *message, size_t bytes,
                       uint64_t now)
{
    if (bytes != c->expected_bytes || memcmp(message, c->expected, bytes) != 0)
        return load->counts_faults ? count_fault(load, c, message, bytes, now)
                                   : diagnose(load, c, message, bytes);
    receive(load, c, c->next_received, now);
    c->seen = c->seen << 1 | 1;
    write_sequence(c->expected + c->expected_sequence, ++c->next_received);
    if (load->interval_ns || ++c->burst_received < load->burst)
        return true;
    c->burst_received = 0;
    return now >= load->end_ns || send_messages(load, c, load->burst);
}

static bool on_question(struct load *load, struct connection *c, const uint8_t *question)
{
    if (memcmp(question, c->asks, c->asks_bytes) != 0)
        return fail(load, "unexpected message: %.*s", c->asks_bytes, (const char *)question);
    return send_short(load, c, c->opcode, c->answers, c->answers_bytes);
}

/* Handle the next bytes of a stream: any number of messages, the first and the last perhaps in part. */
static bool on_stream(struct load *load, struct connection *c, const uint8_t *data, size_t bytes,
                      uint64_t now)
{
    while (bytes) {
        const uint8_t first = c->partial_bytes ? c->partial[0] : data[0];
        const bool asked = c->asks_bytes && first == c->asks[0];
        const size_t whole = asked ? c->asks_bytes : c->expected_bytes;
        const uint8_t *message = data;
        size_t used = whole;
        if (c->partial_bytes || bytes < whole) {
            used = whole - c->partial_bytes < bytes ? whole - c->partial_bytes : bytes;
            memcpy(c->partial + c->partial_bytes, data, used);
            c->partial_bytes += used;
            message = c->partial;
            if (c->partial_bytes < whole) {
                /* A refusal is shorter than a message: see it now, not when the silence is over. */
                size_t fixed = c->partial_bytes < c->expected_sequence ? c->partial_bytes
                                                                       : c->expected_sequence;
                if (!asked && memcmp(message, c->expected, fixed) != 0)
                    return diagnose(load, c, message, c->partial_bytes);
                return true;
            }
            c->partial_bytes = 0;
        }
        data += used;
        bytes -= used;
        if (!(asked ? on_question(load, c, message) : on_message(load, c, message, whole, now)))
            return false;
    }
    return true;
}

/* Handle the frame at the start of `data`; `*used` gets its bytes, or 0 if it is not all there. */
static bool on_frame(struct load *load, struct connection *c, const uint8_t *data, size_t bytes,
                     uint64_t now, size_t *used)
{
    *used = 0;
    if (bytes < 2)
        return true;
    size_t header = 2, payload = data[1];
    if (payload == 126) {
        if (bytes < 4)
            return true;
        payload = (size_t)data[2] << 8 | data[3];
        header = 4;
    } else if (payload == 127) {
        if (bytes < 10)
            return true;
        payload = 0;
        for (int i = 2; i < 10; i++)
            payload = payload << 8 | data[i];
        header = 10;
    } else if (payload > 127) {
        return fail(load, "a masked frame");
    }
    if (payload > FRAME_MAX_BYTES)
        return fail(load, "a frame of %zu bytes", payload);
    if (bytes < header + payload)
        return true;
    *used = header + payload;
    const uint8_t *start = data + header;
    const unsigned opcode = data[0] & 0x0f;
    if (opcode == OPCODE_PING && payload <= SHORT_PAYLOAD_BYTES)
        return send_short(load, c, OPCODE_PONG, start, (uint8_t)payload);
    if (opcode == OPCODE_PONG)
        return true;
    if (opcode == OPCODE_CLOSE)
        return end(load, c, "the server closed a connection: %d %.*s",
                   payload < 2 ? 1005 : start[0] << 8 | start[1], payload < 2 ? 0 : (int)payload - 2,
                   (const char *)start + 2);
    if (c->streams)
        return on_stream(load, c, start, payload, now);
    if (!(data[0] & 0x80))
        return fail(load, "a fragmented message");
    return on_message(load, c, start, payload, now);
}

static bool on_readable(struct load *load, struct connection *c)
{
    uint8_t *buffer = load->read_buffer;
    if (c->held_bytes)
        memcpy(buffer, c->held, c->held_bytes);
    ssize_t received = recv(c->fd, buffer + c->held_bytes, READ_BUFFER_BYTES - c->held_bytes, 0);
    if (received < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (received <= 0)
        return end(load, c, "the server dropped a connection: %s", received ? strerror(errno) : "EOF");
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    size_t bytes = c->held_bytes + (size_t)received, done = 0, used;
    c->held_bytes = 0;
    do {
        if (!on_frame(load, c, buffer + done, bytes - done, now, &used))
            return false;
        done += used;
    } while (used);
    if (done == bytes || c->has_ended)
        return true;
    uint8_t *held = realloc(c->held, bytes - done);
    if (!held)
        return fail(load, "out of memory");
    c->held = held;
    c->held_bytes = bytes - done;
    memcpy(held, buffer + done, c->held_bytes);
    return true;
}

/* Wait up to `ns` for readable connections and handle them. */
static bool pass(struct load *load, uint64_t ns)
{
    struct epoll_event events[PASS_EVENTS];
    if (load->spins)
        ns = 0;
    struct timespec timeout = {.tv_sec = (time_t)(ns / SECOND), .tv_nsec = (long)(ns % SECOND)};
    int ready = epoll_pwait2(load->epoll_fd, events, PASS_EVENTS, &timeout, NULL);
    if (ready < 0 && errno != EINTR)
        return fail(load, "epoll_pwait2: %s", strerror(errno));
    for (int i = 0; i < ready; i++)
        if (!on_readable(load, events[i].data.ptr))
            return false;
    return true;
}

/* Every first connection of a pair sends a burst; who has received one whole sends the next. */
static bool run_closed_loop(struct load *load)
{
    for (uint32_t i = 0; i < load->count; i += 2)
        if (!send_messages(load, &load->connections[i], load->burst))
            return false;
    while (load->last_ns < load->end_ns || load->result->received < load->result->sent) {
        if (!pass(load, SILENCE))
            return false;
        if (clock_ns(CLOCK_MONOTONIC) > load->last_ns + SILENCE)
            return true;
    }
    return true;
}

/* Message k leaves at start + k * interval whatever came back; first all first connections of the
 * pairs in turn, then all second ones. */
static bool run_paced(struct load *load)
{
    const uint64_t total = (load->end_ns - load->start_ns) / load->interval_ns;
    const uint64_t pairs = load->count / 2;
    /* Whole laps only: the next run finds all connections at the same sequence number. */
    const uint64_t messages = (total + load->count - 1) / load->count * load->count;
    for (uint64_t turn = 0; turn < messages || load->result->received < load->result->sent;) {
        uint64_t now = clock_ns(CLOCK_MONOTONIC), due;
        while ((due = load->start_ns + turn * load->interval_ns) <= now && turn < messages) {
            uint64_t place = turn % load->count;
            if (!send_messages(load, &load->connections[2 * (place % pairs) + place / pairs], 1))
                return false;
            turn++;
        }
        if (turn == messages) {
            if (now > (load->last_ns > due ? load->last_ns : due) + SILENCE)
                return true;
            due = now + SILENCE;
        }
        now = clock_ns(CLOCK_MONOTONIC);
        if (!pass(load, due > now ? due - now : 0))
            return false;
    }
    return true;
}

/* Send for `duration_ns`, at `rate` messages/s over all connections or, if that is 0, in a closed
 * loop; then wait for what is still under way. Return whether it came to its end. */
bool load_run(struct load *load, uint64_t duration_ns, uint32_t rate, struct load_result *result)
{
    uint64_t cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    memset(result, 0, sizeof *result);
    memset(load->histogram, 0, sizeof load->histogram);
    load->result = result;
    load->interval_ns = rate ? SECOND / rate : 0;
    load->start_ns = load->last_ns = clock_ns(CLOCK_MONOTONIC);
    load->end_ns = load->start_ns + duration_ns;
    load->first_of_run = load->connections[0].next_sent;
    /* What an earlier run lost is not this one's loss. */
    for (uint32_t i = 0; load->counts_faults && i < load->count; i++) {
        struct connection *c = &load->connections[i];
        c->next_received = load->first_of_run;
        c->seen = 0;
        write_sequence(c->expected + c->expected_sequence, c->next_received);
    }
    const bool ends = rate ? run_paced(load) : run_closed_loop(load);
    if (ends && result->received < result->sent)
        fail(load, "%llu of %llu messages were lost",
             (unsigned long long)(result->sent - result->received), (unsigned long long)result->sent);
    result->elapsed_ns = load->last_ns - load->start_ns;
    result->client_cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
    result->p50_ns = load_percentile(load, 5000);
    result->p99_ns = load_percentile(load, 9900);
    return ends;
}

/* Go on after faults, in open loops, and count them: for a server that something is done to. */
void load_count_faults(struct load *load)
{
    load->counts_faults = true;
}

/* Free everything but the sockets, which belong to the caller. */
void load_close(struct load *load)
{
    for (uint32_t i = 0; i < load->count; i++) {
        free(load->connections[i].frames);
        free(load->connections[i].expected);
        free(load->connections[i].held);
        free(load->connections[i].partial);
    }
    free(load->connections);
    free(load->read_buffer);
    if (load->epoll_fd >= 0)
        close(load->epoll_fd);
    free(load);
}

/* Build the masked frames of a connection (RFC 6455 §5.3) and what it must receive. */
static bool prepare(struct connection *c, const struct load_connection *spec, uint32_t burst)
{
    c->fd = spec->fd;
    c->frame_bytes = FRAME_HEADER_BYTES + spec->sends_bytes;
    c->frame_sequence = FRAME_HEADER_BYTES + spec->sends_sequence;
    c->frames = malloc((size_t)burst * c->frame_bytes);
    c->expected = malloc(spec->receives_bytes);
    if (!c->frames || !c->expected || spec->sends_bytes < 126 || spec->sends_bytes > 65535)
        return false;

    const uint8_t key[4] = {(uint8_t)rand(), (uint8_t)rand(), (uint8_t)rand(), (uint8_t)rand()};
    const uint8_t header[4] = {(uint8_t)(0x80 | spec->opcode), 0x80 | 126,
                               (uint8_t)(spec->sends_bytes >> 8), (uint8_t)spec->sends_bytes};
    memcpy(c->frames, header, 4);
    memcpy(c->frames + 4, key, 4);
    for (uint32_t i = 0; i < spec->sends_bytes; i++)
        c->frames[FRAME_HEADER_BYTES + i] = spec->sends[i] ^ key[i % 4];
    for (uint32_t i = 0; i < SEQUENCE_DIGITS; i++)
        c->digit_mask[i] = key[(spec->sends_sequence + i) % 4];
    for (uint32_t i = 1; i < burst; i++)
        memcpy(c->frames + (size_t)i * c->frame_bytes, c->frames, c->frame_bytes);

    memcpy(c->expected, spec->receives, spec->receives_bytes);
    c->expected_bytes = spec->receives_bytes;
    c->expected_sequence = spec->receives_sequence;
    write_sequence(c->expected + c->expected_sequence, 0);

    c->opcode = (uint8_t)spec->opcode;
    c->streams = spec->streams;
    if (!c->streams)
        return true;
    /* The first byte must tell a question from a message. */
    if (spec->asks_bytes > SHORT_PAYLOAD_BYTES || spec->answers_bytes > SHORT_PAYLOAD_BYTES ||
        (spec->asks_bytes && spec->asks[0] == c->expected[0]))
        return false;
    c->asks_bytes = (uint8_t)spec->asks_bytes;
    c->answers_bytes = (uint8_t)spec->answers_bytes;
    memcpy(c->asks, spec->asks, c->asks_bytes);
    memcpy(c->answers, spec->answers, c->answers_bytes);
    c->partial = malloc(c->expected_bytes > c->asks_bytes ? c->expected_bytes : c->asks_bytes);
    return c->partial;
}

/* Take `count` connected sockets, two and two partners. Return NULL if that cannot be. */
struct load *load_open(const struct load_connection *specs, uint32_t count, uint32_t burst, bool spins)
{
    struct load *load = calloc(1, sizeof *load);
    if (!load)
        return NULL;
    load->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    load->connections = calloc(count, sizeof *load->connections);
    load->read_buffer = malloc(READ_BUFFER_BYTES);
    load->burst = burst;
    load->spins = spins;
    bool ready = load->epoll_fd >= 0 && load->connections && load->read_buffer && count % 2 == 0;
    for (uint32_t i = 0; ready && i < count; i++) {
        struct connection *c = &load->connections[i];
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        load->count = i + 1;
        ready = prepare(c, &specs[i], burst) && fcntl(c->fd, F_SETFL, O_NONBLOCK) == 0 &&
                epoll_ctl(load->epoll_fd, EPOLL_CTL_ADD, c->fd, &event) == 0;
    }
    if (!ready) {
        load_close(load);
        return NULL;
    }
    return load;
}
