/* Holds the idle connections of a swarm, a shared library for bench/hold.py.
 *
 * A held agent answers pings and says nothing else. 100,000 of them cost their machine 4,000 pings
 * a second, beside the gateway that is measured there: hence C. One thread, level-triggered epoll.
 * The sockets given to it belong to it.
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
#include <unistd.h>

#define READ_BUFFER_BYTES 131072  /* the largest message of the protocol has 64 KiB */
#define PASS_EVENTS 1024
#define CONTROL_PAYLOAD_BYTES 125 /* RFC 6455 §5.5 */

enum { OPCODE_CLOSE = 0x8, OPCODE_PING = 0x9, OPCODE_PONG = 0xA };

/* What happened so far. `bench/hold.py` has the same struct. */
struct hold_counts {
    uint64_t pings;       /* answered */
    uint64_t messages;    /* nobody talks to a held agent: ERRORs, or messages gone astray */
    uint32_t held;        /* connections that are open */
    uint32_t lost;        /* connections that ended */
    uint32_t silent;      /* held, called, and have not answered yet */
    char first_loss[256]; /* why the first one was lost */
};

struct connection {
    int fd;         /* -1: was never given, was taken back, or ended */
    bool is_called; /* owes a PONG */
    uint8_t *kept;  /* the beginning of a frame whose rest has not arrived */
    uint32_t kept_bytes;
};

struct hold {
    int epoll_fd;
    uint32_t capacity;
    struct connection *connections;
    uint8_t *read_buffer;
    struct hold_counts counts;
};

static void drop(struct hold *hold, struct connection *c)
{
    hold->counts.held--;
    hold->counts.silent -= c->is_called;
    c->is_called = false;
    /* By hand: the file stays open, and in epoll, where another process has it too. */
    epoll_ctl(hold->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    close(c->fd);
    c->fd = -1;
    free(c->kept);
    c->kept = NULL;
    c->kept_bytes = 0;
}

__attribute__((format(printf, 3, 4))) static void lose(struct hold *hold, struct connection *c,
                                                       const char *format, ...)
{
    if (!hold->counts.lost++) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(hold->counts.first_loss, sizeof hold->counts.first_loss, format, arguments);
        va_end(arguments);
    }
    drop(hold, c);
}

/* Send a control frame; its mask is of zeros. */
static bool send_control(const struct connection *c, unsigned opcode, const uint8_t *payload, size_t bytes)
{
    uint8_t frame[6 + CONTROL_PAYLOAD_BYTES] = {(uint8_t)(0x80 | opcode), (uint8_t)(0x80 | bytes)};
    memcpy(frame + 6, payload, bytes);
    return send(c->fd, frame, 6 + bytes, MSG_NOSIGNAL) == (ssize_t)(6 + bytes);
}

/* Handle the frame at the start of `data`; return its bytes, 0 if it is not all there, or if the
 * connection has ended. */
static size_t on_frame(struct hold *hold, struct connection *c, const uint8_t *data, size_t bytes)
{
    if (bytes < 2)
        return 0;
    size_t header = 2, payload = data[1];
    if (payload == 126) {
        if (bytes < 4)
            return 0;
        payload = (size_t)data[2] << 8 | data[3];
        header = 4;
    } else if (payload > 126) {
        lose(hold, c, "the gateway sent a masked frame, or one of 64 KiB and more");
        return 0;
    }
    if (bytes < header + payload)
        return 0;
    const uint8_t *start = data + header;
    const unsigned opcode = data[0] & 0x0f;
    if (opcode == OPCODE_PING && payload <= CONTROL_PAYLOAD_BYTES) {
        if (send_control(c, OPCODE_PONG, start, payload)) {
            hold->counts.pings++;
        } else {
            lose(hold, c, "no PONG could be sent: %s", strerror(errno));
            return 0;
        }
    } else if (opcode == OPCODE_PONG) {
        hold->counts.silent -= c->is_called;
        c->is_called = false;
    } else if (opcode == OPCODE_CLOSE) {
        lose(hold, c, "the gateway closed a connection: %d %.*s",
             payload < 2 ? 1005 : start[0] << 8 | start[1], payload < 2 ? 0 : (int)payload - 2,
             (const char *)start + 2);
        return 0;
    } else {
        hold->counts.messages++;
    }
    return header + payload;
}

