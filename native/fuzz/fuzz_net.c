/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-net between a guest and a peer that both know no rules: headers, buffers, commands and ring memory on one side,
 * bytes of the stream on the other. The I/O thread is parked; the input says when it would have run. What leaves for the
 * peer is parsed again: every length and header in it must be right, whatever went in.
 */
#include "ring.h"

#include "virtio/net.c" /* its handlers are called in the input's order */
#include "virtio/net_link.c"

#include <sys/socket.h>

#define NET_HEADER sizeof(struct vmm_net_header)
#define SLOTS 16
#define RINGS 0x100000ull
#define BUFFERS 0x200000ull
#define BUFFER_SIZE 0x11000u
#define TABLE 0x180000ull

enum step { TRANSMIT, BUFFER, COMMAND, RAW, FRAME, TCP, KICK, READY, READ, CLOSE, SCRIBBLE, RESTART, STEPS };

struct input {
    const uint8_t *at;
    size_t left;
};

static vmm_vm *vm;
static vmm_net *nets[2]; /* with and without headers on the stream */
static vmm_net *net;
static bool header;
static int peer;
static struct ring rings[3];
static bool sane; /* ring memory is as the driver left it */
static uint8_t wire[1 << 20];
static size_t wired;

static void take(struct input *in, void *to, size_t n)
{
    memset(to, 0, n);
    if (n > in->left)
        n = in->left;
    memcpy(to, in->at, n);
    in->at += n;
    in->left -= n;
}

static uint32_t number(struct input *in, size_t n)
{
    uint32_t value = 0;
    take(in, &value, n);
    return value;
}

static void quiet(void *opaque, unsigned queue)
{
    (void)opaque;
    (void)queue;
}
static void quiet_config(void *opaque)
{
    (void)opaque;
}
static void quiet_doorbells(void *opaque, bool on)
{
    (void)opaque;
    (void)on;
}
static const struct vmm_virtio_transport transport = {quiet, quiet_config, quiet_doorbells, quiet_config};

