/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a disk and a link can do, from a driver that polls, at CPL 3, where the guest runs at full speed on every KVM.
 * First it prints "spin" and does so for a while. Each phase prints "go NAME", waits for a byte, works for as long as it
 * was told, prints "NAME: n operations, b bytes, t ticks, d doorbells" and waits for a byte again. Command line:
 *   ticks=N     of the time-stamp counter, a phase (2500000000)
 *   blk=1       the disk: random reads of 4 KiB, one and 32 at a time; reads of 1 MiB in order, four at a time
 *   net=1       the link's receiving end: says hello until frames come, counts them, says when it has enough
 *   net=2       its sending end: "frame=N" bytes each; larger than 1514 as TCP to be cut by the device, where it offers to
 *   idle=1      every device ready, buffers offered; "idle" is printed and the processor halts
 *   packed=1 indirect=1   agree to these
 */
#include "cpu.h"
#include "virtio.h"

enum { SMALL = 4096, LARGE = 1 << 20, DEPTH_MAX = 32, LARGE_DEPTH = 4, BUFFERS_MAX = 3 };
enum { FRAME_ROOM = 1 << 16, RECEIVE_DEPTH = 128, TRANSMIT_DEPTH = 128, HELLO_TICKS = 20000000, BATCH = 16 };
enum { ETHERNET = 14, IP = 20, TCP = 20, TCP_CHECKSUM = 16, SEGMENT = 1448, FRAME_ETHERNET = 1514 };

static uint64_t ticks, features;
static bool indirect;

/* The host looks at the clocks of the monitor's threads, and answers with a byte. */
static void begin(const char *name)
{
    print("go %s\n", name);
    serial_getc();
}

static void report(const char *name, uint64_t operations, uint64_t bytes, uint64_t ticks_taken,
                   uint64_t doorbells)
{
    print("%s: %lu operations, %lu bytes, %lu ticks, %lu doorbells\n", name, operations, bytes, ticks_taken,
          doorbells);
    serial_getc();
}

/* ---- disk ---- */

static struct virtio_device disk;
static struct virtqueue requests;
static struct {
    struct blk_header header;
    volatile uint8_t status;
} slots[DEPTH_MAX] __attribute__((aligned(64)));
static char *data;
static uint64_t sectors;

