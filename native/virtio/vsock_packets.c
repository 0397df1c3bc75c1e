/* SPDX-License-Identifier: Apache-2.0 */
/* Packets to the guest: data as there is credit, and what is owed (virtio 1.2, 5.10.6). */
#include "virtio/vsock.h"

#include <errno.h>
#include <sys/uio.h>

enum { EVENT_TRANSPORT_RESET = 0 };
enum { PACKETS = 64 };         /* to the guest, of one connection in one turn */
#define PACKET_MAX (64u << 10) /* data in one packet to the guest */

/* A buffer for a packet with at least `data` bytes behind its header. false: there is none, and a doorbell will ring. */
static bool take_buffer(struct vmm_vsock *device, struct vmm_chain *chain, uint32_t data)
{
    struct vmm_queue *ring = &device->virtio.queues[VSOCK_RECEIVE].ring;
    vmm_queue_suppress(ring);
    while (!vmm_virtio_pop(&device->virtio, VSOCK_RECEIVE, chain))
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
    vmm_queue_push(&device->virtio.queues[VSOCK_RECEIVE].ring, chain, (uint32_t)sizeof *header + header->len);
}

static void send_of(struct vsock_connection *c, const struct vmm_chain *chain, enum vsock_op op,
                    uint32_t flags, uint32_t len)
{
    struct vsock_header header = {
        .src_cid = VSOCK_HOST_CID,
        .src_port = c->host_port,
        .dst_port = c->guest_port,
        .len = len,
        .type = VSOCK_STREAM,
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
        const struct vmm_queue_mark mark = vmm_queue_mark(&device->virtio.queues[VSOCK_RECEIVE].ring);
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
        vmm_queue_rewind(&device->virtio.queues[VSOCK_RECEIVE].ring, mark);
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
    vsock_forget_owed(c);
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

void vsock_send_event(struct vmm_vsock *device)
{
    struct vmm_chain chain;
    if (!vmm_virtio_pop(&device->virtio, VSOCK_EVENT, &chain))
        return; /* until its doorbell */
    const uint32_t event = EVENT_TRANSPORT_RESET;
    if (vmm_chain_write(&chain, 0, &event, sizeof event) != sizeof event) {
        vmm_virtio_broken(&device->virtio, "an event buffer of %llu bytes",
                          (unsigned long long)chain.in_size);
        return;
    }
    device->reset_owed = false;
    vmm_queue_push(&device->virtio.queues[VSOCK_EVENT].ring, &chain, sizeof event);
    vmm_virtio_publish(&device->virtio, VSOCK_EVENT);
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
        vmm_virtio_publish(dev, VSOCK_RECEIVE);
    if (device->transmit_waits && device->refused < VSOCK_REFUSALS) {
        device->transmit_waits = false;
        vmm_virtqueue_ring(&dev->queues[VSOCK_TRANSMIT]);
    }
}
