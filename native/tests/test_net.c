/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-net: its driver's side through rings, its host end through sockets (virtio 1.2, 5.1). */
#include "ring.h"

#include "net/offload.h"
#include "virtio/net.h"

#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

#define RINGS 0x100000ull   /* rings, RING_BYTES each */
#define BUFFERS 0x200000ull /* a slot for every descriptor of every ring */
#define SLOT 0x11000ull
#define SLOTS 64
#define ALL_OFFLOADS                                                                                         \
    (1ull << VMM_NET_F_CSUM | 1ull << VMM_NET_F_GUEST_CSUM | 1ull << VMM_NET_F_CTRL_GUEST_OFFLOADS |         \
     1ull << VMM_NET_F_GUEST_TSO4 | 1ull << VMM_NET_F_GUEST_TSO6 | 1ull << VMM_NET_F_GUEST_ECN |             \
     1ull << VMM_NET_F_HOST_TSO4 | 1ull << VMM_NET_F_HOST_TSO6 | 1ull << VMM_NET_F_HOST_ECN)
#define PLAIN (1ull << VMM_NET_F_MRG_RXBUF | 1ull << VMM_NET_F_STATUS | 1ull << VMM_NET_F_MAC)
#define CONTROL                                                                                              \
    (1ull << VMM_NET_F_CTRL_VQ | 1ull << VMM_NET_F_CTRL_RX | 1ull << VMM_NET_F_CTRL_MAC_ADDR |               \
     1ull << VMM_NET_F_MQ)

enum { RX, TX, CTRL };

struct bench {
    vmm_vm *vm;
    vmm_net *net;
    vmm_virtio *dev;
    int peer;
    int interrupt; /* eventfd: any interrupt */
    _Atomic int configured, said;
    uint32_t ring_features;
    uint64_t driver; /* device features it agrees to */
    unsigned control;
    struct ring rings[3];
};

/* ---- transport: everything goes to one eventfd ---- */

static void on_queue(void *opaque, unsigned queue)
{
    (void)queue;
    CHECK(eventfd_write(((struct bench *)opaque)->interrupt, 1) == 0);
}
static void on_config(void *opaque)
{
    struct bench *b = opaque;
    b->configured++;
    CHECK(eventfd_write(b->interrupt, 1) == 0);
}
static void on_doorbells(void *opaque, bool on)
{
    (void)opaque;
    (void)on;
}
static void on_reset(void *opaque)
{
    (void)opaque;
}
static const struct vmm_virtio_transport transport = {on_queue, on_config, on_doorbells, on_reset};

static void say(void *opaque, const char *text)
{
    CHECK(text[0]);
    ((struct bench *)opaque)->said++;
}

/* ---- the driver ---- */

static void set_status(struct bench *b, uint8_t status)
{
    VMM_VIRTIO_LOCKED(b->dev);
    vmm_virtio_write_status(b->dev, status);
}

static void place(struct bench *b, unsigned queue, struct ring *ring)
{
    VMM_VIRTIO_LOCKED(b->dev);
    struct vmm_virtqueue *q = vmm_virtio_queue(b->dev, queue);
    vmm_virtqueue_size(q, ring->size);
    const uint64_t areas[] = {ring->desc, ring->driver, ring->device};
    for (int i = 0; i < 3; i++) {
        vmm_virtqueue_area(q, i, false, (uint32_t)areas[i]);
        vmm_virtqueue_area(q, i, true, (uint32_t)(areas[i] >> 32));
    }
    vmm_virtqueue_enable(q);
}

static void drive(struct bench *b)
{
    uint64_t features = b->driver | VMM_F_VERSION_1 | VMM_F_INDIRECT_DESC;
    features |= b->ring_features & VMM_QUEUE_PACKED ? VMM_F_RING_PACKED : 0;
    features |= b->ring_features & VMM_QUEUE_EVENT_IDX ? VMM_F_EVENT_IDX : 0;
    set_status(b, 0);
    set_status(b, 1);
    set_status(b, 3);
    {
        VMM_VIRTIO_LOCKED(b->dev);
        vmm_virtio_driver_features(b->dev, 0, (uint32_t)features);
        vmm_virtio_driver_features(b->dev, 1, (uint32_t)(features >> 32));
    }
    set_status(b, 11);
    b->control = b->driver & 1ull << VMM_NET_F_MQ ? 4 : 2;
    for (unsigned i = 0; i < 3; i++) {
        ring_init(&b->rings[i], b->vm, RINGS + i * RING_BYTES, SLOTS, b->ring_features | VMM_QUEUE_INDIRECT);
        place(b, i == CTRL ? b->control : i, &b->rings[i]);
    }
    set_status(b, 15);
    CHECK(b->dev->running);
}

static void setup_with(struct bench *b, uint32_t ring_features, uint64_t driver, vmm_net_config config)
{
    memset(b, 0, sizeof(*b));
    b->vm = machine_create();
    vmm_vm_on_message(b->vm, say, b);
    b->interrupt = eventfd(0, 0);
    b->ring_features = ring_features;
    b->driver = driver;
    machine_add(b->vm, 0x200000000ull, 3 * SLOTS * SLOT, 0);
    CHECK_EQUAL(vmm_net_create(b->vm, "virtio-net0", &config, &b->net), 0);
    b->dev = vmm_net_virtio(b->net);
    b->dev->transport = &transport;
    b->dev->transport_opaque = b;
    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    b->peer = sockets[1];
    CHECK_EQUAL(vmm_net_attach_stream(b->net, sockets[0], config.offloads), 0);
    drive(b);
}

static const vmm_net_config linked = {.mac = {2, 0, 0, 0, 0, 1}, .pairs = 2, .offloads = 1, .mtu = 1500};
static const vmm_net_config bare = {.mac = {2, 0, 0, 0, 0, 1}, .pairs = 1};

static void teardown(struct bench *b)
{
    vmm_virtio_reset(b->dev);
    vmm_vm_destroy(b->vm);
    vmm_net_destroy(b->net);
    if (b->peer >= 0)
        close(b->peer);
    close(b->interrupt);
}

static uint64_t slot(unsigned queue, unsigned i)
{
    return 0x200000000ull + (queue * SLOTS + i) * SLOT;
}

static void ring_bell(struct bench *b, unsigned queue)
{
    if (ring_doorbell(&b->rings[queue]))
        vmm_virtio_ring(b->dev, queue == CTRL ? b->control : queue);
}

