/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-blk from the driver's side of its rings (virtio 1.2, 5.2). */
#include "blk_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>

#define SIZE (4u << 20)
#define ALL_FEATURES (~(VMM_F_RING_PACKED | VMM_F_RING_RESET))
#define SERIAL "PYVMM-0123456789abcd"

enum { F_RO = 5, F_FLUSH = 9, F_CONFIG_WCE = 11, F_MQ = 12, F_DISCARD = 13 };

static vmm_blk_options options(void)
{
    vmm_blk_options o = {.sector = 512, .queues = 1};
    memcpy(o.serial, SERIAL, sizeof(o.serial));
    return o;
}

static int image(void)
{
    const int fd = memfd_create("test-blk", 0);
    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
    return fd;
}

static void setup_with(struct guest *g, int fd, vmm_blk_options o, uint64_t features, uint32_t flags)
{
    vmm_disk *disk;
    CHECK_EQUAL(vmm_disk_open_raw(fd, SIZE, 1, flags, &disk), 0);
    guest_create(g, disk, &o);
    guest_start(g, features, 64);
}

static int setup(struct guest *g)
{
    const int fd = image();
    setup_with(g, fd, options(), ALL_FEATURES, 0);
    return fd;
}

static void teardown(struct guest *g, int fd)
{
    guest_destroy(g);
    close(fd);
}

static void test_what_is_written_is_read(uint64_t features, uint32_t flags)
{
    struct guest g;
    const int fd = image();
    setup_with(&g, fd, options(), features, flags);
    uint8_t *data = guest_data(&g), bytes[8192];
    for (int i = 0; i < 8192; i++)
        bytes[i] = data[i] = (uint8_t)(i * 7);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 9, 8192, false), VMM_BLK_OK);
    memset(data, 0, 8192);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_FLUSH, 0, 0, false), VMM_BLK_OK);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 9, 8192, true), VMM_BLK_OK);
    CHECK(!memcmp(data, bytes, 8192));
    CHECK(pread(fd, data, 8192, 9 * 512) == 8192 && !memcmp(data, bytes, 8192));
    CHECK_EQUAL(guest_request(&g, VMM_BLK_GET_ID, 0, 20, true), VMM_BLK_OK);
    CHECK(!memcmp(data, SERIAL, 20));
    vmm_blk_stats stats;
    CHECK_EQUAL(vmm_blk_get_stats(g.blk, 0, &stats), 0);
    CHECK(stats.reads == 1 && stats.writes == 1 && stats.flushes == 1 && stats.errors == 0);
    CHECK(stats.bytes_read == 8192 && stats.bytes_written == 8192);
    CHECK_EQUAL(vmm_blk_get_stats(g.blk, 1, &stats), -EINVAL);
    teardown(&g, fd);
}

/* Header and status in pieces of their own, glued to the data, cut anywhere: the spec says nothing of framing (2.7.4). */
static void test_a_request_may_be_cut_into_pieces_anywhere(void)
{
    struct guest g;
    const int fd = setup(&g);
    uint8_t pattern[3 * 512];
    for (unsigned i = 0; i < sizeof(pattern); i++)
        pattern[i] = (uint8_t)(i ^ i >> 8);
    for (unsigned cut = 1; cut < 16 + sizeof(pattern); cut += cut < 20 ? 1 : 97) {
        const uint64_t header = guest_header(&g, VMM_BLK_OUT, cut);
        uint8_t *at = machine_at(g.vm, 0x90000, 16 + sizeof(pattern));
        memcpy(at, machine_at(g.vm, header, 16), 16);
        memcpy(at + 16, pattern, sizeof(pattern));
        const struct piece pieces[] = {OUT(0x90000, cut), OUT(0x90000 + cut, 16 + sizeof(pattern) - cut),
                                       IN(header + GUEST_STATUS, 1)};
        ring_offer(&g.rings[0], pieces, 3);
        guest_ring(&g, 0);
        CHECK_EQUAL(guest_wait(&g, 0, NULL), 1);
        CHECK_EQUAL(*(uint8_t *)machine_at(g.vm, header + GUEST_STATUS, 1), VMM_BLK_OK);
        uint8_t bytes[sizeof(pattern)];
        CHECK(pread(fd, bytes, sizeof(bytes), cut * 512) == sizeof(bytes) &&
              !memcmp(bytes, pattern, sizeof(bytes)));
    }
    for (unsigned cut = 1; cut < 1025; cut += 93) { /* data and status in common pieces */
        const uint64_t header = guest_header(&g, VMM_BLK_IN, 17);
        uint8_t *at = memset(machine_at(g.vm, 0x90000, 1025), 0xee, 1025);
        const struct piece pieces[] = {OUT(header, 7), OUT(header + 7, 9), IN(0x90000, cut),
                                       IN(0x90000 + cut, 1025 - cut)};
        ring_offer(&g.rings[0], pieces, cut == 1025 ? 3 : 4);
        guest_ring(&g, 0);
        CHECK_EQUAL(guest_wait(&g, 0, NULL), 1025);
        uint8_t bytes[1024];
        CHECK(pread(fd, bytes, 1024, 17 * 512) == 1024 && !memcmp(bytes, at, 1024));
        CHECK_EQUAL(at[1024], VMM_BLK_OK);
    }
    teardown(&g, fd);
}