static void connect_peer(void)
{
    int sockets[2], small = 16384;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, sockets) == 0);
    setsockopt(sockets[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
    if (peer >= 0)
        close(peer);
    peer = sockets[1];
    wired = 0;
    CHECK_EQUAL(vmm_net_attach_stream(net, sockets[0], header), 0);
}

static void drive(uint32_t choice)
{
    struct vmm_virtio *dev = &net->virtio;
    uint64_t features = VMM_F_VERSION_1 | VMM_F_INDIRECT_DESC | dev->offered;
    features &= ~(VMM_F_EVENT_IDX | VMM_F_RING_PACKED);
    features |= choice & 1 ? VMM_F_EVENT_IDX : 0;
    features |= choice & 2 ? VMM_F_RING_PACKED : 0;
    for (unsigned bit = 0; bit < 24; bit++)
        if (choice >> 8 >> bit & 1)
            features &= ~(1ull << bit);
    vmm_virtio_write_status(dev, 0);
    vmm_virtio_write_status(dev, 3);
    vmm_virtio_driver_features(dev, 0, (uint32_t)features);
    vmm_virtio_driver_features(dev, 1, (uint32_t)(features >> 32));
    vmm_virtio_write_status(dev, 11);
    CHECK_EQUAL(dev->status, 11);
    const uint32_t of_ring =
        VMM_QUEUE_INDIRECT | (choice & 1 ? VMM_QUEUE_EVENT_IDX : 0) | (choice & 2 ? VMM_QUEUE_PACKED : 0);
    for (unsigned i = 0; i < 3; i++) {
        struct ring *ring = &rings[i];
        ring_init(ring, vm, RINGS + i * RING_BYTES, SLOTS, of_ring);
        struct vmm_virtqueue *q = vmm_virtio_queue(dev, i < 2 ? i : vmm_net_control_queue(net));
        ring_give(ring, &q->ring);
        vmm_virtqueue_enable(q);
    }
    vmm_virtio_write_status(dev, 15);
    CHECK(dev->running);
    sane = true;
}

static void kick(unsigned queue)
{
    if (net->virtio.running)
        net_kick(net, queue);
}

static void collect_used(void)
{
    int id;
    uint32_t written;
    for (unsigned i = 0; i < 3 && sane && net->virtio.running; i++)
        while (ring_collect(&rings[i], &id, &written))
            ;
}

/* What the peer reads is frames, each with a header that means what it may. */
static void read_peer(void)
{
    const ssize_t n = read(peer, wire + wired, sizeof(wire) - wired);
    if (n > 0)
        wired += (size_t)n;
    size_t at = 0;
    const uint32_t prefix = header ? NET_HEADER : 0;
    while (wired - at >= 4) {
        uint32_t length;
        memcpy(&length, wire + at, 4);
        length = be32toh(length);
        CHECK(length >= prefix + VMM_FRAME_MIN && length <= prefix + VMM_FRAME_MAX);
        if (wired - at - 4 < length)
            break;
        if (header) {
            struct vmm_net_header got, again;
            memcpy(&got, wire + at + 4, NET_HEADER);
            again = got;
            CHECK(vmm_net_header_check(&again, length - NET_HEADER, VMM_OFFLOAD_ALL));
            CHECK(!memcmp(&got, &again, NET_HEADER));
        }
        at += 4 + length;
    }
    memmove(wire, wire + at, wired - at);
    wired -= at;
}

static uint32_t tcp(uint8_t *to, struct input *in, struct vmm_net_header *h)
{
    const uint32_t choice = number(in, 2);
    const bool ipv6 = choice & 1;
    const uint32_t size = 94 + choice % 4000, start = ipv6 ? 54 : 34;
    memset(to, 0xa5, size);
    memcpy(to + 12, ipv6 ? "\x86\xdd\x60" : "\x08\x00\x45", 3);
    to[20] = to[21] = 0;
    to[ipv6 ? 20 : 23] = 6;
    to[start + 12] = (uint8_t)(choice >> 8 << 4);
    *h = (struct vmm_net_header){1, ipv6 ? 4 : 1, 0, (uint16_t)(48 + number(in, 1)), (uint16_t)start, 16, 0};
    for (unsigned n = number(in, 1) % 4; n--;) /* and something wrong with it */
        to[number(in, 1) % 94] = (uint8_t)number(in, 1);
    if (number(in, 1) % 8 == 0)
        take(in, h, NET_HEADER);
    return size;
}

static void send_to_device(const struct vmm_net_header *h, const uint8_t *bytes, uint32_t size)
{
    static uint8_t out[16 + VMM_FRAME_MAX];
    const uint32_t prefix = header ? NET_HEADER : 0, length = htobe32(size + prefix);
    memcpy(out, &length, 4);
    memcpy(out + 4, h, prefix);
    memcpy(out + 4 + prefix, bytes, size);
    ssize_t n = send(peer, out, 4 + prefix + size, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)n; /* as much as fits: the rest of the stream means something else then */
}

static void transmit_step(struct input *in)
{
    static unsigned next;
    const uint64_t at = BUFFERS + next++ % SLOTS * BUFFER_SIZE;
    uint8_t *frame = machine_at(vm, at, BUFFER_SIZE);
    const uint32_t how = number(in, 1), cut = 1 + number(in, 1);
    struct vmm_net_header h;
    uint32_t size = number(in, 2) % (BUFFER_SIZE - NET_HEADER);
    if (how & 1)
        size = tcp(frame + NET_HEADER, in, &h);
    else
        take(in, &h, NET_HEADER);
    memcpy(frame, &h, NET_HEADER);
    size = how & 2 ? cut : size + NET_HEADER;
    const struct piece pieces[] = {OUT(at, cut < size ? cut : size),
                                   {at + cut, cut < size ? size - cut : 1, how >> 2 & 1}};
    const unsigned n = cut < size || how & 4 ? 2 : 1;
    if (sane && how & 8)
        ring_offer_indirect(&rings[1], TABLE + next % SLOTS * 64, pieces, n);
    else if (sane)
        ring_offer(&rings[1], pieces, n);
}

static void step(struct input *in)
{
    static uint8_t bytes[VMM_FRAME_MAX];
    struct vmm_net_header h = {0};
    switch (number(in, 1) % STEPS) {
    case TRANSMIT:
        transmit_step(in);
        break;
    case BUFFER: {
        const uint32_t size = 1 + number(in, 2) % BUFFER_SIZE, out = number(in, 1) % 8 == 0;
        const struct piece pieces[] = {{BUFFERS + size % SLOTS * BUFFER_SIZE, size, true},
                                       {BUFFERS, 1 + size % 100, true}};
        if (sane)
            ring_offer(&rings[0], out ? pieces + 1 : pieces, out ? 1 : 1 + size % 2);
        break;
    }
    case COMMAND: {
        uint8_t *at = machine_at(vm, BUFFERS, 64);
        const uint32_t size = 1 + number(in, 1) % 40;
        take(in, at, size);
        const struct piece pieces[] = {OUT(BUFFERS, size), IN(BUFFERS + 64, 1)};
        if (sane)
            ring_offer(&rings[2], pieces, size % 8 ? 2 : 1);
        kick(vmm_net_control_queue(net));
        break;
    }
    case RAW: {
        const uint32_t size = number(in, 1) % 64;
        take(in, bytes, size);
        ssize_t n = send(peer, bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        (void)n;
        break;
    }
    case FRAME:
        take(in, &h, NET_HEADER);
        memset(bytes, 0x5a, sizeof(bytes));
        send_to_device(&h, bytes, number(in, 2) % (VMM_FRAME_MAX + 1));
        break;
    case TCP: {
        const uint32_t size = tcp(bytes, in, &h);
        send_to_device(&h, bytes, size);
        break;
    }
    case KICK:
        kick(number(in, 1) % 8);
        break;
    case READY:
        if (net->end)
            vmm_net_channel_ready(&net->channels[0].source,
                                  number(in, 1) % 2 ? EPOLLIN : EPOLLIN | EPOLLOUT | EPOLLHUP);
        break;
    case READ:
        read_peer();
        break;
    case CLOSE:
        connect_peer();
        break;
    case SCRIBBLE: {
        const uint32_t offset = number(in, 2) % (3 * RING_BYTES - 16), size = 1 + number(in, 1) % 16;
        take(in, machine_at(vm, RINGS + offset, size), size);
        sane = false;
        break;
    }
    case RESTART:
        drive(number(in, 4));
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!vm) {
        static const vmm_net_config configs[] = {{.pairs = 1}, {.pairs = 2, .offloads = 1, .mtu = 1500}};
        vm = machine_create();
        peer = -1;
        for (int i = 0; i < 2; i++) {
            CHECK_EQUAL(vmm_net_create(vm, "fuzzed", &configs[i], &nets[i]), 0);
            nets[i]->virtio.transport = &transport;
        }
        vmm_loop_pause(nets[0]->virtio.loop);
    }
    struct input in = {data, size};
    const uint32_t choice = number(&in, 4);
    header = choice >> 2 & 1;
    net = nets[header];
    VMM_VIRTIO_LOCKED(&net->virtio);
    connect_peer();
    drive(choice);
    for (unsigned steps = 0; in.left && steps < 200; steps++) {
        step(&in);
        collect_used();
    }
    read_peer();
    vmm_virtio_reset(&net->virtio);
    detach(net);
    return 0;
}