static void wait_interrupt(struct bench *b)
{
    struct pollfd poll_fd = {.fd = b->interrupt, .events = POLLIN};
    CHECK_EQUAL(poll(&poll_fd, 1, PATIENCE_MS), 1);
    eventfd_t count;
    CHECK(eventfd_read(b->interrupt, &count) == 0);
}

static uint32_t collect(struct bench *b, unsigned queue, int *id)
{
    uint32_t written;
    while (!ring_collect(&b->rings[queue], id, &written))
        if (!ring_arm(&b->rings[queue]))
            wait_interrupt(b);
    return written;
}

static void wait_broken(struct bench *b)
{
    while (!(b->dev->status & VMM_STATUS_NEEDS_RESET))
        wait_interrupt(b);
    CHECK_EQUAL(b->said, 1);
}

static vmm_net_counts counts(struct bench *b)
{
    vmm_net_counts c;
    CHECK_EQUAL(vmm_net_get_counts(b->net, 0, &c), 0);
    return c;
}

static int offer_buffer(struct bench *b, unsigned i, uint32_t size)
{
    struct piece piece = IN(slot(RX, i), size);
    return ring_offer(&b->rings[RX], &piece, 1);
}

/* Header and frame in two pieces, so that the split between them is nowhere special. */
static void offer_frame(struct bench *b, unsigned i, struct vmm_net_header header, const void *frame,
                        uint32_t size)
{
    const uint64_t at = slot(TX, i);
    memcpy(machine_at(b->vm, at, sizeof(header)), &header, sizeof(header));
    memcpy(machine_at(b->vm, at + sizeof(header), size), frame, size);
    struct piece pieces[] = {OUT(at, 5), OUT(at + 5, (uint32_t)(size + sizeof(header) - 5))};
    CHECK(ring_offer(&b->rings[TX], pieces, 2) >= 0);
}

/* ---- the peer ---- */

static void peer_read(struct bench *b, void *to, size_t n)
{
    struct pollfd poll_fd = {.fd = b->peer, .events = POLLIN};
    for (size_t at = 0; at < n;) {
        CHECK_EQUAL(poll(&poll_fd, 1, PATIENCE_MS), 1);
        const ssize_t got = read(b->peer, (uint8_t *)to + at, n - at);
        CHECK(got > 0);
        at += (size_t)got;
    }
}

static uint32_t peer_receive(struct bench *b, struct vmm_net_header *header, uint8_t *frame)
{
    uint32_t length;
    peer_read(b, &length, 4);
    length = be32toh(length);
    if (header) {
        peer_read(b, header, sizeof(*header));
        length -= sizeof(*header);
    }
    CHECK(length <= VMM_FRAME_MAX);
    peer_read(b, frame, length);
    return length;
}

static void peer_write(struct bench *b, const void *bytes, size_t n)
{
    CHECK_EQUAL(write(b->peer, bytes, n), n);
}

static void peer_send(struct bench *b, const struct vmm_net_header *header, const void *frame, uint32_t size)
{
    const uint32_t length = htobe32(size + (header ? sizeof(*header) : 0));
    peer_write(b, &length, 4);
    if (header)
        peer_write(b, header, sizeof(*header));
    peer_write(b, frame, size);
}

static void fill(uint8_t *frame, uint32_t size, uint32_t seed)
{
    for (uint32_t i = 0; i < size; i++)
        frame[i] = (uint8_t)((i ^ seed) * 167 + (i >> 8) + seed);
}

static uint8_t frame[VMM_FRAME_MAX + 1], got[VMM_FRAME_MAX + 1];

/* ---- frames both ways ---- */

static void frames_go_out_whole_and_in_order(uint32_t ring_features, vmm_net_config config)
{
    struct bench b;
    setup_with(&b, ring_features, PLAIN, config);
    static const uint32_t sizes[] = {14, 60, 1514, 65549, 64};
    for (unsigned i = 0; i < 5; i++) {
        fill(frame, sizes[i], i);
        offer_frame(&b, i, (struct vmm_net_header){0}, frame, sizes[i]);
    }
    ring_bell(&b, TX);
    for (unsigned i = 0; i < 5; i++) {
        struct vmm_net_header header = {0}, none = {0};
        CHECK_EQUAL(peer_receive(&b, config.offloads ? &header : NULL, got), sizes[i]);
        CHECK(!memcmp(&header, &none, sizeof(none)));
        fill(frame, sizes[i], i);
        CHECK(!memcmp(frame, got, sizes[i]));
    }
    int id;
    for (unsigned i = 0; i < 5; i++)
        CHECK_EQUAL(collect(&b, TX, &id), 0);
    CHECK_EQUAL(counts(&b).frames_out, 5);
    teardown(&b);
}

static void a_frame_takes_as_many_buffers_as_it_needs(uint32_t ring_features)
{
    struct bench b;
    setup_with(&b, ring_features, PLAIN, linked);
    for (unsigned i = 0; i < 4; i++)
        offer_buffer(&b, i, 1000);
    ring_bell(&b, RX);
    fill(frame, 2500, 1);
    peer_send(&b, &(struct vmm_net_header){0}, frame, 2500);
    static const uint32_t want[] = {1000, 1000, 512};
    int ids[3];
    for (unsigned i = 0; i < 3; i++)
        CHECK_EQUAL(collect(&b, RX, &ids[i]), want[i]);
    struct vmm_net_header header;
    uint8_t *first = machine_at(b.vm, slot(RX, 0), 1000);
    memcpy(&header, first, sizeof(header));
    CHECK_EQUAL(header.num_buffers, 3);
    CHECK(!memcmp(first + 12, frame, 988));
    CHECK(!memcmp(machine_at(b.vm, slot(RX, 1), 1000), frame + 988, 1000));
    CHECK(!memcmp(machine_at(b.vm, slot(RX, 2), 1000), frame + 1988, 512));
    teardown(&b);
}

/* The driver offers one buffer at a time, each too small by itself: every doorbell it is asked for must come. */
static void a_frame_waits_for_buffers_and_no_doorbell_is_lost(uint32_t ring_features)
{
    struct bench b;
    setup_with(&b, ring_features, PLAIN, linked);
    fill(frame, 300, 7);
    for (unsigned round = 0; round < 50; round++) {
        peer_send(&b, &(struct vmm_net_header){0}, frame, 300);
        int id;
        for (unsigned i = 0; i < 4; i++) {
            offer_buffer(&b, i, 100);
            ring_bell(&b, RX);
            if (round % 5 == 0) { /* let it run out of them each time */
                vmm_loop_sync(b.dev->loop);
                vmm_loop_sync(b.dev->loop);
            }
        }
        static const uint32_t want[] = {100, 100, 100, 12};
        for (unsigned i = 0; i < 4; i++)
            CHECK_EQUAL(collect(&b, RX, &id), want[i]);
    }
    CHECK_EQUAL(counts(&b).frames_in, 50);
    CHECK(counts(&b).starved > 0);
    teardown(&b);
}