static void test_what_lies_outside_the_disk_is_an_io_error(void)
{
    struct guest g;
    const int fd = setup(&g);
    const uint64_t end = SIZE / 512;
    const struct {
        uint64_t sector;
        uint32_t size;
        uint8_t status;
    } cases[] = {
        {end - 1, 512, VMM_BLK_OK},
        {end, 512, VMM_BLK_IOERR},
        {end - 1, 1024, VMM_BLK_IOERR},
        {end, 0, VMM_BLK_OK},
        {end + 1, 0, VMM_BLK_IOERR},
        {UINT64_MAX, 512, VMM_BLK_IOERR},
        {UINT64_MAX / 512, 512, VMM_BLK_IOERR},
        {UINT64_MAX / 512 + 1, 512, VMM_BLK_IOERR},
        {1ull << 55, 512, VMM_BLK_IOERR},
        {0, 511, VMM_BLK_IOERR},
        {0, 513, VMM_BLK_IOERR},
        {0, 1, VMM_BLK_IOERR},
    };
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, cases[i].sector, cases[i].size, true), cases[i].status);
        CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, cases[i].sector, cases[i].size, false), cases[i].status);
    }
    CHECK_EQUAL(g.said, 0); /* the guest's mistakes are no news of the host's */
    teardown(&g, fd);
}

static void test_a_request_that_is_not_known_is_unsupported(void)
{
    struct guest g;
    const int fd = setup(&g);
    static const uint32_t types[] = {2, 3, 5, 10, 12, 14, 0x80000000, UINT32_MAX};
    for (unsigned i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        CHECK_EQUAL(guest_request(&g, types[i], 0, 512, i & 1), VMM_BLK_UNSUPP);
    teardown(&g, fd);
}

static void test_a_disk_that_is_read_only_refuses_every_change(void)
{
    struct guest g;
    const int fd = image();
    vmm_blk_options o = options();
    o.readonly = 1;
    setup_with(&g, fd, o, ALL_FEATURES, 0);
    CHECK(vmm_virtio_has(g.dev, F_RO) && !vmm_virtio_has(g.dev, F_DISCARD));
    memset(guest_data(&g), 0xff, 512);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 0, 512, false), VMM_BLK_IOERR);
    memcpy(guest_data(&g), (uint32_t[]){0, 0, 8, 0}, 16);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_DISCARD, 0, 16, false), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_WRITE_ZEROES, 0, 16, false), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_FLUSH, 0, 0, false), VMM_BLK_OK);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 0, 512, true), VMM_BLK_OK);
    CHECK_EQUAL(guest_data(&g)[0], 0);
    teardown(&g, fd);
}

struct range {
    uint64_t sector;
    uint32_t sectors, flags;
};

static uint8_t ranges(struct guest *g, uint32_t type, const struct range *list, unsigned n)
{
    memcpy(guest_data(g), list, n * sizeof(*list));
    return guest_request(g, type, 0, n * sizeof(*list), false);
}

