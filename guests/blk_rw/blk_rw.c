/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A disk written and read back, and the requests a disk must refuse. Command line:
 *   sectors=N   how large it should be (required; at least 2048)
 *   packed=1 indirect=1 event_idx=1   agree to these
 *   ro=1        it is read-only
 *   blocks=N    the part of it that is written (256)
 *   rounds=N    write and read everything so many times (1); 0: until a byte comes, and says "round N" after each
 * Block b of 4 KiB, for every third b below that, then holds the words round << 48 | b << 32 | index, rounds counted from
 * 0: the host may look. Prints "id " and what GET_ID says.
 */
#include "cpu.h"
#include "virtio.h"

enum { BLOCK = 4096, STRIDE = 3, REQUEST_BUFFERS = 4, SLOTS = 16 };

static struct virtio_device disk;
static struct virtqueue queue;
static uint64_t round, blocks;
static struct {
    struct blk_header header;
    volatile uint8_t status;
} slots[SLOTS];
static uint64_t data[SLOTS][BLOCK / 8] __attribute__((aligned(4096)));

static void offer(unsigned slot, uint32_t type, uint64_t sector, uint32_t first, uint32_t second)
{
    slots[slot].header = (struct blk_header){.type = type, .sector = sector};
    slots[slot].status = 0xff;
    bool in = type == BLK_IN || type == BLK_GET_ID;
    struct virtq_buffer buffers[REQUEST_BUFFERS] = {{&slots[slot].header, sizeof slots[slot].header, false}};
    unsigned n = 1;
    if (first)
        buffers[n++] = (struct virtq_buffer){data[slot], first, in};
    if (second)
        buffers[n++] = (struct virtq_buffer){(char *)data[slot] + first, second, in};
    buffers[n++] = (struct virtq_buffer){(void *)&slots[slot].status, 1, true};
    virtqueue_offer(&queue, slot, buffers, n);
}

static int take(uint32_t *written)
{
    int slot;
    while ((slot = virtqueue_take(&queue, written)) < 0)
        __asm__ volatile("pause");
    return slot;
}

/* One request by itself; answers its status. */
static uint8_t request(uint32_t type, uint64_t sector, uint32_t first, uint32_t second, uint32_t *written)
{
    offer(0, type, sector, first, second);
    virtqueue_publish(&queue);
    CHECK_EQ(take(written), 0);
    return slots[0].status;
}

static void fill(unsigned slot, uint64_t block)
{
    for (unsigned i = 0; i < BLOCK / 8; i++)
        data[slot][i] = round << 48 | block << 32 | i;
}

static void check(unsigned slot, uint64_t block)
{
    for (unsigned i = 0; i < BLOCK / 8; i++)
        CHECK_EQ(data[slot][i], round << 48 | block << 32 | i);
}

/* Every third block, as many at a time as the ring holds, in pieces of two sizes. */
static void move(uint32_t type, unsigned depth)
{
    static unsigned block_of[SLOTS];
    unsigned block = 0, in_flight = 0;
    while (block < blocks || in_flight) {
        unsigned slot = 0;
        for (; in_flight == 0 && slot < depth && block < blocks; slot++, block += STRIDE) {
            if (type == BLK_OUT)
                fill(slot, block);
            block_of[slot] = block;
            offer(slot, type, (uint64_t)block * (BLOCK / BLK_SECTOR), 512 * (1 + block % 7),
                  BLOCK - 512 * (1 + block % 7));
        }
        in_flight += slot;
        if (slot)
            virtqueue_publish(&queue);
        uint32_t written;
        unsigned done = (unsigned)take(&written);
        in_flight--;
        CHECK_EQ(slots[done].status, BLK_OK);
        CHECK_EQ(written, type == BLK_IN ? BLOCK + 1 : 1);
        if (type == BLK_IN)
            check(done, block_of[done]);
    }
}

static bool told_to_end(void)
{
    enum { LSR = PORT_SERIAL + 5, DATA_READY = 1 };
    return inb(LSR) & DATA_READY;
}

static uint64_t run(uint64_t sectors)
{
    uint32_t written;
    blocks = argument("blocks", 256);
    bool read_only = argument("ro", 0);
    REQUIRE(EXIT_DEVICE, virtio_find(VIRTIO_BLK, 0, &disk));
    uint64_t wanted = BLK_F_FLUSH | BLK_F_RO | (argument("packed", 0) ? VIRTIO_F_RING_PACKED : 0) |
                      (argument("indirect", 0) ? VIRTIO_F_INDIRECT_DESC : 0) |
                      (argument("event_idx", 0) ? VIRTIO_F_EVENT_IDX : 0);
    virtio_negotiate(&disk, wanted);
    CHECK_EQ(disk.agreed, (wanted & ~BLK_F_RO) | (read_only ? BLK_F_RO : 0) | VIRTIO_F_VERSION_1);
    CHECK_EQ(mmio_read32(disk.config) | (uint64_t)mmio_read32(disk.config + 4) << 32, sectors);
    virtqueue_start(&disk, 0, 64, REQUEST_BUFFERS, argument("indirect", 0), false, &queue);
    CHECK(queue.requests >= SLOTS);
    virtio_driver_ok(&disk);

    CHECK_EQ(request(BLK_GET_ID, 0, BLK_ID_BYTES, 0, &written), BLK_OK);
    ((char *)data[0])[BLK_ID_BYTES] = 0;
    print("id %s\n", (const char *)data[0]);

    if (read_only) {
        CHECK_EQ(request(BLK_OUT, 0, 512, 0, &written), BLK_IOERR);
        CHECK_EQ(request(BLK_IN, 0, 512, 0, &written), BLK_OK);
    }
    const uint64_t rounds = argument("rounds", 1);
    for (bool more = !read_only; more; round++) {
        move(BLK_OUT, SLOTS);
        CHECK_EQ(request(BLK_FLUSH, 0, 0, 0, &written), BLK_OK);
        move(BLK_IN, 1);
        move(BLK_IN, SLOTS);
        if (!rounds)
            print("round %u\n", (unsigned)round);
        more = rounds ? round + 1 < rounds : !told_to_end();
    }

    /* The last sector is there, and nothing behind it. */
    CHECK_EQ(request(BLK_IN, sectors - 1, 512, 0, &written), BLK_OK);
    CHECK_EQ(written, 513);
    CHECK_EQ(request(BLK_IN, sectors - 1, 512, 512, &written), BLK_IOERR);
    CHECK_EQ(request(BLK_IN, sectors, 512, 0, &written), BLK_IOERR);
    CHECK_EQ(request(BLK_IN, ~0ull, 512, 512, &written), BLK_IOERR);
    CHECK_EQ(request(0x7fffffff, 0, 512, 0, &written), BLK_UNSUPP);
    CHECK_EQ(virtio_status(&disk) & VIRTIO_NEEDS_RESET, 0);
    return 0;
}

/* At CPL 3: patterns are made and compared word by word, and kernel code may be slow. */
void guest_main(void)
{
    cpu_init();
    enter_user_with_ports(run, argument_required("sectors"));
}
