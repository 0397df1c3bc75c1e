/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every rule of the rings broken, one at a time, on a disk: each time the device must say DEVICE_NEEDS_RESET (virtio
 * 1.2, 2.1.1), and after its reset serve again as if nothing had been. "packed=1": the packed ring's rules.
 * Prints each rule before it breaks it. "qemu=1" leaves out what QEMU 7.2 lets pass (and
 * it hangs on a packed chain without an end).
 */
#include "cpu.h"
#include "virtio.h"

enum { SIZE = 16, CHAIN = 3, PATIENCE_TICKS = 2000000000 };
enum { PACKED_AVAIL = 1 << 7 };
#define NO_MEMORY 0xb0000000ull /* below 4 GiB, where these machines have none */
#define NO_MEMORY_ABOVE (1ull << 45)

static struct virtio_device disk;
static struct virtqueue queue;
static struct blk_header header;
static uint8_t sector[512], status;
static struct virtq_desc table[CHAIN];

static void start(uint64_t extra)
{
    virtio_negotiate(&disk,
                     VIRTIO_F_INDIRECT_DESC | (argument("packed", 0) ? VIRTIO_F_RING_PACKED : 0) | extra);
    virtqueue_start(&disk, 0, SIZE, CHAIN, false, false, &queue);
    CHECK_EQ(queue.size, SIZE);
    virtio_driver_ok(&disk);
}

/* A good request as request 0, on the ring but not yet shown. */
static void offer(void)
{
    header = (struct blk_header){.type = BLK_IN};
    status = 0xff;
    const struct virtq_buffer buffers[CHAIN] = {
        {&header, sizeof header, false}, {sector, sizeof sector, true}, {&status, 1, true}};
    virtqueue_offer(&queue, 0, buffers, CHAIN);
}

static bool needs_reset(void)
{
    for (uint64_t since = rdtsc(); rdtsc() - since < PATIENCE_TICKS;)
        if (virtio_status(&disk) & VIRTIO_NEEDS_RESET)
            return true;
    return false;
}

static void works(void)
{
    uint32_t written;
    start(0);
    offer();
    virtqueue_publish(&queue);
    while (virtqueue_take(&queue, &written) < 0)
        CHECK(!(virtio_status(&disk) & VIRTIO_NEEDS_RESET));
    CHECK_EQ(written, sizeof sector + 1);
    CHECK_EQ(*(volatile uint8_t *)&status, BLK_OK);
}

/* ---- split (2.7) ---- */

static void use_table(uint32_t length, uint16_t flags)
{
    memcpy(table, queue.desc, sizeof table);
    queue.desc[0] = (struct virtq_desc){(uintptr_t)table, length, VIRTQ_DESC_INDIRECT | flags, 1};
}

static void index_too_far(void)
{
    queue.next += SIZE;
}
static void index_back(void)
{
    queue.next -= 2;
}
static void head_outside(void)
{
    queue.avail->ring[0] = SIZE;
}
static void head_far_outside(void)
{
    queue.avail->ring[0] = 0xffff;
}
static void next_outside(void)
{
    queue.desc[0].next = SIZE;
}
static void next_far_outside(void)
{
    queue.desc[1].next = 0xffff;
}
static void chain_of_itself(void)
{
    queue.desc[0].next = 0;
}
static void chain_in_a_circle(void)
{
    queue.desc[2].flags |= VIRTQ_DESC_NEXT;
    queue.desc[2].next = 1;
}
static void buffer_outside(void)
{
    queue.desc[1].address = NO_MEMORY;
}
static void buffer_far_outside(void)
{
    queue.desc[1].address = NO_MEMORY_ABOVE;
}
static void buffer_at_the_end(void)
{
    queue.desc[1].address = 0 - 256ull;
}
static void buffer_too_long(void)
{
    queue.desc[1].length = 0xffffffff;
}
static void header_outside(void)
{
    queue.desc[0].address = NO_MEMORY;
}
static void readable_behind_writable(void)
{
    queue.desc[0].flags |= VIRTQ_DESC_WRITE;
    queue.desc[1].flags &= (uint16_t)~VIRTQ_DESC_WRITE;
}
static void table_empty(void)
{
    use_table(0, 0);
}
static void table_uneven(void)
{
    use_table(sizeof table - 1, 0);
}
static void table_outside(void)
{
    use_table(sizeof table, 0);
    queue.desc[0].address = NO_MEMORY;
}
static void table_and_next(void)
{
    use_table(sizeof table, VIRTQ_DESC_NEXT);
}
static void table_in_table(void)
{
    use_table(sizeof table, 0);
    table[1] = (struct virtq_desc){(uintptr_t)table, sizeof table, VIRTQ_DESC_INDIRECT, 0};
    table[0].next = 1;
}
static void table_next_outside(void)
{
    use_table(sizeof table, 0);
    table[1].next = CHAIN;
}
static void table_in_a_circle(void)
{
    use_table(sizeof table, 0);
    table[2].flags |= VIRTQ_DESC_NEXT;
    table[2].next = 0;
}

/* ---- packed (2.8) ---- */

static void packed_table(uint32_t length, uint16_t flags)
{
    struct virtq_packed_desc *to = (void *)table;
    for (unsigned i = 0; i < CHAIN; i++)
        to[i] = (struct virtq_packed_desc){queue.ring[i].address, queue.ring[i].length, 0,
                                           queue.ring[i].flags & VIRTQ_DESC_WRITE};
    queue.ring[0].address = (uintptr_t)table;
    queue.ring[0].length = length;
    queue.ring[0].flags = (uint16_t)(PACKED_AVAIL | VIRTQ_DESC_INDIRECT | flags);
}