static void test_ranges_are_discarded_and_zeroed_within_their_limits(void)
{
    struct guest g;
    const int fd = setup(&g);
    uint8_t bytes[SIZE / 4], *all = malloc(SIZE);
    memset(all, 0xaa, SIZE);
    CHECK(pwrite(fd, all, SIZE, 0) == SIZE);
    CHECK_EQUAL(ranges(&g, VMM_BLK_WRITE_ZEROES, (struct range[]){{3, 5, 0}, {100, 1, 1}, {101, 0, 0}}, 3),
                0);
    memset(all + 3 * 512, 0, 5 * 512);
    memset(all + 100 * 512, 0, 512);
    for (unsigned part = 0; part < 4; part++)
        CHECK(pread(fd, bytes, sizeof(bytes), part * sizeof(bytes)) == sizeof(bytes) &&
              !memcmp(bytes, all + part * sizeof(bytes), sizeof(bytes)));
    CHECK_EQUAL(ranges(&g, VMM_BLK_DISCARD, (struct range[]){{1024, 1024, 0}, {8, 8, 0}}, 2), 0);
    struct range many[VMM_BLK_RANGES_MAX + 1] = {{0}};
    CHECK_EQUAL(ranges(&g, VMM_BLK_DISCARD, many, VMM_BLK_RANGES_MAX), VMM_BLK_OK);
    CHECK_EQUAL(ranges(&g, VMM_BLK_DISCARD, many, VMM_BLK_RANGES_MAX + 1), VMM_BLK_IOERR);
    CHECK_EQUAL(ranges(&g, VMM_BLK_DISCARD, many, 0), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_DISCARD, 0, 15, false), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_DISCARD, 0, 17, false), VMM_BLK_IOERR);
    CHECK_EQUAL(ranges(&g, VMM_BLK_DISCARD, (struct range[]){{0, 8, 1}}, 1), VMM_BLK_UNSUPP);
    CHECK_EQUAL(ranges(&g, VMM_BLK_WRITE_ZEROES, (struct range[]){{0, 8, 2}}, 1), VMM_BLK_UNSUPP);
    CHECK_EQUAL(ranges(&g, VMM_BLK_WRITE_ZEROES, (struct range[]){{SIZE / 512, 1, 0}}, 1), VMM_BLK_IOERR);
    CHECK_EQUAL(ranges(&g, VMM_BLK_WRITE_ZEROES, (struct range[]){{0, UINT32_MAX, 0}}, 1), VMM_BLK_IOERR);
    CHECK_EQUAL(ranges(&g, VMM_BLK_DISCARD, (struct range[]){{UINT64_MAX, 2, 0}}, 1), VMM_BLK_IOERR);
    free(all);
    teardown(&g, fd);
}

static void test_no_room_for_header_or_status_breaks_the_device_alone(void)
{
    struct guest g;
    const int fd = setup(&g);
    for (int i = 0; i < 2; i++) {
        const uint64_t header = guest_header(&g, VMM_BLK_FLUSH, 0);
        const struct piece short_header[] = {OUT(header, 15), IN(header + GUEST_STATUS, 1)};
        const struct piece no_status[] = {OUT(header, 16)};
        const unsigned before = g.config_interrupts;
        ring_offer(&g.rings[0], i ? no_status : short_header, i ? 1 : 2);
        guest_ring(&g, 0);
        for (int t = 0; t < 1000 && g.config_interrupts == before; t++)
            poll(NULL, 0, 5);
        CHECK_EQUAL(g.config_interrupts, before + 1);
        CHECK(g.dev->status & VMM_STATUS_NEEDS_RESET);
        CHECK_EQUAL(g.said, i + 1);
        guest_start(&g, ALL_FEATURES, 64); /* a reset, and it goes on */
        CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 0, 512, true), VMM_BLK_OK);
    }
    teardown(&g, fd);
}

