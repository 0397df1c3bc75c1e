/* SPDX-License-Identifier: Apache-2.0 */
/* The socket device, and packets from the guest (virtio 1.2, 5.10). */
#include "virtio/vsock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { QUEUES = 3, QUEUE_SIZE = 128 };
enum { F_STREAM = 0 };
#define TURN (4u << 20) /* bytes from the guest in one turn on the I/O thread */

/* ---- packets from the guest ---- */

/* The packet belongs to no connection: RST to where it came from, unless it is one (5.10.6.4.1). */
static void refuse(struct vmm_vsock *device, const struct vsock_header *h)
{
    if (h->op != VSOCK_RST) /* transmit made sure of the room */
        device->refusals[device->refused++] =
            (struct vsock_refusal){h->dst_cid, h->dst_port, h->src_port, h->type};
}

static void open_from_guest(struct vmm_vsock *device, const struct vsock_header *h)
{
    const int fd = device->info.connections < VSOCK_CONNECTIONS ? vsock_connect(device, h->dst_port) : -1;
    if (fd < 0) {
        refuse(device, h);
        return;
    }
    struct vsock_connection *c = vsock_allocate(device, fd, VSOCK_OPEN);
    c->guest_port = h->src_port;
    c->host_port = h->dst_port;
    c->peer_alloc = h->buf_alloc;
    c->peer_fwd = h->fwd_cnt;
    device->info.from_guest++;
    vsock_owe(c, VSOCK_RESPONSE);
    vsock_watch(c);
}

/* Both directions have ended: the guest is done with it (5.10.6.6), what it sent is not. */
static void shut(struct vsock_connection *c, const struct vsock_header *h)
{
    c->guest_shutdown |= h->flags & VSOCK_NEITHER;
    if (c->guest_shutdown != VSOCK_NEITHER) {
        vsock_guest_shut(c);
        return;
    }
    refuse(c->device, h);
    vsock_forget_owed(c);
    if (c->received == c->forwarded) {
        vsock_free(c);
    } else {
        c->state = VSOCK_LINGERING;
        vsock_guest_shut(c);
    }
}

static void take_data(struct vsock_connection *c, const struct vsock_header *h, const struct vmm_chain *chain)
{
    if (c->guest_shutdown & VSOCK_NO_SEND || h->len > VSOCK_BUFFER - (c->received - c->forwarded))
        vsock_reset(c); /* after its own end, or beyond the credit it was given */
    else
        vsock_forward(c, chain, sizeof *h, h->len);
}

static void take_open(struct vsock_connection *c, const struct vsock_header *h, const struct vmm_chain *chain)
{
    switch (h->op) {
    case VSOCK_RW:
        return take_data(c, h, chain);
    case VSOCK_CREDIT_UPDATE:
        return;
    case VSOCK_CREDIT_REQUEST:
        return vsock_owe(c, VSOCK_CREDIT_UPDATE);
    case VSOCK_SHUTDOWN:
        return shut(c, h);
    default: /* REQUEST and RESPONSE had their time; the rest is unknown */
        return vsock_reset(c);
    }
}

static void take_packet(struct vsock_connection *c, const struct vsock_header *h,
                        const struct vmm_chain *chain)
{
    c->peer_alloc = h->buf_alloc;
    c->peer_fwd = h->fwd_cnt;
    if (vsock_credit(c) > 0)
        c->asked = false;
    if (h->op == VSOCK_RST) {
        vsock_free(c);
    } else if (c->state == VSOCK_OPEN) {
        take_open(c, h, chain);
    } else if (c->state == VSOCK_REQUESTED) {
        if (h->op == VSOCK_RESPONSE && !(c->owed & 1u << VSOCK_REQUEST)) {
            c->device->info.from_host++;
            vsock_greet_back(c);
        } else {
            vsock_reset(c);
        }
    } else if (h->op == VSOCK_SHUTDOWN || h->op == VSOCK_REQUEST) {
        vsock_reset(c); /* the host's end is gone: agree; or, the ports are not free yet */
    }
    vsock_watch(c);
}

static uint32_t transmit(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    (void)queue;
    struct vmm_vsock *device = opaque;
    if (device->refused == VSOCK_REFUSALS) {
        device->transmit_waits = true;
        return VMM_SERVE_LATER;
    }
    if (device->turn == 0) {
        vmm_virtqueue_ring(&device->virtio.queues[VSOCK_TRANSMIT]);
        return VMM_SERVE_LATER;
    }
    struct vsock_header h;
    if (vmm_chain_read(chain, 0, &h, sizeof h) != sizeof h || h.len > chain->out_size - sizeof h) {
        vmm_virtio_broken(&device->virtio, "a packet that its buffer of %llu bytes does not hold",
                          (unsigned long long)chain->out_size);
        return VMM_SERVE_LATER;
    }
    device->turn -= h.len < device->turn ? h.len : device->turn;
    const bool ours = h.src_cid == device->info.cid && h.dst_cid == VSOCK_HOST_CID && h.type == VSOCK_STREAM;
    struct vsock_connection *c = ours ? vsock_find(device, h.src_port, h.dst_port) : NULL;
    if (c)
        take_packet(c, &h, chain);
    else if (ours && h.op == VSOCK_REQUEST)
        open_from_guest(device, &h);
    else
        refuse(device, &h);
    return 0;
}