static void without_mergeable_buffers_a_frame_has_one_or_is_dropped(void)
{
    struct bench b;
    setup_with(&b, 0, 0, linked);
    offer_buffer(&b, 0, 200);
    ring_bell(&b, RX);
    fill(frame, 300, 7);
    peer_send(&b, &(struct vmm_net_header){0}, frame, 300);
    peer_send(&b, &(struct vmm_net_header){0}, frame, 188);
    int id;
    CHECK_EQUAL(collect(&b, RX, &id), 200);
    CHECK_EQUAL(counts(&b).dropped_in, 1);
    teardown(&b);
}

/* What can never fit must not stop what can. */
static void a_frame_beyond_a_full_ring_of_buffers_is_dropped(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    for (unsigned i = 0; i < SLOTS; i++)
        offer_buffer(&b, i, 20);
    ring_bell(&b, RX);
    fill(frame, 1500, 7);
    peer_send(&b, &(struct vmm_net_header){0}, frame, 1500);
    peer_send(&b, &(struct vmm_net_header){0}, frame, 14);
    int id;
    CHECK_EQUAL(collect(&b, RX, &id), 20);
    CHECK_EQUAL(collect(&b, RX, &id), 6);
    CHECK_EQUAL(counts(&b).dropped_in, 1);
    teardown(&b);
}

static void a_full_host_end_holds_the_guest_and_nothing_is_lost(uint32_t ring_features)
{
    struct bench b;
    setup_with(&b, ring_features, PLAIN, linked);
    unsigned offered = 0, received = 0;
    int id;
    uint32_t written;
    while (received < 400) {
        while (offered < 400 && b.rings[TX].n_free >= 2) {
            const uint32_t size = 14 + offered * 7919 % 60000;
            fill(frame, size, offered);
            offer_frame(&b, offered % SLOTS, (struct vmm_net_header){0}, frame, size);
            offered++;
        }
        ring_bell(&b, TX);
        if (received == 0 || received % 20 == 19) /* let it fill up */
            for (int i = 0; i < 4; i++)
                vmm_loop_sync(b.dev->loop);
        const uint32_t size = 14 + received * 7919 % 60000;
        struct vmm_net_header header;
        CHECK_EQUAL(peer_receive(&b, &header, got), size);
        fill(frame, size, received);
        CHECK(!memcmp(frame, got, size));
        received++;
        /* In order: slots are free in the order of offers. */
        while (ring_collect(&b.rings[TX], &id, &written))
            ;
    }
    CHECK(counts(&b).full > 0);
    CHECK_EQUAL(counts(&b).frames_out, 400);
    teardown(&b);
}

/* ---- hostile guests ---- */

static void headers_that_contradict_their_frame_are_dropped(void)
{
    enum { N = VMM_HDR_NEEDS_CSUM };
    static const struct vmm_net_header bad[] = {
        {.flags = N, .csum_start = 13, .csum_offset = 2},
        {.flags = N, .csum_start = 98, .csum_offset = 1},
        {.flags = N, .csum_start = 65535, .csum_offset = 65535},
        {.flags = N, .csum_start = 14, .csum_offset = 65535},
        {.gso_type = VMM_GSO_TCPV4, .gso_size = 1000},
        {.flags = N, .csum_start = 34, .csum_offset = 16, .gso_type = VMM_GSO_TCPV4, .gso_size = 0},
        {.flags = N, .csum_start = 34, .csum_offset = 16, .gso_type = VMM_GSO_TCPV6, .gso_size = 47},
        {.flags = N, .csum_start = 34, .csum_offset = 16, .gso_type = 3, .gso_size = 1000},
        {.flags = N, .csum_start = 34, .csum_offset = 16, .gso_type = 0x7f, .gso_size = 1000},
        {.flags = N, .csum_start = 34, .csum_offset = 16, .gso_type = VMM_GSO_ECN, .gso_size = 1000},
    };
    struct bench b;
    setup_with(&b, 0, PLAIN | ALL_OFFLOADS, linked);
    const unsigned n = sizeof(bad) / sizeof(*bad);
    fill(frame, 100, 3);
    for (unsigned i = 0; i < n; i++)
        offer_frame(&b, i, bad[i], frame, 100);
    /* The most a header may say of 100 bytes, with a hint that is wrong and flags that are not the driver's. */
    offer_frame(&b, n,
                (struct vmm_net_header){.flags = 0xff, .csum_start = 98, .hdr_len = 9999, .num_buffers = 7},
                frame, 100);
    ring_bell(&b, TX);
    struct vmm_net_header header;
    CHECK_EQUAL(peer_receive(&b, &header, got), 100);
    CHECK_EQUAL(header.flags, N);
    CHECK_EQUAL(header.csum_start, 98);
    CHECK_EQUAL(header.hdr_len, 100);
    CHECK_EQUAL(header.num_buffers, 0);
    CHECK_EQUAL(counts(&b).invalid_out, n);
    CHECK_EQUAL(counts(&b).frames_out, 1);
    CHECK(b.dev->running);
    teardown(&b);
}

static void offloads_that_were_not_agreed_are_dropped(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN | 1ull << VMM_NET_F_HOST_TSO4, linked); /* TSO without checksums is no TSO */
    fill(frame, 100, 3);
    offer_frame(&b, 0, (struct vmm_net_header){.flags = 1, .csum_start = 34, .csum_offset = 16}, frame, 100);
    offer_frame(&b, 1,
                (struct vmm_net_header){
                    .flags = 1, .csum_start = 34, .csum_offset = 16, .gso_type = 1, .gso_size = 60},
                frame, 100);
    ring_bell(&b, TX);
    int id;
    collect(&b, TX, &id);
    collect(&b, TX, &id);
    CHECK_EQUAL(counts(&b).invalid_out, 2);
    teardown(&b);
}