static void test_many_requests_in_every_queue_are_all_answered(uint64_t features)
{
    struct guest g;
    const int fd = image();
    vmm_blk_options o = options();
    o.queues = 4;
    setup_with(&g, fd, o, features, 0);
    unsigned answered = 0;
    for (unsigned round = 0; round < 200; round++) {
        for (unsigned queue = 0; queue < 4; queue++) {
            for (unsigned k = 0; k < 16; k++) {
                const uint64_t header =
                    guest_header(&g, k & 1 ? VMM_BLK_OUT : VMM_BLK_IN, (round * 16 + k) % 1024);
                const struct piece pieces[] = {
                    OUT(header, 16), {GUEST_DATA + k * 4096, 4096, !(k & 1)}, IN(header + GUEST_STATUS, 1)};
                CHECK(ring_offer(&g.rings[queue], pieces, 3) >= 0);
            }
            guest_ring(&g, queue);
        }
        for (unsigned queue = 0; queue < 4; queue++)
            for (unsigned k = 0; k < 16; k++, answered++)
                guest_wait(&g, queue, NULL);
    }
    CHECK_EQUAL(answered, 200 * 64);
    teardown(&g, fd);
}

/* More than the pool holds: what does not fit waits in the ring. */
static void test_a_ring_longer_than_the_pool_is_answered_too(void)
{
    struct guest g;
    const int fd = image();
    vmm_blk_options o = options();
    vmm_disk *disk;
    o.queues = 2;
    CHECK_EQUAL(vmm_disk_open_raw(fd, SIZE, 1, 0, &disk), 0);
    guest_create(&g, disk, &o);
    guest_start(&g, ALL_FEATURES, 256);
    for (unsigned queue = 0; queue < 2; queue++)
        for (unsigned k = 0; k < 256; k++) { /* flushes take their time: all of them are under way at once */
            const uint64_t header = 0xa0000 + k * 16;
            memcpy(machine_at(g.vm, header, 16), (uint32_t[]){VMM_BLK_FLUSH, 0, 0, 0}, 16);
            const struct piece pieces[] = {OUT(header, 16), IN(0xb0000 + k, 1)};
            CHECK(ring_offer_indirect(&g.rings[queue], 0xc0000 + queue * 0x8000 + k * 32, pieces, 2) >= 0);
        }
    for (unsigned queue = 0; queue < 2; queue++)
        guest_ring(&g, queue);
    for (unsigned queue = 0; queue < 2; queue++)
        for (unsigned k = 0; k < 256; k++)
            guest_wait(&g, queue, NULL);
    teardown(&g, fd);
}

/* A reset in the middle: what was under way touches nothing afterwards, and the next driver finds a whole device. */
static void test_a_reset_while_requests_are_under_way(void)
{
    struct guest g;
    const int fd = setup(&g);
    for (unsigned round = 0; round < 100; round++) {
        for (unsigned k = 0; k < 16; k++) {
            const uint64_t header = guest_header(&g, k % 4 == 3 ? VMM_BLK_FLUSH : VMM_BLK_IN, 0);
            const struct piece pieces[] = {OUT(header, 16), IN(GUEST_DATA + k * 65536, 65536),
                                           IN(header + GUEST_STATUS, 1)};
            ring_offer(&g.rings[0], pieces, 3);
        }
        guest_ring(&g, 0);
        if (round % 3)
            poll(NULL, 0, (int)(round % 2));
        vmm_virtio_reset(g.dev);
        uint8_t *data = guest_data(&g);
        memset(data, 0x77, 16 * 65536);
        poll(NULL, 0, 1);
        for (unsigned i = 0; i < 16 * 65536; i += 512)
            CHECK_EQUAL(data[i], 0x77);
        guest_start(&g, ALL_FEATURES, 64);
    }
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 0, 512, true), VMM_BLK_OK);
    teardown(&g, fd);
}

static void test_a_queue_reset_answers_what_was_taken(void)
{
    struct guest g;
    const int fd = setup(&g);
    for (unsigned k = 0; k < 8; k++) {
        const uint64_t header = guest_header(&g, VMM_BLK_FLUSH, 0);
        const struct piece pieces[] = {OUT(header, 16), IN(header + GUEST_STATUS, 1)};
        ring_offer(&g.rings[0], pieces, 2);
    }
    guest_ring(&g, 0);
    while (!ring_waiting(&g.rings[0]))
        poll(NULL, 0, 1);
    {
        VMM_VIRTIO_LOCKED(g.dev);
        vmm_virtqueue_reset(&g.dev->queues[0]);
    }
    for (unsigned k = 0; k < 8; k++)
        guest_wait(&g, 0, NULL);
    teardown(&g, fd);
}

