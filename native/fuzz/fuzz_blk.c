/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-blk's requests, parsed and executed, from a guest that asks for anything: types, sectors, sizes, ranges and the
 * way a chain is cut. What must hold: every request is answered or breaks the device, the answer is one of the spec's,
 * no more is said to be written than there is room for, and the file behind the disk changes neither in length nor,
 * where the disk is read-only or has an overlay, at all.
 */
#include "blk_guest.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define SIZE (64u << 10)
#define OVERLAY_SIZE (8192 + SIZE)
#define FEATURES (~(VMM_F_RING_PACKED | VMM_F_RING_RESET))

enum kind { PLAIN, LARGE_SECTORS, READ_ONLY, OVERLAY, KINDS };

static struct guest guests[KINDS];
static int files[KINDS], overlay;
static uint8_t pattern[SIZE];

struct input {
    const uint8_t *at, *end;
};

static uint64_t take(struct input *in, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && in->at < in->end; i++)
        value |= (uint64_t)*in->at++ << 8 * i;
    return value;
}

static int file_of(uint64_t size)
{
    const int fd = memfd_create("fuzz-blk", 0);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static void setup(void)
{
    for (unsigned i = 0; i < SIZE; i++)
        pattern[i] = (uint8_t)(i * 31 + i / 512);
    overlay = file_of(OVERLAY_SIZE);
    for (enum kind k = 0; k < KINDS; k++) {
        vmm_disk *disk;
        files[k] = file_of(SIZE);
        CHECK(pwrite(files[k], pattern, SIZE, 0) == SIZE);
        const vmm_disk_layer layers[] = {{.fd = overlay, .size = SIZE, .bitmap_size = 4096, .data_at = 8192},
                                         {.fd = files[k], .size = SIZE}};
        CHECK_EQUAL(k == OVERLAY ? vmm_disk_open_overlay(layers, 2, 1, VMM_DISK_BLOCKING, &disk)
                                 : vmm_disk_open_raw(files[k], SIZE, 1, VMM_DISK_BLOCKING, &disk),
                    0);
        const vmm_blk_options options = {.sector = k == LARGE_SECTORS ? 4096 : 512,
                                         .queues = 1,
                                         .readonly = k == READ_ONLY,
                                         .serial = "fuzz"};
        guest_create(&guests[k], disk, &options);
        guests[k].dev->queues[0].external = true; /* kicked here and not by the I/O thread */
    }
}

static uint64_t take_sector(struct input *in)
{
    static const uint64_t places[] = {0,
                                      1,
                                      7,
                                      8,
                                      SIZE / 512 - 8,
                                      SIZE / 512 - 1,
                                      SIZE / 512,
                                      SIZE / 512 + 1,
                                      UINT64_MAX,
                                      UINT64_MAX / 512,
                                      UINT64_MAX / 512 + 1,
                                      1ull << 55};
    const uint8_t how = (uint8_t)take(in, 1);
    return how < 12 ? places[how] : how == 255 ? take(in, 8) : take(in, 1);
}

static uint32_t take_size(struct input *in)
{
    static const uint32_t sizes[] = {0, 1, 7, 15, 16, 17, 20, 511, 512, 513, 4096, 4097, 8192, 65536};
    const uint8_t how = (uint8_t)take(in, 1);
    return how < 14 ? sizes[how] : how == 255 ? (uint32_t)take(in, 3) % 0x80000 : how & 1 ? how : 512u * how;
}

/* A request in at most 9 pieces. The bytes it has for the device: a header, then ranges, then anything. */
static unsigned build(struct guest *g, struct input *in, struct piece *pieces, uint64_t *status)
{
    static const uint32_t types[] = {0, 1, 4, 8, 11, 13, 0, 1, 2, 0x80000000};
    uint8_t *out = machine_at(g->vm, GUEST_DATA, 16 + 17 * 16);
    const uint8_t type = (uint8_t)take(in, 1);
    const uint32_t known = type < 10 ? types[type] : type & 1 ? types[type % 6] : type;
    const uint64_t sector = take_sector(in);
    memcpy(out, &known, 4);
    memcpy(out + 8, &sector, 8);
    unsigned n_ranges = known == 11 || known == 13 ? (unsigned)take(in, 1) % 18 : 0;
    for (unsigned i = 0; i < n_ranges; i++) {
        const uint64_t at = take_sector(in);
        const uint32_t rest[2] = {take_size(in), (uint32_t)take(in, 1) & (i & 1 ? 1 : 3)};
        memcpy(out + 16 + i * 16, &at, 8);
        memcpy(out + 24 + i * 16, rest, 8);
    }
    unsigned n = 0;
    const uint8_t shape = (uint8_t)take(in, 1);
    if (shape & 1) /* as drivers have it */
        pieces[n++] = (struct piece)OUT(GUEST_DATA, 16 + n_ranges * 16);
    uint64_t at = GUEST_DATA + (shape & 1 ? 16 + n_ranges * 16 : 0);
    for (unsigned left = shape >> 1 & 3; left; left--) {
        const uint32_t size = take_size(in);
        pieces[n++] = (struct piece)OUT(at, size);
        at += size;
    }
    at = GUEST_DATA + 0x200000;
    for (unsigned left = shape >> 3 & 3; left; left--) {
        const uint32_t size = take_size(in);
        pieces[n++] = (struct piece)IN(at, size);
        at += size;
    }
    if (shape & 0x20)
        pieces[n++] = (struct piece)IN(at++, 1);
    *status = at - 1;
    memset(machine_at(g->vm, GUEST_DATA + 0x200000, at - GUEST_DATA - 0x200000 + 1), 0xee,
           at - GUEST_DATA - 0x200000);
    return n;
}

static void check_file(enum kind k)
{
    struct stat st;
    CHECK(fstat(files[k], &st) == 0);
    CHECK_EQUAL(st.st_size, SIZE);
    CHECK(fstat(overlay, &st) == 0);
    CHECK_EQUAL(st.st_size, OVERLAY_SIZE);
    if (k != READ_ONLY && k != OVERLAY)
        return;
    static uint8_t bytes[SIZE];
    CHECK(pread(files[k], bytes, SIZE, 0) == SIZE);
    CHECK(!memcmp(bytes, pattern, SIZE));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!guests[0].vm)
        setup();
    struct input in = {data, data + size};
    const uint8_t first = (uint8_t)take(&in, 1);
    const enum kind k = first % KINDS;
    struct guest *g = &guests[k];
    guest_start(g, first & 4 ? ~VMM_F_RING_RESET : first & 8 ? FEATURES : 0, 16);
    struct ring *ring = &g->rings[0];
    for (unsigned requests = 0; in.at < in.end && requests < 32 && g->dev->running; requests++) {
        struct piece pieces[9];
        uint64_t status, room = 0;
        uint32_t written;
        int id, offered;
        unsigned n = build(g, &in, pieces, &status);
        if (!n)
            continue;
        for (unsigned i = 0; i < n; i++)
            room += pieces[i].in ? pieces[i].size : 0;
        offered = first & 16 ? ring_offer_indirect(ring, 0x90000, pieces, n) : ring_offer(ring, pieces, n);
        CHECK(offered >= 0);
        {
            VMM_VIRTIO_LOCKED(g->dev);
            g->dev->ops->kick(g->dev->opaque, 0);
        }
        if (!g->dev->running)
            break;
        CHECK(ring_collect(ring, &id, &written));
        CHECK_EQUAL(id, offered);
        CHECK(room && written <= room);
        CHECK(*(uint8_t *)machine_at(g->vm, status, 1) <= VMM_BLK_UNSUPP);
        CHECK_EQUAL(g->dev->queues[0].ring.in_flight, 0);
    }
    check_file(k);
    return 0;
}