static void frames_of_no_possible_size_are_dropped(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    fill(frame, VMM_FRAME_MAX, 3);
    offer_frame(&b, 0, (struct vmm_net_header){0}, frame, 13);
    offer_frame(&b, 1, (struct vmm_net_header){0}, frame, VMM_FRAME_MAX + 1);
    offer_frame(&b, 2, (struct vmm_net_header){0}, frame, VMM_FRAME_MAX);
    struct piece header = OUT(slot(TX, 3), 12);
    ring_offer(&b.rings[TX], &header, 1);
    ring_bell(&b, TX);
    struct vmm_net_header out;
    CHECK_EQUAL(peer_receive(&b, &out, got), VMM_FRAME_MAX);
    int id;
    for (unsigned i = 0; i < 4; i++)
        collect(&b, TX, &id);
    CHECK_EQUAL(counts(&b).dropped_out, 3);
    teardown(&b);
}

static void a_chain_without_room_for_its_header_breaks_the_device_alone(unsigned queue)
{
    struct bench b;
    setup_with(&b, 0, PLAIN | CONTROL, linked);
    const struct piece pieces[] = {IN(slot(RX, 0), 11), OUT(slot(TX, 0), 11), OUT(slot(CTRL, 0), 64)};
    ring_offer(&b.rings[queue], &pieces[queue], 1);
    ring_bell(&b, queue);
    if (queue == RX)
        peer_send(&b, &(struct vmm_net_header){0}, frame, 60);
    wait_broken(&b);
    /* The link lives on, and a driver that starts again is served. */
    drive(&b);
    fill(frame, 60, 5);
    offer_frame(&b, 0, (struct vmm_net_header){0}, frame, 60);
    ring_bell(&b, TX);
    struct vmm_net_header header;
    CHECK_EQUAL(peer_receive(&b, &header, got), 60);
    teardown(&b);
}

/* ---- hostile peers ---- */

static void a_length_no_frame_has_ends_the_link(uint32_t length)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    const uint32_t wire[2] = {htobe32(length)};
    peer_write(&b, wire, sizeof(wire));
    while (vmm_net_link(b.net))
        wait_interrupt(&b);
    CHECK_EQUAL(b.said, 1);
    CHECK_EQUAL(read(b.peer, got, 1), 0);
    CHECK(b.dev->running);
    teardown(&b);
}

static void a_peers_impossible_header_drops_its_frame(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN | ALL_OFFLOADS, linked);
    offer_buffer(&b, 0, 2000);
    ring_bell(&b, RX);
    fill(frame, 100, 3);
    peer_send(&b, &(struct vmm_net_header){.flags = 1, .csum_start = 99, .csum_offset = 0}, frame, 100);
    peer_send(&b, &(struct vmm_net_header){.gso_type = 0x55}, frame, 100);
    peer_send(&b, &(struct vmm_net_header){.num_buffers = 999}, frame, 100);
    int id;
    CHECK_EQUAL(collect(&b, RX, &id), 112);
    CHECK_EQUAL(((struct vmm_net_header *)machine_at(b.vm, slot(RX, 0), 12))->num_buffers, 1);
    CHECK_EQUAL(counts(&b).invalid_in, 2);
    teardown(&b);
}

static void what_the_guest_cannot_take_yet_is_dropped_until_it_drives(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    set_status(&b, 0);
    fill(frame, 60000, 3);
    for (int i = 0; i < 50; i++) /* far more than a socket holds */
        peer_send(&b, &(struct vmm_net_header){0}, frame, 60000);
    while (counts(&b).dropped_in < 50)
        vmm_loop_sync(b.dev->loop);
    drive(&b);
    offer_buffer(&b, 0, 2000);
    ring_bell(&b, RX);
    peer_send(&b, &(struct vmm_net_header){0}, frame, 100);
    int id;
    CHECK_EQUAL(collect(&b, RX, &id), 112);
    teardown(&b);
}

/* ---- offloads for a guest that has not agreed to them ---- */