static void test_a_disk_that_changes_its_size_says_so(void)
{
    struct guest g;
    const int fd = setup(&g);
    uint64_t capacity;
    CHECK_EQUAL(vmm_blk_resize(g.blk, SIZE + 511, 0), -EINVAL);
    CHECK_EQUAL(vmm_blk_resize(g.blk, 0, 0), -EINVAL);
    CHECK_EQUAL(g.config_interrupts, 0);
    CHECK_EQUAL(vmm_blk_resize(g.blk, SIZE * 2, 0), 0);
    CHECK_EQUAL(g.config_interrupts, 1);
    CHECK_EQUAL(vmm_virtio_config_get(g.dev, 0, &capacity, 8), 0);
    CHECK_EQUAL(capacity, SIZE * 2 / 512);
    CHECK_EQUAL(lseek(fd, 0, SEEK_END), SIZE * 2);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, SIZE / 512, 4096, true), VMM_BLK_OK);
    CHECK_EQUAL(vmm_blk_resize(g.blk, SIZE / 2, 0), 0);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, SIZE / 1024, 512, true), VMM_BLK_IOERR);
    CHECK_EQUAL(g.said, 0);
    CHECK(ftruncate(fd, SIZE) == 0); /* somebody else did it: the monitor is told to look */
    CHECK_EQUAL(vmm_blk_resize(g.blk, SIZE, 1), 0);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, SIZE / 1024, 512, true), VMM_BLK_OK);
    teardown(&g, fd);
}

static void test_a_file_that_shrinks_costs_io_errors_and_one_message(void)
{
    struct guest g;
    const int fd = setup(&g);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 64, 512, true), VMM_BLK_OK);
    CHECK(ftruncate(fd, 16384) == 0);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 64, 512, true), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 65, 512, true), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 8, 512, true), VMM_BLK_OK);
    CHECK_EQUAL(g.said, 1);
    CHECK(strstr(g.text, "virtio-blk0") && strstr(g.text, "test.img") &&
          strstr(g.text, "the file ends before it"));
    vmm_blk_stats stats;
    CHECK_EQUAL(vmm_blk_get_stats(g.blk, 0, &stats), 0);
    CHECK_EQUAL(stats.errors, 2);
    teardown(&g, fd);
}

/* /dev/full refuses writes as a full file system does, and reads as zeros. */
static void test_a_full_host_is_an_io_error_with_the_hosts_words(uint32_t flags)
{
    struct guest g;
    const int fd = open("/dev/full", O_RDWR);
    CHECK(fd >= 0);
    setup_with(&g, fd, options(), ALL_FEATURES, flags);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 0, 4096, false), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 0, 4096, false), VMM_BLK_IOERR);
    CHECK_EQUAL(g.said, 1);
    CHECK(strstr(g.text, "No space left on device"));
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 0, 4096, true), VMM_BLK_OK);
    teardown(&g, fd);
}

static void test_sectors_of_4096_bytes_are_kept_whole(void)
{
    struct guest g;
    const int fd = image();
    vmm_blk_options o = options();
    o.sector = 4096;
    setup_with(&g, fd, o, ALL_FEATURES, 0);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 8, 4096, true), VMM_BLK_OK);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 8, 512, true), VMM_BLK_IOERR);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 1, 4096, true), VMM_BLK_IOERR);
    CHECK_EQUAL(ranges(&g, VMM_BLK_WRITE_ZEROES, (struct range[]){{8, 1, 0}}, 1), VMM_BLK_IOERR);
    teardown(&g, fd);
}

static void test_a_driver_without_flush_has_its_writes_stable(void)
{
    struct guest g;
    const int fd = image();
    uint8_t through;
    setup_with(&g, fd, options(), ALL_FEATURES & ~(1ull << F_FLUSH | 1ull << F_CONFIG_WCE), 0);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 0, 512, false), VMM_BLK_OK);
    guest_start(&g, ALL_FEATURES, 64);
    through = 0;
    {
        VMM_VIRTIO_LOCKED(g.dev);
        CHECK_EQUAL(vmm_virtio_config_read(g.dev, 32, 1), 1);
        vmm_virtio_config_write(g.dev, 32, 1, through);
        vmm_virtio_config_write(g.dev, 0, 8, 12345); /* not writable */
        CHECK_EQUAL(vmm_virtio_config_read(g.dev, 32, 1), 0);
        CHECK_EQUAL(vmm_virtio_config_read(g.dev, 0, 8), SIZE / 512);
    }
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 0, 512, false), VMM_BLK_OK);
    vmm_virtio_reset(g.dev);
    CHECK_EQUAL(vmm_virtio_config_read(g.dev, 32, 1), 1);
    teardown(&g, fd);
}

