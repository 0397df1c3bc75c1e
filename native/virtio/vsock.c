/* SPDX-License-Identifier: Apache-2.0 */
/* The guest's side of the socket device: packets, credit, and the table of connections (virtio 1.2, 5.10). */
#include "virtio/vsock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RECEIVE = 0, TRANSMIT = 1, EVENT = 2, QUEUES = 3, QUEUE_SIZE = 128 };
enum { F_STREAM = 0 };
enum { TYPE_STREAM = 1, EVENT_TRANSPORT_RESET = 0 };
#define TURN (4u << 20)        /* bytes from the guest in one turn on the I/O thread */
enum { PACKETS = 64 };         /* to the guest, of one connection in one turn */
#define PACKET_MAX (64u << 10) /* data in one packet to the guest */

/* ---- connections ---- */

uint32_t vsock_credit(const struct vsock_connection *c)
{
    const uint32_t outstanding = c->sent - c->peer_fwd;
    return outstanding < c->peer_alloc ? c->peer_alloc - outstanding : 0;
}

static void forget_owed(struct vsock_connection *c)
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

void vsock_free(struct vsock_connection *c)
{
    forget_owed(c);
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
    forget_owed(c);
    vsock_close(c);
    c->state = VSOCK_RESETTING;
    vsock_owe(c, VSOCK_RST);
}

/* The guest's (guest_port, host_port): those it may speak of. A lingering connection is none of its any more. */
static struct vsock_connection *find(struct vmm_vsock *device, uint32_t guest_port, uint32_t host_port)
{
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++) {
        struct vsock_connection *c = &device->connections[i];
        if (c->guest_port == guest_port && c->host_port == host_port && c->state >= VSOCK_REQUESTED &&
            c->state <= VSOCK_RESETTING)
            return c;
    }
    return NULL;
}

/* ---- packets to the guest ---- */

/* A buffer for a packet with at least `data` bytes behind its header. false: there is none, and a doorbell will ring. */
static bool take_buffer(struct vmm_vsock *device, struct vmm_chain *chain, uint32_t data)
{
    struct vmm_queue *ring = &device->virtio.queues[RECEIVE].ring;
    vmm_queue_suppress(ring);
    while (!vmm_virtio_pop(&device->virtio, RECEIVE, chain))
        if (!device->virtio.running || !vmm_queue_arm(ring))
            return false;
    if (chain->in_size >= sizeof(struct vsock_header) + data)
        return true;
    vmm_virtio_broken(&device->virtio, "a receive buffer of %llu bytes holds no packet",
                      (unsigned long long)chain->in_size);
    return false;
}

static void send_packet(struct vmm_vsock *device, const struct vmm_chain *chain, struct vsock_header *header)
{
    header->dst_cid = device->info.cid;
    header->buf_alloc = VSOCK_BUFFER;
    vmm_chain_write(chain, 0, header, sizeof *header);
    vmm_queue_push(&device->virtio.queues[RECEIVE].ring, chain, (uint32_t)sizeof *header + header->len);
}

static void send_of(struct vsock_connection *c, const struct vmm_chain *chain, enum vsock_op op,
                    uint32_t flags, uint32_t len)
{
    struct vsock_header header = {
        .src_cid = VSOCK_HOST_CID,
        .src_port = c->host_port,
        .dst_port = c->guest_port,
        .len = len,
        .type = TYPE_STREAM,
        .op = op,
        .flags = flags,
        .fwd_cnt = c->forwarded,
    };
    c->told = c->forwarded;
    send_packet(c->device, chain, &header);
}

void vsock_receive(struct vsock_connection *c)
{
    struct vmm_vsock *device = c->device;
    for (unsigned i = 0; i < PACKETS; i++) {
        uint32_t n = vsock_credit(c);
        if (n == 0) {
            if (!c->asked)
                vsock_owe(c, VSOCK_CREDIT_REQUEST);
            c->asked = true;
            return;
        }
        const struct vmm_queue_mark mark = vmm_queue_mark(&device->virtio.queues[RECEIVE].ring);
        struct vmm_chain chain;
        if (!take_buffer(device, &chain, 1)) {
            c->starved = true; /* until the receive queue's doorbell */
            return;
        }
        n = n < PACKET_MAX ? n : PACKET_MAX;
        struct iovec pieces[VMM_CHAIN_PIECES];
        const unsigned n_pieces = vmm_chain_slice(&chain, true, sizeof(struct vsock_header), n, pieces);
        const ssize_t got = readv(c->source.fd, pieces, (int)n_pieces);
        if (got > 0) {
            c->sent += (uint32_t)got;
            send_of(c, &chain, VSOCK_RW, 0, (uint32_t)got);
            continue;
        }
        const int error = errno;
        vmm_queue_rewind(&device->virtio.queues[RECEIVE].ring, mark);
        if (got == 0 || error == ECONNRESET) { /* the latter: closed with bytes of ours unread */
            c->host_shutdown |= got == 0 ? VSOCK_NO_SEND : VSOCK_NEITHER;
            vsock_owe(c, VSOCK_SHUTDOWN);
        } else if (error != EAGAIN && error != EINTR) {
            vsock_reset(c);
        }
        return;
    }
}