static uint16_t plain_sum(const uint8_t *bytes, size_t n, uint32_t sum)
{
    for (size_t i = 0; i < n; i++)
        sum += i % 2 ? bytes[i] : (uint32_t)bytes[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static uint32_t word(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

/* A TCP frame with `payload` bytes, as a driver with TSO leaves it: partial checksum, lengths of the whole. */
static uint32_t tcp_frame(uint8_t *to, bool ipv6, uint32_t payload, struct vmm_net_header *header,
                          uint16_t mss)
{
    const unsigned ip_size = ipv6 ? 40 : 20, tcp = 14 + ip_size, size = tcp + 32 + payload;
    fill(to, size, 9);
    to[12] = ipv6 ? 0x86 : 0x08;
    to[13] = ipv6 ? 0xdd : 0x00;
    uint8_t *ip = to + 14;
    const uint32_t length = size - 14 - (ipv6 ? 40 : 0);
    ip[0] = ipv6 ? 0x60 : 0x45;
    ip[ipv6 ? 4 : 2] = (uint8_t)(length >> 8);
    ip[ipv6 ? 5 : 3] = (uint8_t)length;
    ip[ipv6 ? 6 : 9] = 6;
    if (!ipv6)
        ip[6] = 0x40, ip[7] = 0, ip[4] = 0xff, ip[5] = 0xff, ip[10] = ip[11] = 0;
    if (!ipv6) {
        const uint16_t checksum = (uint16_t)~plain_sum(ip, 20, 0);
        ip[10] = (uint8_t)(checksum >> 8);
        ip[11] = (uint8_t)checksum;
    }
    to[tcp + 12] = 0x80;
    to[tcp + 13] = 0x80 | 0x10 | 0x08 | 0x01; /* CWR ACK PSH FIN */
    memcpy(to + tcp + 4, "\xff\xff\xff\x00", 4);
    const uint16_t partial = plain_sum(ip + (ipv6 ? 8 : 12), ipv6 ? 32 : 8, 6 + (size - tcp));
    to[tcp + 16] = (uint8_t)(partial >> 8);
    to[tcp + 17] = (uint8_t)partial;
    *header = (struct vmm_net_header){.flags = VMM_HDR_NEEDS_CSUM,
                                      .csum_start = (uint16_t)tcp,
                                      .csum_offset = 16,
                                      .gso_type = mss ? ipv6 ? VMM_GSO_TCPV6 : VMM_GSO_TCPV4 : 0,
                                      .gso_size = mss};
    return size;
}

static void check_tcp(const uint8_t *bytes, bool ipv6, uint32_t size)
{
    const unsigned ip_size = ipv6 ? 40 : 20, tcp = 14 + ip_size;
    const uint8_t *ip = bytes + 14;
    CHECK_EQUAL(ip[ipv6 ? 4 : 2] << 8 | ip[ipv6 ? 5 : 3], size - 14 - (ipv6 ? 40 : 0));
    if (!ipv6)
        CHECK_EQUAL(plain_sum(ip, 20, 0), 0xffff);
    CHECK_EQUAL(
        plain_sum(bytes + tcp, size - tcp, plain_sum(ip + (ipv6 ? 8 : 12), ipv6 ? 32 : 8, 6 + (size - tcp))),
        0xffff);
}

static void a_large_frame_is_segmented_for_a_guest_without_tso(bool ipv6)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    struct vmm_net_header header;
    const uint32_t size = tcp_frame(frame, ipv6, 10001, &header, 1448), headers = size - 10001;
    peer_send(&b, &header, frame, size);
    uint8_t payload[10001];
    uint32_t at = 0;
    for (unsigned i = 0; at < sizeof(payload); i++) { /* a buffer at a time: the cutting waits in between */
        int id;
        offer_buffer(&b, i, 2000);
        ring_bell(&b, RX);
        const uint32_t n = collect(&b, RX, &id) - 12;
        const uint8_t *bytes = (uint8_t *)machine_at(b.vm, slot(RX, i), 2000) + 12;
        check_tcp(bytes, ipv6, n);
        const uint8_t *tcp = bytes + header.csum_start;
        const bool last = at + n - headers == sizeof(payload);
        CHECK_EQUAL(word(tcp + 4), 0xffffff00u + at);
        CHECK_EQUAL(tcp[13], 0x10 | (at ? 0 : 0x80) | (last ? 0x09 : 0));
        if (!ipv6)
            CHECK_EQUAL(bytes[18] << 8 | bytes[19], (0xffff + i) & 0xffff);
        CHECK(n - headers == 1448 || last);
        memcpy(payload + at, bytes + headers, n - headers);
        at += n - headers;
    }
    CHECK(!memcmp(payload, frame + headers, sizeof(payload)));
    CHECK_EQUAL(counts(&b).segmented, 1);
    CHECK_EQUAL(counts(&b).frames_in, 7);
    teardown(&b);
}

static void a_checksum_is_completed_once_for_a_guest_without_it(bool ipv6)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    struct vmm_net_header header;
    const uint32_t size = tcp_frame(frame, ipv6, 777, &header, 0);
    peer_send(&b, &header, frame, size); /* and it waits for a buffer, so is looked at twice */
    for (int i = 0; i < 3; i++)
        vmm_loop_sync(b.dev->loop);
    offer_buffer(&b, 0, 2000);
    ring_bell(&b, RX);
    int id;
    CHECK_EQUAL(collect(&b, RX, &id), 12 + size);
    check_tcp((uint8_t *)machine_at(b.vm, slot(RX, 0), 2000) + 12, ipv6, size);
    CHECK_EQUAL(*(uint8_t *)machine_at(b.vm, slot(RX, 0), 1), 0);
    CHECK_EQUAL(counts(&b).checksummed, 1);
    teardown(&b);
}

static void a_guest_with_offloads_gets_large_frames_as_they_are(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN | ALL_OFFLOADS, linked);
    struct vmm_net_header header;
    const uint32_t size = tcp_frame(frame, false, 60000, &header, 1448);
    offer_buffer(&b, 0, 0x11000);
    ring_bell(&b, RX);
    peer_send(&b, &header, frame, size);
    int id;
    CHECK_EQUAL(collect(&b, RX, &id), 12 + size);
    uint8_t *bytes = machine_at(b.vm, slot(RX, 0), 0x11000);
    header.num_buffers = 1;
    CHECK(!memcmp(bytes, &header, 12) && !memcmp(bytes + 12, frame, size));
    teardown(&b);
}

static void frames_that_only_say_they_are_tcp_are_not_segmented(void)
{
    struct vmm_net_header header;
    const uint32_t size = tcp_frame(frame, false, 500, &header, 100);
    struct vmm_segments segments;
    CHECK(vmm_segments_begin(&segments, &header, frame, size));
    static const struct {
        unsigned at;
        uint8_t value;
    } damage[] = {{12, 0x86}, {14, 0x55}, {14, 0x46}, {23, 17}, {20, 0x20}, {21, 1}, {46, 0x40}, {46, 0xf0}};
    for (size_t i = 0; i < sizeof(damage) / sizeof(*damage); i++) {
        const uint8_t was = frame[damage[i].at];
        frame[damage[i].at] = damage[i].value;
        const bool begun = vmm_segments_begin(&segments, &header, frame, damage[i].value == 0xf0 ? 94 : size);
        CHECK(!begun);
        frame[damage[i].at] = was;
    }
    header.csum_offset = 6;
    CHECK(!vmm_segments_begin(&segments, &header, frame, size));
}

/* ---- the link ---- */

static void the_link_goes_down_with_the_peer_and_up_with_the_next(bool starved)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    uint16_t status;
    CHECK_EQUAL(vmm_virtio_config_get(b.dev, 6, &status, 2), 0);
    CHECK_EQUAL(status, 1);
    if (starved) {
        peer_send(&b, &(struct vmm_net_header){0}, frame, 60);
        while (!counts(&b).starved)
            vmm_loop_sync(b.dev->loop);
    }
    const int before = b.configured;
    close(b.peer);
    struct pollfd lost = {.fd = vmm_net_lost_fd(b.net), .events = POLLIN};
    CHECK_EQUAL(poll(&lost, 1, PATIENCE_MS), 1);
    CHECK_EQUAL(vmm_virtio_config_get(b.dev, 6, &status, 2), 0);
    CHECK_EQUAL(status, 0);
    CHECK_EQUAL(b.configured, before + 1);
    CHECK_EQUAL(b.said, 1);
    /* Meanwhile what the guest sends is lost, not held. */
    fill(frame, 60, 1);
    offer_frame(&b, 0, (struct vmm_net_header){0}, frame, 60);
    ring_bell(&b, TX);
    int id;
    collect(&b, TX, &id);
    CHECK_EQUAL(counts(&b).dropped_out, 1);

    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    CHECK_EQUAL(vmm_net_attach_stream(b.net, sockets[0], 1), 0);
    b.peer = sockets[1];
    CHECK_EQUAL(vmm_net_link(b.net), 1);
    CHECK_EQUAL(b.configured, before + 2);
    offer_frame(&b, 1, (struct vmm_net_header){0}, frame, 60);
    ring_bell(&b, TX);
    struct vmm_net_header header;
    CHECK_EQUAL(peer_receive(&b, &header, got), 60);
    offer_buffer(&b, 0, 100);
    ring_bell(&b, RX);
    peer_send(&b, &header, frame, 60);
    CHECK_EQUAL(collect(&b, RX, &id), 72);
    teardown(&b);
}