/* One second's worth at once, then at the rate; the I/O thread sleeps in between. */
static void test_a_rate_limit_holds_requests_back(void)
{
    struct guest g;
    const int fd = image();
    vmm_blk_options o = options();
    o.operations_per_second = 100;
    setup_with(&g, fd, o, ALL_FEATURES, 0);
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (unsigned i = 0; i < 120; i++)
        CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 0, 512, true), VMM_BLK_OK);
    clock_gettime(CLOCK_MONOTONIC, &to);
    const long ms = (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000;
    CHECK(ms >= 180); /* 20 beyond the first second's, 10 ms each */
    CHECK(ms >= 1000 ||
          vmm_blk_throttled(g.blk) > 0); /* a busy host may be slower than the limit by itself */
    teardown(&g, fd);
}

static void test_options_that_cannot_be_are_refused(void)
{
    vmm_vm *vm = machine_create();
    vmm_disk *disk;
    vmm_blk *blk;
    const int fd = image();
    CHECK_EQUAL(vmm_disk_open_raw(fd, SIZE, 3, 0, &disk), -EINVAL);
    CHECK_EQUAL(vmm_disk_open_raw(fd, SIZE + 512, 4096, 0, &disk), 0);
    vmm_blk_options o = options();
    CHECK_EQUAL(vmm_blk_create(vm, "b", "l", disk, &o, &blk), -EINVAL); /* O_DIRECT at 4096, sectors of 512 */
    o.sector = 4096;
    CHECK_EQUAL(vmm_blk_create(vm, "b", "l", disk, &o, &blk), -EINVAL); /* not whole sectors */
    o.sector = 1024;
    CHECK_EQUAL(vmm_blk_create(vm, "b", "l", disk, &o, &blk), -EINVAL);
    o = options();
    o.queues = 17;
    CHECK_EQUAL(vmm_blk_create(vm, "b", "l", disk, &o, &blk), -EINVAL);
    vmm_disk_destroy(disk);
    vmm_vm_destroy(vm);
    close(fd);
}

int main(void)
{
    test_what_is_written_is_read(ALL_FEATURES, 0);
    test_what_is_written_is_read(ALL_FEATURES, VMM_DISK_BLOCKING);
    test_what_is_written_is_read(ALL_FEATURES | VMM_F_RING_PACKED, 0);
    test_what_is_written_is_read(0, 0);
    test_a_request_may_be_cut_into_pieces_anywhere();
    test_what_lies_outside_the_disk_is_an_io_error();
    test_a_request_that_is_not_known_is_unsupported();
    test_a_disk_that_is_read_only_refuses_every_change();
    test_ranges_are_discarded_and_zeroed_within_their_limits();
    test_no_room_for_header_or_status_breaks_the_device_alone();
    test_many_requests_in_every_queue_are_all_answered(ALL_FEATURES);
    test_many_requests_in_every_queue_are_all_answered(ALL_FEATURES | VMM_F_RING_PACKED);
    test_a_ring_longer_than_the_pool_is_answered_too();
    test_a_reset_while_requests_are_under_way();
    test_a_queue_reset_answers_what_was_taken();
    test_a_disk_that_changes_its_size_says_so();
    test_a_file_that_shrinks_costs_io_errors_and_one_message();
    test_a_full_host_is_an_io_error_with_the_hosts_words(0);
    test_a_full_host_is_an_io_error_with_the_hosts_words(VMM_DISK_BLOCKING);
    test_sectors_of_4096_bytes_are_kept_whole();
    test_a_driver_without_flush_has_its_writes_stable();
    test_a_rate_limit_holds_requests_back();
    test_options_that_cannot_be_are_refused();
    puts("blk: ok");
    return 0;
}
