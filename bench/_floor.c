/* The floor of the relay benchmark: the least that a WebSocket relay on Linux has to do.
 *
 * One thread, level-triggered epoll, one recv() per readable connection and pass, and one send() per
 * target and pass: frames for the same target are coalesced. It checks no JSON and no signature:
 * the first text frame of a connection registers its `from`, every later one goes to its `to`.
 * What the gateway costs above this is what its checks and its language cost.
 *
 * Usage: floor [PORT]   Listens on 127.0.0.1, prints the port, ends on SIGTERM.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "_accept.h"

#define DID_CHARS 56              /* did:key of an Ed25519 key */
#define ROUTE_BITS 16             /* 65,536 slots for the few thousand DIDs of a run */
#define READ_BUFFER_BYTES 131072  /* holds one whole frame of the protocol's 64 KiB and more */
#define WRITE_QUEUE_BYTES 1048576 /* a target that is further behind is closed, as by the gateway */
#define PASS_EVENTS 1024

enum { OPCODE_TEXT = 0x1, OPCODE_CLOSE = 0x8 };

enum state { AWAITS_UPGRADE, AWAITS_REGISTER, REGISTERED };

struct route;

struct connection {
    int fd; /* -1: closed, freed at the end of the pass */
    enum state state;
    bool awaits_writable;
    bool dirty;                    /* is in the list of connections to flush */
    struct connection *next_dirty; /* also links the closed ones */
    struct route *route;
    uint8_t *held; /* the beginning of a frame whose rest has not arrived */
    size_t held_bytes;
    uint8_t *queue; /* frames to send; [queue_sent, queue_bytes) is still unsent */
    size_t queue_bytes, queue_sent, queue_capacity;
};

/* A slot is never given back: the same agents come again in every round. */
struct route {
    char did[DID_CHARS];
    bool taken;
    struct connection *connection;
};

static struct route routes[1 << ROUTE_BITS];
static size_t routes_taken;
static struct connection *dirty, *closed;
static uint8_t read_buffer[READ_BUFFER_BYTES + 1]; /* + 1: a NUL after the HTTP request */
static int epoll_fd;
static volatile sig_atomic_t stopping;