static void a_pulled_cable_is_a_link_that_is_down(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN, linked);
    vmm_net_plug(b.net, 0);
    CHECK_EQUAL(vmm_net_link(b.net), 0);
    CHECK_EQUAL(b.configured, 1);
    fill(frame, 60, 1);
    offer_frame(&b, 0, (struct vmm_net_header){0}, frame, 60);
    ring_bell(&b, TX);
    int id;
    collect(&b, TX, &id);
    vmm_net_plug(b.net, 1);
    CHECK_EQUAL(vmm_net_link(b.net), 1);
    CHECK_EQUAL(counts(&b).dropped_out, 1);
    teardown(&b);
}

/* ---- the control queue ---- */

static int command(struct bench *b, uint8_t class, uint8_t number, const void *argument, uint32_t size)
{
    uint8_t *at = machine_at(b->vm, slot(CTRL, 0), 4096);
    at[0] = class;
    at[1] = number;
    memcpy(at + 2, argument, size);
    at[2048] = 0xee;
    struct piece pieces[] = {OUT(slot(CTRL, 0), 2 + size), IN(slot(CTRL, 0) + 2048, 1)};
    CHECK(ring_offer(&b->rings[CTRL], pieces, 2) >= 0);
    ring_bell(b, CTRL);
    int id;
    CHECK_EQUAL(collect(b, CTRL, &id), 1);
    return at[2048];
}

static void commands_are_obeyed_or_refused(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN | CONTROL | ALL_OFFLOADS, linked);
    uint64_t own[VMM_VIRTIO_OWN]; /* pairs, offloads accepted, receive modes */
    vmm_virtio *dev = vmm_net_virtio(b.net);
    CHECK_EQUAL(command(&b, VMM_CTRL_RX, VMM_CTRL_RX_PROMISC, "\1", 1), VMM_CTRL_OK);
    CHECK_EQUAL(command(&b, VMM_CTRL_RX, VMM_CTRL_RX_ALLMULTI, "\1", 1), VMM_CTRL_OK);
    CHECK_EQUAL(command(&b, VMM_CTRL_RX, VMM_CTRL_RX_PROMISC, "\0", 1), VMM_CTRL_OK);
    CHECK_EQUAL(command(&b, VMM_CTRL_RX, VMM_CTRL_RX_PROMISC, "\1\1", 2), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_RX, VMM_CTRL_RX_PROMISC, "", 0), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_RX, 99, "\1", 1), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, 99, 0, "\1", 1), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_MAC, VMM_CTRL_MAC_ADDR_SET, "\2abcde", 6), VMM_CTRL_OK);
    CHECK_EQUAL(command(&b, VMM_CTRL_MAC, VMM_CTRL_MAC_ADDR_SET, "\2abcd", 5), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_MAC, VMM_CTRL_MAC_TABLE_SET, "\1\0\0\0abcdef\0\0\0\0", 14), VMM_CTRL_OK);
    CHECK_EQUAL(command(&b, VMM_CTRL_MAC, VMM_CTRL_MAC_TABLE_SET, "\1\0\0\0abcdef\1\0\0\0", 14),
                VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_MAC, VMM_CTRL_MAC_TABLE_SET, "\xff\xff\xff\xff\0\0\0\0", 8),
                VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_MAC, VMM_CTRL_MAC_TABLE_SET, "\0\0\0\0\0\0\0\0\0", 9), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_MQ, VMM_CTRL_MQ_PAIRS_SET, "\2\0", 2), VMM_CTRL_OK);
    CHECK_EQUAL(command(&b, VMM_CTRL_MQ, VMM_CTRL_MQ_PAIRS_SET, "\0\0", 2), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_MQ, VMM_CTRL_MQ_PAIRS_SET, "\3\0", 2), VMM_CTRL_ERROR);
    vmm_virtio_save_own(dev, own);
    CHECK_EQUAL(own[0], 2);
    CHECK_EQUAL(own[1], VMM_OFFLOAD_ALL);
    CHECK_EQUAL(own[2], 2);
    CHECK(!memcmp(dev->config, "\2abcde", 6));
    uint64_t offloads = 1ull << VMM_NET_F_GUEST_CSUM;
    CHECK_EQUAL(command(&b, VMM_CTRL_OFFLOADS, VMM_CTRL_OFFLOADS_SET, &offloads, 8), VMM_CTRL_OK);
    offloads |= 1ull << VMM_NET_F_CSUM;
    CHECK_EQUAL(command(&b, VMM_CTRL_OFFLOADS, VMM_CTRL_OFFLOADS_SET, &offloads, 8), VMM_CTRL_ERROR);
    vmm_virtio_save_own(dev, own);
    CHECK_EQUAL(own[1], VMM_OFFLOAD_CSUM);
    own[0] = 1;
    CHECK_EQUAL(vmm_virtio_load_own(dev, own), 0);
    own[0] = 3;
    CHECK_EQUAL(vmm_virtio_load_own(dev, own), -EINVAL);
    own[0] = 1;
    own[1] = VMM_OFFLOAD_ALL + 1;
    CHECK_EQUAL(vmm_virtio_load_own(dev, own), -EINVAL);
    teardown(&b);
}

static uint16_t shown_status(struct bench *b)
{
    uint16_t status;
    CHECK_EQUAL(
        vmm_virtio_config_get(b->dev, offsetof(struct vmm_net_space, status), &status, sizeof(status)), 0);
    return status;
}

/* Until it is asked, which the timer may do; then it says that it does. */
static void announces(struct bench *b)
{
    while (!(shown_status(b) & VMM_NET_S_ANNOUNCE))
        wait_interrupt(b);
    CHECK_EQUAL(command(b, VMM_CTRL_ANNOUNCE, VMM_CTRL_ANNOUNCE_ACK, "", 0), VMM_CTRL_OK);
}

