/* SPDX-License-Identifier: Apache-2.0 */
/* The table of connections: its slots, what each owes the guest, and what is watched of its end on the host. */
#include "virtio/vsock.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { FIRST_PORT = 1 << 30 };

/* ---- what is known of a connection ---- */

uint32_t vsock_credit(const struct vsock_connection *c)
{
    const uint32_t outstanding = c->sent - c->peer_fwd;
    return outstanding < c->peer_alloc ? c->peer_alloc - outstanding : 0;
}

uint32_t vsock_kept(const struct vsock_connection *c)
{
    return c->received - c->forwarded;
}

/* Does the host's end hang up, really and now? */
bool vsock_hung_up(const struct vsock_connection *c)
{
    struct pollfd end = {.fd = c->source.fd};
    return poll(&end, 1, 0) == 1 && end.revents & (POLLHUP | POLLERR);
}

bool vsock_may_receive(const struct vsock_connection *c)
{
    return c->state == VSOCK_OPEN && !(c->host_shutdown & VSOCK_NO_SEND) &&
           !(c->guest_shutdown & VSOCK_NO_RECEIVE) && !(c->owed & 1 << VSOCK_RESPONSE) && !c->starved &&
           vsock_credit(c) > 0;
}

/* The guest's (guest_port, host_port): those it may speak of. A lingering connection is none of its any more. */
struct vsock_connection *vsock_find(struct vmm_vsock *device, uint32_t guest_port, uint32_t host_port)
{
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++) {
        struct vsock_connection *c = &device->connections[i];
        if (c->guest_port == guest_port && c->host_port == host_port && c->state >= VSOCK_REQUESTED &&
            c->state <= VSOCK_RESETTING)
            return c;
    }
    return NULL;
}

/* ---- what is owed to the guest ---- */

void vsock_forget_owed(struct vsock_connection *c)
{
    if (c->owed)
        c->device->owing--;
    c->owed = 0;
}

void vsock_owe(struct vsock_connection *c, enum vsock_op op)
{
    if (!c->owed)
        c->device->owing++;
    c->owed |= 1u << op;
}

/* ---- what is watched ---- */

/*
 * Zero waits for the hang-up alone, which cannot be masked: only where it is acted upon. While bytes of the host
 * may lie before it and cannot be read now, nothing is watched.
 */
static int wanted(const struct vsock_connection *c)
{
    switch (c->state) {
    case VSOCK_GREETING:
        return EPOLLIN;
    case VSOCK_REQUESTED:
        return vsock_hung_up(c) ? -1 : 0; /* with bytes: they wait for the guest's answer */
    case VSOCK_LINGERING:
        return EPOLLOUT;
    case VSOCK_OPEN: {
        const int events = (vsock_may_receive(c) ? EPOLLIN : 0) | (vsock_kept(c) > 0 ? EPOLLOUT : 0);
        const bool drained = c->host_shutdown & VSOCK_NO_SEND || c->guest_shutdown & VSOCK_NO_RECEIVE;
        return events || drained ? events : -1;
    }
    default:
        return -1;
    }
}

void vsock_watch(struct vsock_connection *c)
{
    vmm_loop *loop = c->device->virtio.loop;
    const int events = wanted(c);
    if (events == c->watched)
        return;
    int rc = 0;
    if (events < 0)
        vmm_loop_remove(loop, &c->source);
    else
        rc = c->watched < 0 ? vmm_loop_add(loop, &c->source, (uint32_t)events)
                            : vmm_loop_modify(loop, &c->source, (uint32_t)events);
    c->watched = rc < 0 ? -1 : events;
    if (rc < 0)
        vsock_reset(c); /* the host is out of memory for watches */
}

void vsock_listen(struct vmm_vsock *device, bool on)
{
    if (on == device->listening)
        return;
    if (!on)
        vmm_loop_remove(device->virtio.loop, &device->listener);
    device->listening = on && vmm_loop_add(device->virtio.loop, &device->listener, EPOLLIN) == 0;
}

/* ---- slots ---- */

struct vsock_connection *vsock_allocate(struct vmm_vsock *device, int fd, enum vsock_state state)
{
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++) {
        struct vsock_connection *c = &device->connections[i];
        if (c->state != VSOCK_FREE)
            continue;
        *c = (struct vsock_connection){.device = device, .watched = -1, .state = state};
        c->source.fd = fd;
        c->source.ready = device->end_ready;
        c->source.opaque = c;
        device->info.connections++;
        return c;
    }
    return NULL;
}

void vsock_close(struct vsock_connection *c)
{
    if (c->source.fd < 0)
        return;
    vmm_loop_remove(c->device->virtio.loop, &c->source);
    close(c->source.fd);
    c->source.fd = c->watched = -1;
    free(c->buffer);
    c->buffer = NULL;
    c->forwarded = c->received;
}

void vsock_free(struct vsock_connection *c)
{
    vsock_forget_owed(c);
    vsock_close(c);
    c->state = VSOCK_FREE;
    c->device->info.connections--;
    vsock_listen(c->device, c->device->virtio.running);
}

void vsock_reset(struct vsock_connection *c)
{
    if (c->state == VSOCK_GREETING || c->owed & 1u << VSOCK_REQUEST) {
        vsock_free(c); /* the guest never heard of it */
        return;
    }
    vsock_forget_owed(c);
    vsock_close(c);
    c->state = VSOCK_RESETTING;
    vsock_owe(c, VSOCK_RST);
}

/* ---- ports ---- */

static bool port_taken(const struct vmm_vsock *device, uint32_t port)
{
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++)
        if (device->connections[i].state != VSOCK_FREE && device->connections[i].host_port == port)
            return true;
    return false;
}

uint32_t vsock_new_port(struct vmm_vsock *device)
{
    do { /* ends: there are fewer connections than ports */
        device->next_port = FIRST_PORT | (device->next_port + 1);
    } while (port_taken(device, device->next_port) || device->next_port == UINT32_MAX);
    return device->next_port;
}
