/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's side of the socket device: one UNIX socket a connection, on the I/O thread, never blocking.
 *
 * An event says "look", never what is there: a slot may have been freed and taken again since it was collected.
 */
#include "virtio/vsock.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { ACCEPTS = 16 }; /* of one turn; more wait in the backlog */

/* Did the host's end write what was not read yet? A client may write, close, and count on it to arrive. */
static bool has_bytes(const struct vsock_connection *c)
{
    int n = 0;
    return ioctl(c->source.fd, FIONREAD, &n) == 0 && n > 0;
}

/* ---- bytes from the guest ---- */

/* The host's end takes no more. What is kept for it counts as taken, so that no credit is owed for it. */
static void refuse_bytes(struct vsock_connection *c)
{
    c->forwarded = c->received;
    if (c->state == VSOCK_LINGERING || c->host_shutdown & VSOCK_NO_RECEIVE)
        return;
    c->host_shutdown |= VSOCK_NO_RECEIVE;
    vsock_owe(c, VSOCK_SHUTDOWN);
}

static void taken(struct vsock_connection *c, uint32_t n)
{
    c->forwarded += n;
    /* Half the buffer: the guest never waits for the other half, and is told once in a while. */
    if (c->state == VSOCK_OPEN && c->forwarded - c->told >= VSOCK_BUFFER / 2)
        vsock_owe(c, VSOCK_CREDIT_UPDATE);
    if (vsock_kept(c) == 0 && c->guest_shutdown & VSOCK_NO_SEND)
        shutdown(c->source.fd, SHUT_WR);
}

/* Returns bytes taken; refuse_bytes was called if there will never be any more. */
static uint32_t send_some(struct vsock_connection *c, struct iovec *pieces, unsigned n)
{
    const struct msghdr message = {.msg_iov = pieces, .msg_iovlen = n};
    const ssize_t sent = sendmsg(c->source.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0)
        return (uint32_t)sent;
    if (errno != EAGAIN && errno != EINTR)
        refuse_bytes(c);
    return 0;
}

void vsock_forward(struct vsock_connection *c, const struct vmm_chain *chain, uint64_t at, uint32_t n)
{
    uint32_t direct = 0;
    if (vsock_kept(c) == 0 && n > 0 && !(c->host_shutdown & VSOCK_NO_RECEIVE)) {
        struct iovec pieces[VMM_CHAIN_PIECES];
        direct = send_some(c, pieces, vmm_chain_slice(chain, false, at, n, pieces));
        c->received += direct;
        taken(c, direct);
    }
    uint32_t left = n - direct;
    if (c->host_shutdown & VSOCK_NO_RECEIVE) {
        c->received += left;
        c->forwarded = c->received;
        return;
    }
    if (left > 0 && !c->buffer && !(c->buffer = malloc(VSOCK_BUFFER))) {
        vsock_reset(c);
        return;
    }
    while (left > 0) { /* twice at most: the buffer wraps once */
        const uint32_t start = c->received % VSOCK_BUFFER;
        const uint32_t part = left < VSOCK_BUFFER - start ? left : VSOCK_BUFFER - start;
        vmm_chain_read(chain, at + n - left, c->buffer + start, part);
        c->received += part;
        left -= part;
    }
}

static void flush(struct vsock_connection *c)
{
    if (vsock_kept(c) == 0)
        return;
    const uint32_t start = c->forwarded % VSOCK_BUFFER;
    const uint32_t first = vsock_kept(c) < VSOCK_BUFFER - start ? vsock_kept(c) : VSOCK_BUFFER - start;
    struct iovec pieces[2] = {{c->buffer + start, first}, {c->buffer, vsock_kept(c) - first}};
    taken(c, send_some(c, pieces, 2));
}

void vsock_guest_shut(struct vsock_connection *c)
{
    if (c->guest_shutdown & VSOCK_NO_RECEIVE)
        shutdown(c->source.fd, SHUT_RD);
    if (c->guest_shutdown & VSOCK_NO_SEND && vsock_kept(c) == 0)
        shutdown(c->source.fd, SHUT_WR);
}

/* ---- connections of the host ---- */