static void a_guest_is_asked_to_announce_itself_some_times_when_it_says_that_it_does(void)
{
    struct bench b;
    uint64_t own[VMM_VIRTIO_OWN];
    setup_with(&b, 0, PLAIN | CONTROL | 1ull << VMM_NET_F_GUEST_ANNOUNCE, linked);
    unsigned before = b.configured;
    CHECK_EQUAL(command(&b, VMM_CTRL_ANNOUNCE, VMM_CTRL_ANNOUNCE_ACK, "", 0), VMM_CTRL_OK); /* not asked */
    vmm_net_announce(b.net);
    CHECK_EQUAL(b.configured, ++before);
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP | VMM_NET_S_ANNOUNCE);
    vmm_net_announce(b.net); /* it is asked already */
    CHECK_EQUAL(b.configured, before);
    CHECK_EQUAL(command(&b, VMM_CTRL_ANNOUNCE, VMM_CTRL_ANNOUNCE_ACK, "\1", 1), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_ANNOUNCE, 1, "", 0), VMM_CTRL_ERROR);
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP | VMM_NET_S_ANNOUNCE);
    for (unsigned left = VMM_NET_ANNOUNCES; left; left--) {
        vmm_virtio_save_own(b.dev, own);
        CHECK_EQUAL(own[3], left);
        announces(&b);
    }
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP);
    CHECK_EQUAL(b.configured, before + VMM_NET_ANNOUNCES - 1);
    CHECK_EQUAL(command(&b, VMM_CTRL_ANNOUNCE, VMM_CTRL_ANNOUNCE_ACK, "", 0), VMM_CTRL_OK);
    vmm_virtio_save_own(b.dev, own);
    CHECK_EQUAL(own[3], 0);
    teardown(&b);
}

static void an_announcement_waits_for_the_link_and_is_of_one_driver(void)
{
    struct bench b;
    uint64_t own[VMM_VIRTIO_OWN];
    setup_with(&b, 0, PLAIN | CONTROL | 1ull << VMM_NET_F_GUEST_ANNOUNCE, linked);
    vmm_net_plug(b.net, 0);
    vmm_net_announce(b.net);
    CHECK_EQUAL(shown_status(&b), 0);
    vmm_net_plug(b.net, 1);
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP | VMM_NET_S_ANNOUNCE);
    announces(&b);
    vmm_virtio_save_own(b.dev, own); /* between two of them */
    CHECK_EQUAL(own[3], VMM_NET_ANNOUNCES - 1);
    set_status(&b, 0);
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP);
    vmm_net_announce(b.net); /* there is no driver */
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP);
    drive(&b);
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP);
    CHECK_EQUAL(vmm_virtio_load_own(b.dev, own), 0);
    vmm_net_plug(b.net, 1); /* as a device does that goes on */
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP | VMM_NET_S_ANNOUNCE);
    own[3] = VMM_NET_ANNOUNCES + 1;
    CHECK_EQUAL(vmm_virtio_load_own(b.dev, own), -EINVAL);
    teardown(&b);
}

static void a_guest_that_did_not_agree_to_it_is_not_asked_to_announce_itself(void)
{
    struct bench b;
    uint64_t own[VMM_VIRTIO_OWN];
    setup_with(&b, 0, PLAIN | CONTROL, linked);
    vmm_net_announce(b.net);
    CHECK_EQUAL(shown_status(&b), VMM_NET_S_LINK_UP);
    CHECK_EQUAL(command(&b, VMM_CTRL_ANNOUNCE, VMM_CTRL_ANNOUNCE_ACK, "", 0), VMM_CTRL_ERROR);
    vmm_virtio_save_own(b.dev, own);
    CHECK_EQUAL(own[3], 0);
    own[3] = 1;
    CHECK_EQUAL(vmm_virtio_load_own(b.dev, own), -EINVAL);
    teardown(&b);
}

static void a_command_of_a_feature_that_was_not_agreed_is_refused(void)
{
    struct bench b;
    setup_with(&b, 0, PLAIN | 1ull << VMM_NET_F_CTRL_VQ, linked);
    CHECK_EQUAL(b.control, 2); /* without MQ it follows the first pair (5.1.2) */
    CHECK_EQUAL(command(&b, VMM_CTRL_RX, VMM_CTRL_RX_PROMISC, "\1", 1), VMM_CTRL_ERROR);
    CHECK_EQUAL(command(&b, VMM_CTRL_MQ, VMM_CTRL_MQ_PAIRS_SET, "\2\0", 2), VMM_CTRL_ERROR);
    teardown(&b);
}

/* ---- limits ---- */

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void frames_beyond_the_limit_wait(bool in)
{
    struct bench b;
    vmm_net_config limited = linked;
    limited.pps = 50;
    setup_with(&b, 0, PLAIN, limited);
    fill(frame, 60, 1);
    const uint64_t begun = now_ms();
    /* 50 go at once; 10 more take a fifth of a second. */
    for (unsigned i = 0; i < 60; i++) {
        if (in) {
            offer_buffer(&b, i, 100);
            peer_send(&b, &(struct vmm_net_header){0}, frame, 60);
        } else {
            const uint64_t at = slot(TX, i);
            memset(machine_at(b.vm, at, 72), 0, 72);
            struct piece piece = OUT(at, 72);
            CHECK(ring_offer(&b.rings[TX], &piece, 1) >= 0);
        }
    }
    ring_bell(&b, in ? RX : TX);
    int id;
    for (unsigned i = 0; i < 60; i++)
        collect(&b, in ? RX : TX, &id);
    CHECK(now_ms() - begun >= 150);
    teardown(&b);
}

/* ---- two machines ---- */

static void two_machines_exchange_frames_both_ways(uint32_t ring_features)
{
    struct bench b[2];
    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    for (int side = 0; side < 2; side++) {
        setup_with(&b[side], ring_features, PLAIN | ALL_OFFLOADS, linked);
        close(b[side].peer);
        b[side].peer = -1;
        CHECK_EQUAL(vmm_net_attach_stream(b[side].net, sockets[side], 1), 0);
    }
    enum { FRAMES = 3000 };
    unsigned sent[2] = {0}, received[2] = {0}, posted[2] = {0};
    int owner[2][VMM_QUEUE_SIZE_MAX]; /* slot of each receive chain */
    while (received[0] < FRAMES || received[1] < FRAMES) {
        bool idle = true;
        for (int side = 0; side < 2; side++) {
            struct bench *me = &b[side];
            int id;
            uint32_t written;
            while (me->rings[RX].n_free) {
                const unsigned at = posted[side]++ % SLOTS;
                owner[side][offer_buffer(me, at, SLOT)] = (int)at;
            }
            ring_bell(me, RX);
            while (ring_collect(&me->rings[TX], &id, &written))
                idle = false;
            for (; sent[side] < FRAMES && me->rings[TX].n_free >= 2; sent[side]++) {
                const uint32_t size = 14 + sent[side] * 7919 % 3000;
                fill(frame, size, sent[side] + (unsigned)side);
                offer_frame(me, sent[side] % SLOTS, (struct vmm_net_header){0}, frame, size);
            }
            ring_bell(me, TX);
            for (; ring_collect(&me->rings[RX], &id, &written); received[side]++, idle = false) {
                const uint32_t size = 14 + received[side] * 7919 % 3000;
                CHECK_EQUAL(written, size + 12);
                fill(frame, size, received[side] + (unsigned)!side);
                const uint64_t at = slot(RX, (unsigned)owner[side][id]);
                CHECK(!memcmp((uint8_t *)machine_at(me->vm, at, SLOT) + 12, frame, size));
            }
        }
        if (!idle || received[0] + received[1] == 2 * FRAMES)
            continue;
        for (int side = 0; side < 2; side++)
            idle = !ring_arm(&b[side].rings[RX]) && !ring_arm(&b[side].rings[TX]) && idle;
        struct pollfd both[] = {{.fd = b[0].interrupt, .events = POLLIN},
                                {.fd = b[1].interrupt, .events = POLLIN}};
        if (!idle)
            continue;
        CHECK(poll(both, 2, PATIENCE_MS) > 0);
        for (int side = 0; side < 2; side++)
            if (both[side].revents)
                wait_interrupt(&b[side]);
    }
    teardown(&b[0]);
    teardown(&b[1]);
}

