/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A monitor that is killed: a process writes and flushes through the device, SIGKILL takes it at a random moment, and
 * every write whose flush was answered is there. (What a power cut may do to the host's own cache: test_disk.c.)
 */
#include "blk_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define TRIES 50 /* of each kind of disk */
#define BLOCKS 256u
#define SECTORS 3u /* of a block: clusters of the overlay are shared by two, and partly written */
#define SIZE (BLOCKS * SECTORS * 512)
#define BITMAP_AT 4096
#define DATA_AT 65536
#define DEPTH 8

/* What the two processes share: the newest value of each block that was offered, and that a flush was answered for. */
struct progress {
    _Atomic uint32_t offered[BLOCKS], flushed[BLOCKS];
    _Atomic uint32_t flushes;
};

struct sector {
    uint32_t block, value, fill[126];
};
_Static_assert(sizeof(struct sector) == 512, "a sector");

static uint64_t seed;
static uint32_t draw(uint32_t below)
{
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(seed >> 33) % below;
}

static void fill(struct sector *s, uint32_t block, uint32_t value)
{
    s->block = block;
    s->value = value;
    for (unsigned i = 0; i < 126; i++)
        s->fill[i] = value * 2654435761u ^ block;
}

static vmm_disk *open_disk(bool overlay, int base, int fd, uint32_t flags)
{
    vmm_disk *disk;
    const vmm_disk_layer layers[] = {
        {.fd = fd, .size = SIZE, .bitmap_at = BITMAP_AT, .bitmap_size = 4096, .data_at = DATA_AT},
        {.fd = base, .size = SIZE}};
    CHECK_EQUAL(overlay ? vmm_disk_open_overlay(layers, 2, 1, flags, &disk)
                        : vmm_disk_open_raw(fd, SIZE, 1, flags, &disk),
                0);
    return disk;
}

/* Batches of writes to blocks that differ, some answered together with a flush. Never ends by itself. */
static void __attribute__((noreturn)) write_until_killed(bool overlay, int base, int fd, struct progress *p)
{
    static struct guest g;
    const vmm_blk_options options = {.sector = 512, .queues = 1};
    guest_create(&g, open_disk(overlay, base, fd, 0), &options);
    guest_start(&g, ~(VMM_F_RING_RESET | (overlay ? 0 : VMM_F_RING_PACKED)), 64);
    for (uint32_t value = 1;; value++) {
        const uint32_t first = draw(BLOCKS);
        for (uint32_t i = 0; i < DEPTH; i++) {
            const uint32_t block = (first + i * 7) % BLOCKS;
            struct sector *data = (struct sector *)guest_data(&g) + i * SECTORS;
            for (unsigned s = 0; s < SECTORS; s++)
                fill(&data[s], block, value);
            p->offered[block] = value;
            const uint64_t header = guest_header(&g, VMM_BLK_OUT, block * SECTORS);
            const struct piece pieces[] = {OUT(header, 16),
                                           OUT(GUEST_DATA + i * SECTORS * 512, SECTORS * 512),
                                           IN(header + GUEST_STATUS, 1)};
            CHECK(ring_offer(&g.rings[0], pieces, 3) >= 0);
        }
        guest_ring(&g, 0);
        for (uint32_t i = 0; i < DEPTH; i++)
            guest_wait(&g, 0, NULL);
        if (draw(3))
            continue;
        uint32_t done[BLOCKS];
        for (unsigned b = 0; b < BLOCKS; b++)
            done[b] = p->offered[b];
        CHECK_EQUAL(guest_request(&g, VMM_BLK_FLUSH, 0, 0, false), VMM_BLK_OK);
        for (unsigned b = 0; b < BLOCKS; b++)
            p->flushed[b] = done[b];
        p->flushes++;
    }
}

static void check_disk(bool overlay, int base, int fd, const struct progress *p)
{
    static uint8_t bytes[SIZE];
    struct iovec iov = {bytes, SIZE};
    struct vmm_disk_io io = {.op = VMM_DISK_READ, .size = SIZE, .iov = &iov, .n_iov = 1};
    vmm_disk *disk = open_disk(overlay, base, fd, VMM_DISK_BLOCKING);
    CHECK(vmm_disk_start(disk, &io));
    CHECK_EQUAL(io.error, 0);
    for (uint32_t n = 0; n < BLOCKS * SECTORS; n++) {
        struct sector is, want;
        const uint32_t block = n / SECTORS;
        memcpy(&is, bytes + n * 512, 512);
        if (is.value == 0 && !overlay)
            is.block = block; /* a raw disk begins as zeros */
        CHECK_EQUAL(is.block, block);
        CHECK(is.value >= p->flushed[block] && is.value <= p->offered[block]);
        fill(&want, block, is.value);
        CHECK((!overlay && is.value == 0) || !memcmp(is.fill, want.fill, sizeof(is.fill)));
    }
    vmm_disk_destroy(disk);
}

/* Mostly in memory, where a flush is quick and kills fall everywhere; else where it takes its time. */
static int file_of(unsigned number, uint64_t size)
{
    if (number % 5) {
        const int fd = memfd_create("test-blk-kill", 0);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
        return fd;
    }
    char path[] = "/tmp/test-blk-kill-XXXXXX";
    const int fd = mkstemp(path);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    unlink(path);
    return fd;
}

static uint32_t kill_once(bool overlay, unsigned number)
{
    seed = number;
    const int base = file_of(number, SIZE), fd = file_of(number, overlay ? DATA_AT + SIZE : SIZE);
    for (uint32_t n = 0; overlay && n < BLOCKS * SECTORS; n++) {
        struct sector s;
        fill(&s, n / SECTORS, 0);
        CHECK(pwrite(base, &s, 512, n * 512) == 512);
    }
    struct progress *p = mmap(NULL, sizeof(*p), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    const pid_t child = fork();
    if (child == 0)
        write_until_killed(overlay, base, fd, p);
    CHECK(child > 0);
    for (unsigned waited = 0; p->flushes == 0 && waited < PATIENCE_MS; waited++)
        poll(NULL, 0, 1);
    const struct timespec moment = {.tv_nsec = draw(20000000)};
    nanosleep(&moment, NULL);
    kill(child, SIGKILL);
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
    check_disk(overlay, base, fd, p);
    const uint32_t flushes = p->flushes;
    munmap(p, sizeof(*p));
    close(base);
    close(fd);
    return flushes;
}

int main(void)
{
    uint32_t flushes = 0;
    for (unsigned i = 0; i < TRIES; i++)
        for (int overlay = 0; overlay < 2; overlay++)
            flushes += kill_once(overlay, i);
    CHECK(flushes >= 2 * TRIES);
    printf("blk_kill: ok, %u flushes before %u kills\n", flushes, 2 * TRIES);
    return 0;
}