static void stop(int signal_number)
{
    (void)signal_number;
    stopping = 1;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* Return the slot of `did`, or the empty one where it belongs. */
static struct route *find_route(const char *did)
{
    uint64_t tail; /* the last characters of a key are as good as random */
    memcpy(&tail, did + DID_CHARS - sizeof tail, sizeof tail);
    size_t slot = tail * 0x9E3779B97F4A7C15u >> (64 - ROUTE_BITS);
    while (routes[slot].taken && memcmp(routes[slot].did, did, DID_CHARS) != 0)
        slot = (slot + 1) & ((1 << ROUTE_BITS) - 1);
    return &routes[slot];
}

static void close_connection(struct connection *c)
{
    if (c->fd < 0)
        return;
    close(c->fd);
    c->fd = -1;
    if (c->route && c->route->connection == c)
        c->route->connection = NULL;
    if (!c->dirty) {
        c->next_dirty = closed;
        closed = c;
    }
}

static void free_connection(struct connection *c)
{
    free(c->held);
    free(c->queue);
    free(c);
}

static void await(struct connection *c, bool writable)
{
    if (c->awaits_writable == writable)
        return;
    struct epoll_event event = {.events = EPOLLIN | (writable ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event) < 0)
        die("epoll_ctl");
    c->awaits_writable = writable;
}

/* Queue `bytes` for `c`; they leave at the end of the pass. */
static void enqueue(struct connection *c, const void *data, size_t bytes)
{
    if (c->queue_bytes + bytes > c->queue_capacity) {
        size_t capacity = c->queue_capacity ? c->queue_capacity : 1024;
        while (capacity < c->queue_bytes + bytes)
            capacity *= 2;
        uint8_t *queue = capacity > WRITE_QUEUE_BYTES ? NULL : realloc(c->queue, capacity);
        if (!queue) {
            close_connection(c);
            return;
        }
        c->queue = queue;
        c->queue_capacity = capacity;
    }
    memcpy(c->queue + c->queue_bytes, data, bytes);
    c->queue_bytes += bytes;
    if (!c->dirty) {
        c->dirty = true;
        c->next_dirty = dirty;
        dirty = c;
    }
}

/* Queue one unfragmented, unmasked text frame (RFC 6455 §5.2). */
static void enqueue_text(struct connection *c, const void *payload, size_t bytes)
{
    uint8_t header[10] = {0x80 | OPCODE_TEXT};
    size_t header_bytes;
    if (bytes < 126) {
        header[1] = (uint8_t)bytes;
        header_bytes = 2;
    } else if (bytes < 65536) {
        header[1] = 126;
        header[2] = (uint8_t)(bytes >> 8);
        header[3] = (uint8_t)bytes;
        header_bytes = 4;
    } else {
        header[1] = 127;
        for (int i = 0; i < 8; i++)
            header[2 + i] = (uint8_t)((uint64_t)bytes >> (56 - 8 * i));
        header_bytes = 10;
    }
    enqueue(c, header, header_bytes);
    if (c->fd >= 0)
        enqueue(c, payload, bytes);
}

static void flush(struct connection *c)
{
    ssize_t sent = send(c->fd, c->queue + c->queue_sent, c->queue_bytes - c->queue_sent, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EINTR) {
        close_connection(c);
        return;
    }
    if (sent > 0)
        c->queue_sent += (size_t)sent;
    bool rest = c->queue_sent < c->queue_bytes;
    if (!rest)
        c->queue_sent = c->queue_bytes = 0;
    await(c, rest);
}

/* Return the DID that follows `name` (`"from":"` or `"to":"`) in a message, or NULL. */
static const char *find_did(const uint8_t *message, size_t bytes, const char *name)
{
    const size_t name_bytes = strlen(name);
    const char *found = memmem(message, bytes, name, name_bytes);
    if (!found || (size_t)(found - (const char *)message) + name_bytes + DID_CHARS > bytes)
        return NULL;
    return found + name_bytes;
}

static void on_text(struct connection *c, const uint8_t *message, size_t bytes)
{
    static const char registered[] = "{\"type\":\"REGISTER\"}";
    const char *did = find_did(message, bytes, c->state == REGISTERED ? "\"to\":\"" : "\"from\":\"");
    if (!did) {
        close_connection(c);
        return;
    }
    struct route *route = find_route(did);
    if (c->state == REGISTERED) {
        /* The driver counts every message: one for an unknown target shows up there as lost. */
        if (route->connection)
            enqueue_text(route->connection, message, bytes);
        return;
    }
    if (!route->taken) {
        if (routes_taken == (1 << ROUTE_BITS) / 2) {
            close_connection(c);
            return;
        }
        routes_taken++;
        route->taken = true;
        memcpy(route->did, did, DID_CHARS);
    }
    route->connection = c;
    c->route = route;
    c->state = REGISTERED;
    enqueue_text(c, registered, sizeof registered - 1);
}

static void unmask(uint8_t *payload, size_t bytes, const uint8_t key[4])
{
    uint64_t key8, word;
    memcpy(&key8, key, 4);
    memcpy((uint8_t *)&key8 + 4, key, 4);
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
        memcpy(&word, payload + i, 8);
        word ^= key8;
        memcpy(payload + i, &word, 8);
    }
    for (; i < bytes; i++)
        payload[i] ^= key[i % 4];
}

/* Handle the frame at the start of `data`. Return its bytes, or 0 if it is not all there. */
static size_t on_frame(struct connection *c, uint8_t *data, size_t bytes)
{
    if (bytes < 2)
        return 0;
    size_t header = 2, payload = data[1] & 0x7f;
    if (payload == 126) {
        if (bytes < 4)
            return 0;
        payload = (size_t)data[2] << 8 | data[3];
        header = 4;
    }
    /* A 64-bit length, a fragment and an unmasked frame have no place in this benchmark. */
    if ((data[1] & 0x7f) == 127 || !(data[0] & 0x80) || !(data[1] & 0x80)) {
        close_connection(c);
        return 0;
    }
    if (bytes < header + 4 + payload)
        return 0;
    uint8_t *start = data + header + 4;
    if ((data[0] & 0x0f) == OPCODE_TEXT) {
        unmask(start, payload, data + header);
        on_text(c, start, payload);
    } else if ((data[0] & 0x0f) == OPCODE_CLOSE) {
        close_connection(c);
    }
    return header + 4 + payload;
}