static void on_readable(struct hold *hold, struct connection *c)
{
    uint8_t *buffer = hold->read_buffer;
    if (c->kept_bytes)
        memcpy(buffer, c->kept, c->kept_bytes);
    ssize_t received = recv(c->fd, buffer + c->kept_bytes, READ_BUFFER_BYTES - c->kept_bytes, 0);
    if (received < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (received <= 0) {
        lose(hold, c, "the gateway dropped a connection: %s", received ? strerror(errno) : "EOF");
        return;
    }
    size_t bytes = c->kept_bytes + (size_t)received, done = 0, used;
    while ((used = on_frame(hold, c, buffer + done, bytes - done)))
        done += used;
    if (c->fd < 0)
        return;
    /* Idle connections have no buffer. */
    free(c->kept);
    c->kept = NULL;
    c->kept_bytes = (uint32_t)(bytes - done);
    if (!c->kept_bytes)
        return;
    c->kept = malloc(c->kept_bytes);
    if (c->kept)
        memcpy(c->kept, buffer + done, c->kept_bytes);
    else
        lose(hold, c, "out of memory");
}

/* Handle what is readable within `milliseconds`. */
void hold_pass(struct hold *hold, int milliseconds)
{
    struct epoll_event events[PASS_EVENTS];
    int ready = epoll_wait(hold->epoll_fd, events, PASS_EVENTS, milliseconds);
    for (int i = 0; i < ready; i++)
        on_readable(hold, &hold->connections[events[i].data.u32]);
}

/* Take the open, registered connection `fd` as agent `number`. */
bool hold_add(struct hold *hold, uint32_t number, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = number};
    if (number >= hold->capacity || hold->connections[number].fd >= 0 ||
        fcntl(fd, F_SETFL, O_NONBLOCK) != 0 || epoll_ctl(hold->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        return false;
    hold->connections[number].fd = fd;
    hold->counts.held++;
    return true;
}

/* Return the socket of agent `number`, or -1 if its connection has ended. */
int hold_socket(const struct hold *hold, uint32_t number)
{
    return number < hold->capacity ? hold->connections[number].fd : -1;
}

/* Close this end's copy of the socket of agent `number`; it is neither held nor lost. */
void hold_release(struct hold *hold, uint32_t number)
{
    if (hold_socket(hold, number) >= 0)
        drop(hold, &hold->connections[number]);
}

/* Ping the agents from `first` up to `end`; `silent` counts those whose PONG is out. */
void hold_call(struct hold *hold, uint32_t first, uint32_t end)
{
    for (uint32_t i = first; i < end && i < hold->capacity; i++) {
        struct connection *c = &hold->connections[i];
        if (c->fd < 0 || c->is_called)
            continue;
        /* One that cannot even send stays silent. */
        send_control(c, OPCODE_PING, (const uint8_t *)"call", 4);
        c->is_called = true;
        hold->counts.silent++;
    }
}

/* Return the descriptor that is readable when `hold_pass` has something to do. */
int hold_fileno(const struct hold *hold)
{
    return hold->epoll_fd;
}

const struct hold_counts *hold_count(const struct hold *hold)
{
    return &hold->counts;
}

void hold_close(struct hold *hold)
{
    for (uint32_t i = 0; hold->connections && i < hold->capacity; i++)
        hold_release(hold, i);
    free(hold->connections);
    free(hold->read_buffer);
    if (hold->epoll_fd >= 0)
        close(hold->epoll_fd);
    free(hold);
}

/* Make room for `capacity` agents. Return NULL if there is none. */
struct hold *hold_open(uint32_t capacity)
{
    struct hold *hold = calloc(1, sizeof *hold);
    if (!hold)
        return NULL;
    hold->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    hold->connections = calloc(capacity, sizeof *hold->connections);
    hold->read_buffer = malloc(READ_BUFFER_BYTES);
    hold->capacity = capacity;
    for (uint32_t i = 0; hold->connections && i < capacity; i++)
        hold->connections[i].fd = -1;
    if (hold->epoll_fd < 0 || !hold->connections || !hold->read_buffer) {
        hold_close(hold);
        return NULL;
    }
    return hold;
}