/* One packet a connection owes, in an order in which each makes sense after the one before. */
static void send_owed(struct vsock_connection *c, const struct vmm_chain *chain)
{
    static const enum vsock_op order[] = {VSOCK_RST,           VSOCK_REQUEST,        VSOCK_RESPONSE,
                                          VSOCK_CREDIT_UPDATE, VSOCK_CREDIT_REQUEST, VSOCK_SHUTDOWN};
    unsigned i = 0;
    while (!(c->owed & 1u << order[i]))
        i++;
    const uint16_t owed =
        c->owed & (uint16_t) ~(1u << order[i] | 1u << VSOCK_CREDIT_UPDATE); /* in every header */
    forget_owed(c);
    if (owed) {
        c->owed = owed;
        c->device->owing++;
    }
    send_of(c, chain, order[i], order[i] == VSOCK_SHUTDOWN ? c->host_shutdown : 0, 0);
    if (order[i] == VSOCK_RST) {
        c->device->info.resets++;
        vsock_free(c);
    } else {
        vsock_watch(c); /* data may follow a RESPONSE */
    }
}

static void send_refusal(struct vmm_vsock *device, const struct vmm_chain *chain)
{
    const struct vsock_refusal *refusal = &device->refusals[--device->refused];
    struct vsock_header header = {
        .src_cid = refusal->src_cid,
        .src_port = refusal->src_port,
        .dst_port = refusal->dst_port,
        .type = refusal->type,
        .op = VSOCK_RST,
    };
    device->info.resets++;
    send_packet(device, chain, &header);
}

static void send_event(struct vmm_vsock *device)
{
    struct vmm_chain chain;
    if (!vmm_virtio_pop(&device->virtio, EVENT, &chain))
        return; /* until its doorbell */
    const uint32_t event = EVENT_TRANSPORT_RESET;
    if (vmm_chain_write(&chain, 0, &event, sizeof event) != sizeof event) {
        vmm_virtio_broken(&device->virtio, "an event buffer of %llu bytes",
                          (unsigned long long)chain.in_size);
        return;
    }
    device->reset_owed = false;
    vmm_queue_push(&device->virtio.queues[EVENT].ring, &chain, sizeof event);
    vmm_virtio_publish(&device->virtio, EVENT);
}

void vsock_settle(struct vmm_vsock *device)
{
    struct vmm_virtio *dev = &device->virtio;
    struct vmm_chain chain;
    while (device->refused > 0 && take_buffer(device, &chain, 0))
        send_refusal(device, &chain);
    while (device->owing > 0 && take_buffer(device, &chain, 0)) {
        while (!device->connections[device->next_owed].owed) /* ends: one does */
            device->next_owed = (device->next_owed + 1) % VSOCK_CONNECTIONS;
        send_owed(&device->connections[device->next_owed], &chain);
        device->next_owed = (device->next_owed + 1) % VSOCK_CONNECTIONS;
    }
    if (dev->running)
        vmm_virtio_publish(dev, RECEIVE);
    if (device->transmit_waits && device->refused < VSOCK_REFUSALS) {
        device->transmit_waits = false;
        vmm_virtqueue_ring(&dev->queues[TRANSMIT]);
    }
}

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
    forget_owed(c);
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
        vmm_virtqueue_ring(&device->virtio.queues[TRANSMIT]);
        return VMM_SERVE_LATER;
    }
    struct vsock_header h;
    if (vmm_chain_read(chain, 0, &h, sizeof h) != sizeof h || h.len > chain->out_size - sizeof h) {
        vmm_virtio_broken(&device->virtio, "a packet that its buffer of %llu bytes does not hold",
                          (unsigned long long)chain->out_size);
        return VMM_SERVE_LATER;
    }
    device->turn -= h.len < device->turn ? h.len : device->turn;
    const bool ours = h.src_cid == device->info.cid && h.dst_cid == VSOCK_HOST_CID && h.type == TYPE_STREAM;
    struct vsock_connection *c = ours ? find(device, h.src_port, h.dst_port) : NULL;
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
    if (queue == TRANSMIT)
        vmm_virtio_serve(&device->virtio, TRANSMIT, transmit);
    if (queue == EVENT && device->reset_owed)
        send_event(device);
    vsock_settle(device);
    if (queue == RECEIVE) /* buffers came: who waited for them may read again */
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
    vmm_virtqueue_ring(&device->virtio.queues[EVENT]);
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
    device->listener.fd = listener;
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
    vmm_virtqueue_ring(&device->virtio.queues[EVENT]);
}

void vmm_vsock_get_info(vmm_vsock *device, vmm_vsock_info *info)
{
    VMM_VIRTIO_LOCKED(&device->virtio);
    *info = device->info;
}