/* Answer the HTTP request at the start of `data`. Return its bytes, or 0 if it is not all there. */
static size_t on_upgrade(struct connection *c, char *data)
{
    static const char key_name[] = "\r\nSec-WebSocket-Key: ";
    const char *end = strstr(data, "\r\n\r\n");
    if (!end)
        return 0;
    const char *key = strcasestr(data, key_name);
    if (!key || key + sizeof key_name - 1 + WEBSOCKET_KEY_CHARS > end) {
        close_connection(c);
        return 0;
    }
    char accept[WEBSOCKET_ACCEPT_CHARS + 1], response[256];
    websocket_accept(key + sizeof key_name - 1, accept);
    const char *offered = strcasestr(data, "\r\nSec-WebSocket-Protocol: ioap.v1");
    int length = snprintf(response, sizeof response,
                          "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                          "Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n%s\r\n",
                          accept, offered ? "Sec-WebSocket-Protocol: ioap.v1\r\n" : "");
    enqueue(c, response, (size_t)length);
    c->state = AWAITS_REGISTER;
    return (size_t)(end + 4 - data);
}

static void on_readable(struct connection *c)
{
    if (c->held_bytes)
        memcpy(read_buffer, c->held, c->held_bytes);
    ssize_t received = recv(c->fd, read_buffer + c->held_bytes, READ_BUFFER_BYTES - c->held_bytes, 0);
    if (received <= 0) {
        if (received == 0 || (errno != EAGAIN && errno != EINTR))
            close_connection(c);
        return;
    }
    size_t bytes = c->held_bytes + (size_t)received, done = 0, used;
    c->held_bytes = 0;
    read_buffer[bytes] = '\0';
    do {
        if (c->state == AWAITS_UPGRADE)
            used = on_upgrade(c, (char *)read_buffer + done);
        else
            used = on_frame(c, read_buffer + done, bytes - done);
        done += used;
    } while (used && c->fd >= 0);
    if (c->fd < 0 || done == bytes)
        return;

    uint8_t *held = realloc(c->held, bytes - done);
    if (!held || bytes - done == READ_BUFFER_BYTES) {
        close_connection(c);
        return;
    }
    c->held = held;
    c->held_bytes = bytes - done;
    memcpy(c->held, read_buffer + done, c->held_bytes);
}

static void on_accept(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return; /* the client has gone, or will be seen again in the next pass */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    struct connection *c = calloc(1, sizeof *c);
    if (!c)
        die("calloc");
    c->fd = fd;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

/* Listen on 127.0.0.1:`port` (0: a free one) and print the port. */
static int listen_on(uint16_t port)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t address_bytes = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0)
        die("socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0)
        die("bind");
    if (listen(listener, 1024) < 0)
        die("listen");
    if (getsockname(listener, (struct sockaddr *)&address, &address_bytes) < 0)
        die("getsockname");
    printf("%u\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

static void end_pass(void)
{
    while (dirty) {
        struct connection *c = dirty;
        dirty = c->next_dirty;
        c->dirty = false;
        if (c->fd >= 0) {
            flush(c);
        } else {
            c->next_dirty = closed;
            closed = c;
        }
    }
    while (closed) {
        struct connection *c = closed;
        closed = c->next_dirty;
        free_connection(c);
    }
}

int main(int argc, char **argv)
{
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = stop}, NULL);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        die("epoll_create1");
    int listener = listen_on(argc > 1 ? (uint16_t)atoi(argv[1]) : 0);
    struct epoll_event events[PASS_EVENTS] = {{.events = EPOLLIN, .data.ptr = NULL}};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &events[0]) < 0)
        die("epoll_ctl");

    while (!stopping) {
        int ready = epoll_wait(epoll_fd, events, PASS_EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c)
                on_accept(listener);
            else if (c->fd < 0)
                continue; /* closed earlier in this pass */
            else if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                on_readable(c);
            if (c && c->fd >= 0 && events[i].events & EPOLLOUT)
                flush(c);
        }
        end_pass();
    }
    return 0;
}