/* "CONNECT <port>\n", in decimal. The caller saw the newline. */
static bool parse_greeting(const char *line, size_t length, uint32_t *port)
{
    static const char word[] = "CONNECT ";
    const size_t at = sizeof word - 1;
    if (length < at + 2 || memcmp(line, word, at) != 0)
        return false;
    uint64_t value = 0;
    for (size_t i = at; i < length - 1; i++) {
        if (line[i] < '0' || line[i] > '9')
            return false;
        value = value * 10 + (uint64_t)(line[i] - '0'); /* the line is too short for it to wrap */
    }
    *port = (uint32_t)value;
    return value < UINT32_MAX; /* that one means "any" */
}

/* Reads to the newline and not beyond: what follows belongs to the stream. */
static void read_greeting(struct vsock_connection *c)
{
    char *end = c->line + c->line_length;
    const ssize_t seen = recv(c->source.fd, end, sizeof c->line - c->line_length, MSG_PEEK | MSG_DONTWAIT);
    if (seen < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (seen <= 0) {
        vsock_free(c);
        return;
    }
    const char *newline = memchr(end, '\n', (size_t)seen);
    const size_t whole = newline ? (size_t)(newline + 1 - end) : (size_t)seen;
    const ssize_t got = recv(c->source.fd, end, whole, MSG_DONTWAIT);
    if (got != (ssize_t)whole) {
        vsock_free(c);
        return;
    }
    c->line_length += (uint8_t)got;
    if (newline && parse_greeting(c->line, c->line_length, &c->guest_port)) {
        c->host_port = vsock_new_port(c->device);
        c->state = VSOCK_REQUESTED;
        vsock_owe(c, VSOCK_REQUEST);
    } else if (newline || c->line_length == sizeof c->line) {
        vsock_free(c);
    }
}

void vsock_greet_back(struct vsock_connection *c)
{
    char line[24];
    const int n = snprintf(line, sizeof line, "OK %u\n", c->host_port);
    c->state = VSOCK_OPEN;
    /* The first bytes into a socket: there is room for them, or nobody there, who may have left bytes. */
    if (send(c->source.fd, line, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) == n)
        return;
    if (has_bytes(c))
        refuse_bytes(c);
    else
        vsock_reset(c);
}

void vsock_end_ready(struct vmm_source *source, uint32_t events)
{
    struct vsock_connection *c = source->opaque;
    VMM_VIRTIO_LOCKED(&c->device->virtio);
    const bool hang_up = events & (EPOLLHUP | EPOLLERR) && c->watched >= 0;
    if (c->state == VSOCK_GREETING) {
        read_greeting(c);
    } else if (c->state == VSOCK_REQUESTED && hang_up && vsock_hung_up(c)) {
        if (!has_bytes(c))
            vsock_reset(c);
    } else if (c->state == VSOCK_LINGERING) {
        flush(c);
        if (vsock_kept(c) == 0)
            vsock_free(c);
    } else if (c->state == VSOCK_OPEN) {
        flush(c);
        if (vsock_may_receive(c))
            vsock_receive(c);
        const bool drained = c->host_shutdown & VSOCK_NO_SEND || c->guest_shutdown & VSOCK_NO_RECEIVE;
        if (c->state == VSOCK_OPEN && hang_up && drained && vsock_hung_up(c)) {
            c->host_shutdown = VSOCK_NEITHER;
            vsock_owe(c, VSOCK_SHUTDOWN);
            vsock_close(c);
            c->state = VSOCK_CLOSING;
        }
    }
    vsock_watch(c);
    vsock_settle(c->device);
}

void vsock_listener_ready(struct vmm_source *source, uint32_t events)
{
    (void)events;
    struct vmm_vsock *device = source->opaque;
    VMM_VIRTIO_LOCKED(&device->virtio);
    for (unsigned i = 0; i < ACCEPTS && device->listening; i++) {
        if (device->info.connections == VSOCK_CONNECTIONS) {
            vsock_listen(device, false); /* until one ends; the backlog holds the others */
            break;
        }
        const int fd = accept4(source->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
                vmm_vm_say(device->virtio.vm, "%s takes no connection on %s until one ends: %s",
                           device->virtio.name, device->path, strerror(errno));
                vsock_listen(device, false);
            }
            break;
        }
        vsock_watch(vsock_allocate(device, fd, VSOCK_GREETING));
    }
}

/* ---- connections of the guest ---- */

int vsock_connect(const struct vmm_vsock *device, uint32_t port)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s_%u", device->path, port);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0 &&
        connect(fd, (const struct sockaddr *)&address, sizeof address) == 0) /* at once, or never */
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}