/* ---- the device ---- */

static void start(void *opaque)
{
    vsock_listen(opaque, true);
}

static void kick(void *opaque, uint32_t queue)
{
    struct vmm_vsock *device = opaque;
    device->turn = TURN;
    if (queue == VSOCK_TRANSMIT)
        vmm_virtio_serve(&device->virtio, VSOCK_TRANSMIT, transmit);
    if (queue == VSOCK_EVENT && device->reset_owed)
        vsock_send_event(device);
    vsock_settle(device);
    if (queue == VSOCK_RECEIVE) /* buffers came: who waited for them may read again */
        for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++)
            if (device->connections[i].starved) {
                device->connections[i].starved = false;
                vsock_watch(&device->connections[i]);
            }
}

static void end_all(struct vmm_vsock *device)
{
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++)
        if (device->connections[i].state != VSOCK_FREE)
            vsock_free(&device->connections[i]);
    device->refused = 0;
    device->transmit_waits = false;
}

static void stop(void *opaque)
{
    struct vmm_vsock *device = opaque;
    end_all(device);
    vsock_listen(device, false);
    device->reset_owed = false;
}

/* Whether there was anything between host and guest: sockets are this process's, none is saved. */
static void save(void *opaque, uint64_t *own)
{
    const struct vmm_vsock *device = opaque;
    own[0] = device->info.connections || device->refused || device->reset_owed;
}

static int load(void *opaque, const uint64_t *own)
{
    struct vmm_vsock *device = opaque;
    if (own[0] > 1)
        return vmm_error_set(-EINVAL, "%s: connected is 0 or 1", device->virtio.name);
    if (own[0])
        vmm_vsock_disconnect(device);
    return 0;
}

/* A copy of the saved machine has an address of its own, which a driver reads again at the event (5.10.6.7). */
static void resumed(void *opaque)
{
    struct vmm_vsock *device = opaque;
    if (!memcmp(device->virtio.config, &device->info.cid, sizeof device->info.cid))
        return;
    vmm_virtio_set_config(&device->virtio, 0, &device->info.cid, sizeof device->info.cid);
    device->reset_owed = true;
    vmm_virtqueue_ring(&device->virtio.queues[VSOCK_EVENT]);
}

static const vmm_virtio_ops ops = {
    .start = start, .kick = kick, .stop = stop, .save = save, .load = load, .resumed = resumed};

int vmm_vsock_create(vmm_vm *vm, const char *name, uint64_t cid, const char *path, int listener,
                     vmm_vsock **out)
{
    if (cid <= VSOCK_HOST_CID || cid >= UINT32_MAX || strlen(path) >= VSOCK_PATH)
        return vmm_error_set(-EINVAL, "%s: cid %llu on %s", name, (unsigned long long)cid, path);
    struct vmm_vsock *device = calloc(1, sizeof *device);
    if (!device)
        return vmm_error_set(-ENOMEM, "%s", name);
    const uint16_t sizes[QUEUES] = {QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE};
    const int rc = vmm_virtio_init(&device->virtio, vm, &ops, device, 19, name, 1u << F_STREAM, QUEUES, sizes,
                                   sizeof device->info.cid);
    if (rc < 0) {
        free(device);
        return rc;
    }
    device->info.cid = cid;
    memcpy(device->virtio.config, &cid, sizeof cid); /* virtio 1.2, 5.10.4 */
    snprintf(device->path, sizeof device->path, "%s", path);
    device->listener = (struct vmm_source){.fd = listener, .ready = vsock_listener_ready, .opaque = device};
    device->end_ready = vsock_end_ready;
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++)
        device->connections[i] = (struct vsock_connection){.device = device, .source.fd = -1, .watched = -1};
    *out = device;
    return 0;
}

void vmm_vsock_destroy(vmm_vsock *device)
{
    if (!device)
        return;
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++) {
        if (device->connections[i].source.fd >= 0)
            close(device->connections[i].source.fd);
        free(device->connections[i].buffer);
    }
    close(device->listener.fd);
    vmm_virtio_deinit(&device->virtio);
    free(device);
}

vmm_virtio *vmm_vsock_virtio(vmm_vsock *device)
{
    return &device->virtio;
}

void vmm_vsock_disconnect(vmm_vsock *device)
{
    VMM_VIRTIO_LOCKED(&device->virtio);
    end_all(device);
    device->reset_owed = true;
    vmm_virtqueue_ring(&device->virtio.queues[VSOCK_EVENT]);
}

void vmm_vsock_get_info(vmm_vsock *device, vmm_vsock_info *info)
{
    VMM_VIRTIO_LOCKED(&device->virtio);
    *info = device->info;
}