static void packed_chain_without_end(void)
{
    for (unsigned i = 0; i < SIZE; i++) {
        queue.ring[i] = queue.ring[1];
        queue.ring[i].flags = VIRTQ_DESC_NEXT | PACKED_AVAIL;
    }
}
static void packed_buffer_outside(void)
{
    queue.ring[1].address = NO_MEMORY;
}
static void packed_buffer_far_outside(void)
{
    queue.ring[1].address = NO_MEMORY_ABOVE;
}
static void packed_buffer_at_the_end(void)
{
    queue.ring[1].address = 0 - 256ull;
}
static void packed_buffer_too_long(void)
{
    queue.ring[1].length = 0xffffffff;
}
static void packed_readable_behind_writable(void)
{
    queue.ring[0].flags |= VIRTQ_DESC_WRITE;
    queue.ring[1].flags &= (uint16_t)~VIRTQ_DESC_WRITE;
}
static void packed_table_empty(void)
{
    packed_table(0, 0);
}
static void packed_table_uneven(void)
{
    packed_table(sizeof table - 1, 0);
}
static void packed_table_outside(void)
{
    packed_table(sizeof table, 0);
    queue.ring[0].address = NO_MEMORY;
}
static void packed_table_and_next(void)
{
    packed_table(sizeof table, VIRTQ_DESC_NEXT);
}

static const struct rule {
    const char *name;
    void (*break_it)(void);
    bool not_in_qemu;
} split_rules[] =
    {
        {"more available than the ring holds", index_too_far, false},
        {"available index went back", index_back, false},
        {"head outside the table", head_outside, false},
        {"head far outside the table", head_far_outside, false},
        {"next outside the table", next_outside, false},
        {"next far outside the table", next_far_outside, false},
        {"a descriptor that is its own next", chain_of_itself, false},
        {"a chain in a circle", chain_in_a_circle, false},
        {"a buffer outside memory", buffer_outside, true},
        {"a buffer far outside memory", buffer_far_outside, true},
        {"a buffer across the end of addresses", buffer_at_the_end, true},
        {"a buffer of 4 GiB", buffer_too_long, false},
        {"a header outside memory", header_outside, true},
        {"readable behind writable", readable_behind_writable, false},
        {"an empty indirect table", table_empty, false},
        {"an indirect table of no whole descriptors", table_uneven, false},
        {"an indirect table outside memory", table_outside, false},
        {"an indirect table and a next", table_and_next, true},
        {"an indirect table in an indirect table", table_in_table, false},
        {"next outside an indirect table", table_next_outside, false},
        {"an indirect table in a circle", table_in_a_circle, false},
},
  packed_rules[] = {
      {"a chain without an end", packed_chain_without_end, false},
      {"a buffer outside memory", packed_buffer_outside, false},
      {"a buffer far outside memory", packed_buffer_far_outside, false},
      {"a buffer across the end of addresses", packed_buffer_at_the_end, false},
      {"a buffer of 4 GiB", packed_buffer_too_long, false},
      {"readable behind writable", packed_readable_behind_writable, false},
      {"an empty indirect table", packed_table_empty, false},
      {"an indirect table of no whole descriptors", packed_table_uneven, false},
      {"an indirect table outside memory", packed_table_outside, false},
      {"an indirect table and a next", packed_table_and_next, false},
};

static void break_rules(const struct rule *rules, unsigned n)
{
    bool qemu = argument("qemu", 0);
    for (unsigned i = 0; i < n; i++) {
        if (qemu && rules[i].not_in_qemu)
            continue;
        print("%s\n", rules[i].name);
        start(0);
        offer();
        rules[i].break_it();
        virtqueue_publish(&queue);
        virtqueue_ring(&queue);
        CHECK(needs_reset());
        CHECK(qemu || *(volatile uint8_t *)&status == 0xff);
        works();
    }
}

/* ---- queues that cannot be ---- */

static const struct area {
    const char *name;
    uint16_t size;
    uint64_t desc, driver, device;
} areas[] = {
    {"descriptors outside memory", SIZE, NO_MEMORY, 0x10000, 0x11000},
    {"driver area outside memory", SIZE, 0x10000, NO_MEMORY, 0x11000},
    {"device area outside memory", SIZE, 0x10000, 0x11000, NO_MEMORY_ABOVE},
    {"device area across the end of addresses", SIZE, 0x10000, 0x11000, 0 - 8ull},
};

static void break_areas(void)
{
    for (unsigned i = 0; i < sizeof areas / sizeof *areas; i++) {
        print("%s\n", areas[i].name);
        virtio_negotiate(&disk, argument("packed", 0) ? VIRTIO_F_RING_PACKED : 0);
        virtqueue_enable(&disk, 0, areas[i].size, areas[i].desc, areas[i].driver, areas[i].device);
        virtio_set_status(&disk, VIRTIO_DRIVER_OK);
        virtqueue_ring(&queue);
        CHECK(needs_reset());
        works();
    }
}

static uint64_t run(uint64_t packed)
{
    REQUIRE(EXIT_DEVICE, virtio_find(VIRTIO_BLK, 0, &disk));
    works();
    if (packed)
        break_rules(packed_rules, sizeof packed_rules / sizeof *packed_rules);
    else
        break_rules(split_rules, sizeof split_rules / sizeof *split_rules);
    if (!argument("qemu", 0))
        break_areas();
    return 0;
}

void guest_main(void)
{
    cpu_init();
    enter_user_with_ports(run, argument("packed", 0));
}