/* ---- a tap, in a network namespace of our own ---- */

static bool open_tap(int fds[2])
{
    if (unshare(CLONE_NEWNET) < 0)
        return false;
    struct ifreq request = {.ifr_name = "vmmtest"};
    for (int i = 0; i < 2; i++) {
        request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
        fds[i] = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
        if (fds[i] < 0 || ioctl(fds[i], TUNSETIFF, &request) < 0)
            return false;
    }
    const int control = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x0a000001)};
    CHECK(ioctl(control, SIOCSIFADDR, &request) == 0);
    request.ifr_flags = IFF_UP;
    CHECK(ioctl(control, SIOCSIFFLAGS, &request) == 0);
    close(control);
    return true;
}

/* The host's stack answers what the guest asks; a send while the interface is down is lost, and no more. */
static void the_host_answers_on_a_tap(void)
{
    int fds[2];
    if (!open_tap(fds)) {
        fprintf(stderr, "a tap needs CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun: not tried\n");
        return;
    }
    static const uint8_t ask[42] = "\xff\xff\xff\xff\xff\xff\2\0\0\0\0\1\x08\x06\0\1\x08\0\6\4\0\1"
                                   "\2\0\0\0\0\1\x0a\0\0\2\0\0\0\0\0\0\x0a\0\0\1";
    struct bench b;
    setup_with(&b, 0, PLAIN | ALL_OFFLOADS, linked);
    CHECK_EQUAL(vmm_net_attach_tap(b.net, fds, 2), 0);
    for (unsigned i = 0; i < SLOTS; i++)
        offer_buffer(&b, i, 2000);
    ring_bell(&b, RX);
    offer_frame(&b, 0, (struct vmm_net_header){0}, ask, sizeof(ask));
    ring_bell(&b, TX);
    const uint8_t *answer;
    do { /* the host says other things too: IPv6 router solicitations and the like */
        int id;
        collect(&b, RX, &id);
        answer = (uint8_t *)machine_at(b.vm, slot(RX, (unsigned)id), 2000) + 12;
    } while (memcmp(answer + 12, "\x08\x06\0\1\x08\0\6\4\0\2", 10));
    CHECK(!memcmp(answer + 28, "\x0a\0\0\1\2\0\0\0\0\1\x0a\0\0\2", 14));

    const int control = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq request = {.ifr_name = "vmmtest"};
    CHECK(ioctl(control, SIOCGIFFLAGS, &request) == 0);
    request.ifr_flags &= ~IFF_UP;
    CHECK(ioctl(control, SIOCSIFFLAGS, &request) == 0);
    close(control);
    int id;
    collect(&b, TX, &id);
    offer_frame(&b, 1, (struct vmm_net_header){0}, ask, sizeof(ask));
    ring_bell(&b, TX);
    collect(&b, TX, &id);
    CHECK_EQUAL(vmm_net_link(b.net), 1);
    teardown(&b);
}

int main(void)
{
    static const uint32_t rings[] = {0, VMM_QUEUE_EVENT_IDX, VMM_QUEUE_PACKED,
                                     VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX};
    for (unsigned i = 0; i < 4; i++) {
        frames_go_out_whole_and_in_order(rings[i], linked);
        a_frame_takes_as_many_buffers_as_it_needs(rings[i]);
        a_frame_waits_for_buffers_and_no_doorbell_is_lost(rings[i]);
        a_full_host_end_holds_the_guest_and_nothing_is_lost(rings[i]);
        two_machines_exchange_frames_both_ways(rings[i]);
    }
    frames_go_out_whole_and_in_order(0, bare);
    without_mergeable_buffers_a_frame_has_one_or_is_dropped();
    a_frame_beyond_a_full_ring_of_buffers_is_dropped();
    headers_that_contradict_their_frame_are_dropped();
    offloads_that_were_not_agreed_are_dropped();
    frames_of_no_possible_size_are_dropped();
    a_chain_without_room_for_its_header_breaks_the_device_alone(RX);
    a_chain_without_room_for_its_header_breaks_the_device_alone(TX);
    a_chain_without_room_for_its_header_breaks_the_device_alone(CTRL);
    a_length_no_frame_has_ends_the_link(0);
    a_length_no_frame_has_ends_the_link(12 + VMM_FRAME_MAX + 1);
    a_length_no_frame_has_ends_the_link(UINT32_MAX);
    a_peers_impossible_header_drops_its_frame();
    what_the_guest_cannot_take_yet_is_dropped_until_it_drives();
    for (int ipv6 = 0; ipv6 < 2; ipv6++) {
        a_large_frame_is_segmented_for_a_guest_without_tso(ipv6);
        a_checksum_is_completed_once_for_a_guest_without_it(ipv6);
    }
    a_guest_with_offloads_gets_large_frames_as_they_are();
    frames_that_only_say_they_are_tcp_are_not_segmented();
    the_link_goes_down_with_the_peer_and_up_with_the_next(false);
    the_link_goes_down_with_the_peer_and_up_with_the_next(true);
    a_pulled_cable_is_a_link_that_is_down();
    commands_are_obeyed_or_refused();
    a_guest_is_asked_to_announce_itself_some_times_when_it_says_that_it_does();
    an_announcement_waits_for_the_link_and_is_of_one_driver();
    a_guest_that_did_not_agree_to_it_is_not_asked_to_announce_itself();
    a_command_of_a_feature_that_was_not_agreed_is_refused();
    frames_beyond_the_limit_wait(false);
    frames_beyond_the_limit_wait(true);
    the_host_answers_on_a_tap();
    return 0;
}