/* Marsaglia, "Xorshift RNGs": any full-period generator does, but it must not be what costs. */
static uint64_t random(void)
{
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void offer_read(unsigned slot, uint64_t sector, uint32_t size)
{
    slots[slot].header = (struct blk_header){.type = BLK_IN, .sector = sector};
    slots[slot].status = 0xff;
    const struct virtq_buffer buffers[BUFFERS_MAX] = {{&slots[slot].header, sizeof slots[slot].header, false},
                                                      {data + (size_t)slot * size, size, true},
                                                      {(void *)&slots[slot].status, 1, true}};
    virtqueue_offer(&requests, slot, buffers, BUFFERS_MAX);
}

static void read_phase(const char *name, uint32_t size, unsigned depth, bool in_order)
{
    uint64_t places = sectors / (size / BLK_SECTOR), next = 0, operations = 0, rung = requests.doorbells;
    uint32_t written;
    begin(name);
    uint64_t start = rdtsc(), end = start;
    for (unsigned slot = 0; slot < depth; slot++)
        offer_read(slot, (in_order ? next++ % places : random() % places) * (size / BLK_SECTOR), size);
    virtqueue_publish(&requests);
    for (unsigned in_flight = depth; in_flight;) {
        int slot = virtqueue_take(&requests, &written);
        if (slot < 0) {
            __asm__ volatile("pause");
            continue;
        }
        end = rdtsc();
        bool more = end - start < ticks;
        for (; slot >= 0; slot = virtqueue_take(&requests, &written)) {
            CHECK_EQ(slots[slot].status, BLK_OK);
            CHECK_EQ(written, size + 1);
            operations++;
            if (more)
                offer_read((unsigned)slot,
                           (in_order ? next++ % places : random() % places) * (size / BLK_SECTOR), size);
            else
                in_flight--;
        }
        virtqueue_publish(&requests);
    }
    report(name, operations, operations * size, rdtsc() - start, requests.doorbells - rung);
}

static void disk_open(void)
{
    REQUIRE(EXIT_DEVICE, virtio_find(VIRTIO_BLK, 0, &disk));
    virtio_negotiate(&disk, features);
    virtqueue_start(&disk, 0, 256, BUFFERS_MAX, indirect, false, &requests);
    virtio_driver_ok(&disk);
    sectors = mmio_read32(disk.config) | (uint64_t)mmio_read32(disk.config + 4) << 32;
    data = virtio_memory((size_t)LARGE * LARGE_DEPTH, LARGE);
    for (size_t page = 0; page < (size_t)LARGE * LARGE_DEPTH; page += 4096)
        *(volatile char *)(data + page) = 1; /* a first touch costs, and is nobody's figure */
}

static void bench_disk(void)
{
    read_phase("warm", LARGE, LARGE_DEPTH, true);
    read_phase("read 4k depth 1", SMALL, 1, false);
    read_phase("read 4k depth 32", SMALL, DEPTH_MAX, false);
    read_phase("read 1m depth 1", LARGE, 1, true);
    read_phase("read 1m depth 4", LARGE, LARGE_DEPTH, true);
}

/* ---- link ---- */

enum frame_kind { KIND_HELLO = 1, KIND_DATA, KIND_ENOUGH };

struct packet {
    struct net_header header;
    uint8_t to[6], from[6], type[2], kind;
};

static struct virtio_device nic;
static struct virtqueue receive, transmit;
static char *receive_buffers, *transmit_buffers;
static unsigned receive_depth;

static struct packet *packet_at(char *buffers, unsigned n)
{
    return (void *)(buffers + (size_t)n * FRAME_ROOM);
}

static void offer_receive(unsigned n)
{
    virtqueue_offer(&receive, n, &(struct virtq_buffer){packet_at(receive_buffers, n), FRAME_ROOM, true}, 1);
}

static void nic_open(bool large)
{
    REQUIRE(EXIT_DEVICE, virtio_find(VIRTIO_NET, 0, &nic));
    uint64_t offloads = NET_F_CSUM | NET_F_GUEST_CSUM | NET_F_GUEST_TSO4 | NET_F_HOST_TSO4;
    virtio_negotiate(&nic, features | (large ? offloads : 0));
    virtqueue_start(&nic, NET_RECEIVE, 256, 1, false, false, &receive);
    virtqueue_start(&nic, NET_TRANSMIT, 256, 1, false, false, &transmit);
    virtio_driver_ok(&nic);
    receive_depth = receive.requests < RECEIVE_DEPTH ? receive.requests : RECEIVE_DEPTH;
    receive_buffers = virtio_memory((size_t)FRAME_ROOM * RECEIVE_DEPTH, 4096);
    transmit_buffers = virtio_memory((size_t)FRAME_ROOM * TRANSMIT_DEPTH, 4096);
    for (unsigned n = 0; n < receive_depth; n++)
        offer_receive(n);
    virtqueue_publish(&receive);
}

static void fill(unsigned n, enum frame_kind kind, uint32_t size)
{
    struct packet *packet = packet_at(transmit_buffers, n);
    bool cut = size > FRAME_ETHERNET;
    packet->header = (struct net_header){0};
    if (cut)
        packet->header = (struct net_header){.flags = NET_NEEDS_CSUM,
                                             .gso_type = NET_GSO_TCPV4,
                                             .header_length = ETHERNET + IP + TCP,
                                             .gso_size = SEGMENT,
                                             .csum_start = ETHERNET + IP,
                                             .csum_offset = TCP_CHECKSUM};
    memset(packet->to, 0xff, 6);
    memset(packet->from, 2, 6);
    packet->type[0] = 0x88;
    packet->type[1] = 0xb5;
    packet->kind = kind;
    if (cut) { /* what a device may look at: an IPv4 and a TCP header (RFC 791, RFC 9293) */
        uint8_t *ip = (uint8_t *)packet + sizeof packet->header + ETHERNET;
        uint32_t length = size - ETHERNET;
        const uint8_t head[] = {
            0x45, 0, (uint8_t)(length >> 8), (uint8_t)length, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0,
            0,    2};
        packet->type[0] = 8;
        packet->type[1] = 0;
        memcpy(ip, head, sizeof head);
        ip[IP + 12] = TCP / 4 << 4;
    }
}

static void send(unsigned n, uint32_t size)
{
    const struct virtq_buffer buffer = {packet_at(transmit_buffers, n),
                                        (uint32_t)sizeof(struct net_header) + size, false};
    virtqueue_offer(&transmit, n, &buffer, 1);
}

static void send_and_wait(enum frame_kind kind)
{
    uint32_t written;
    fill(0, kind, 64);
    send(0, 64);
    virtqueue_publish(&transmit);
    while (virtqueue_take(&transmit, &written) < 0)
        __asm__ volatile("pause");
}

/* Frames of our kind since the last call, their bytes and the last one's kind. */
static unsigned drain(uint64_t *bytes, enum frame_kind *kind)
{
    unsigned n = 0;
    uint32_t written;
    for (int slot; n < BATCH && (slot = virtqueue_take(&receive, &written)) >= 0; n++) {
        struct packet *packet = packet_at(receive_buffers, (unsigned)slot);
        *kind = packet->type[0] == 8 ? KIND_DATA : packet->kind;
        *bytes += written - sizeof(struct net_header);
        offer_receive((unsigned)slot);
    }
    if (n)
        virtqueue_publish(&receive);
    return n;
}

static void receive_phase(void)
{
    uint64_t frames = 0, bytes = 0, start = 0, said = 0;
    enum frame_kind kind = 0;
    while (!start) {
        if (rdtsc() - said > HELLO_TICKS) {
            send_and_wait(KIND_HELLO);
            said = rdtsc();
        }
        if (drain(&bytes, &kind) && kind == KIND_DATA)
            start = rdtsc();
    }
    begin("receive");
    bytes = 0;
    uint64_t rung = receive.doorbells, end;
    start = rdtsc();
    do {
        unsigned n = drain(&bytes, &kind);
        frames += n;
        if (!n)
            __asm__ volatile("pause");
        end = rdtsc();
    } while (end - start < ticks);
    report("receive", frames, bytes, end - start, receive.doorbells - rung);
    /* The sender may be in the middle of a wait for us: frames are taken until it is over. */
    for (unsigned i = 0; i < 3; i++) {
        send_and_wait(KIND_ENOUGH);
        for (uint64_t since = rdtsc(); rdtsc() - since < HELLO_TICKS;)
            drain(&bytes, &kind);
    }
}

static void send_phase(uint32_t frame)
{
    uint64_t frames = 0, bytes = 0;
    uint32_t written;
    enum frame_kind kind = 0;
    unsigned depth = transmit.requests < TRANSMIT_DEPTH ? transmit.requests : TRANSMIT_DEPTH;
    for (unsigned n = 0; n < depth; n++)
        fill(n, KIND_DATA, frame);
    while (!(drain(&bytes, &kind) && kind == KIND_HELLO))
        __asm__ volatile("pause");
    begin("send");
    uint64_t start = rdtsc();
    for (unsigned n = 0; n < depth; n++)
        send(n, frame);
    virtqueue_publish(&transmit);
    while (!(drain(&bytes, &kind) && kind == KIND_ENOUGH)) {
        unsigned batch = 0;
        for (int slot; batch < BATCH && (slot = virtqueue_take(&transmit, &written)) >= 0; batch++)
            send((unsigned)slot, frame);
        frames += batch;
        if (batch)
            virtqueue_publish(&transmit);
        else
            __asm__ volatile("pause");
    }
    report("send", frames, frames * frame, rdtsc() - start, transmit.doorbells);
}

/* Turn on the spot, so that the host can tell the vCPU's thread from the others by its appetite. */
static void spin(void)
{
    print("spin\n");
    for (uint64_t since = rdtsc(); rdtsc() - since < ticks / 8;)
        __asm__ volatile("pause");
}

static uint64_t run(uint64_t unused)
{
    (void)unused;
    ticks = argument("ticks", 2500000000);
    indirect = argument("indirect", 0);
    features =
        VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC | (argument("packed", 0) ? VIRTIO_F_RING_PACKED : 0);
    uint32_t frame = (uint32_t)argument("frame", 64);
    if (argument("blk", 0)) {
        disk_open();
        spin();
        bench_disk();
    }
    if (argument("net", 0)) {
        nic_open(frame > FRAME_ETHERNET);
        uint64_t offloads = NET_F_HOST_TSO4 | NET_F_GUEST_TSO4;
        if (frame > FRAME_ETHERNET && (nic.agreed & offloads) != offloads) {
            print("no offloads\n");
            return 0;
        }
        spin();
        if (argument("net", 0) == 1)
            receive_phase();
        else
            send_phase(frame);
    }
    return 0;
}

void guest_main(void)
{
    cpu_init();
    enter_user_with_ports(run, 0);
    if (!argument("idle", 0))
        return;
    struct virtio_device rng;
    if (virtio_find(VIRTIO_BLK, 0, &disk))
        disk_open();
    if (virtio_find(VIRTIO_NET, 0, &nic))
        nic_open(false);
    if (virtio_find(VIRTIO_RNG, 0, &rng)) {
        virtio_negotiate(&rng, features);
        virtio_driver_ok(&rng);
    }
    print("idle\n");
    for (;;) /* interrupts on, though none comes: a machine that nothing can wake would end */
        __asm__ volatile("sti; hlt");
}
