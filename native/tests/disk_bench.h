/* SPDX-License-Identifier: Apache-2.0 */
/* A disk, raw or an overlay, through each engine; its model in memory; random operations on both. */
#ifndef VMM_TESTS_DISK_BENCH_H
#define VMM_TESTS_DISK_BENCH_H

#include "check.h"
#include "disk/disk.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (300u * 4096 + 512) /* the last cluster is not whole */
#define BASE_SIZE (200u * 4096 + 1536)
#define BITMAP_AT 4096u
#define BITMAP_SIZE 4096u
#define DATA_AT (64u << 10)
#define OVERLAY_SIZE (DATA_AT + (SIZE + 4095) / 4096 * 4096)
#define SECTOR 512u
#define GENERATIONS 4

/* ---- a disk and its model ---- */

enum how { BLOCKING, URING, DIRECT, HOWS };
static const char *const how_names[] = {"blocking", "io_uring", "O_DIRECT"};

struct bench {
    bool overlay;
    enum how how;
    int base, fd;
    int middle[GENERATIONS]; /* overlays between the two, the newest last */
    unsigned n_middle;
    vmm_disk *disk;
    uint8_t model[SIZE];
    uint8_t base_bytes[BASE_SIZE];
};

static uint64_t seed;
static inline uint32_t draw(uint32_t below)
{
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(seed >> 33) % below;
}

static inline int temporary(uint64_t size, enum how how)
{
    if (how == BLOCKING) {
        int fd = memfd_create("test-disk", 0);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
        return fd;
    }
    char path[] = "/tmp/test-disk-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    if (how == DIRECT) {
        close(fd);
        fd = open(path, O_RDWR | O_DIRECT);
    }
    unlink(path);
    return fd;
}

static inline void open_disk(struct bench *b)
{
    const uint32_t flags = b->how == BLOCKING ? VMM_DISK_BLOCKING : 0, alignment = b->how == DIRECT ? 512 : 1;
    vmm_disk_layer layers[2 + GENERATIONS];
    for (unsigned i = 0; i <= b->n_middle; i++)
        layers[i] = (vmm_disk_layer){.fd = i ? b->middle[b->n_middle - i] : b->fd,
                                     .size = SIZE,
                                     .bitmap_at = BITMAP_AT,
                                     .bitmap_size = BITMAP_SIZE,
                                     .data_at = DATA_AT};
    layers[b->n_middle + 1] = (vmm_disk_layer){.fd = b->base, .size = BASE_SIZE};
    CHECK_EQUAL(b->overlay ? vmm_disk_open_overlay(layers, b->n_middle + 2, alignment, flags, &b->disk)
                           : vmm_disk_open_raw(b->fd, SIZE, alignment, flags, &b->disk),
                0);
}

static inline bool bench_open(struct bench *b, bool overlay, enum how how)
{
    memset(b, 0, sizeof(*b));
    b->overlay = overlay;
    b->how = how;
    b->base = temporary(BASE_SIZE, BLOCKING);
    b->fd = temporary(overlay ? OVERLAY_SIZE : SIZE, how);
    if (b->fd < 0) /* a file system without O_DIRECT */
        return false;
    if (overlay) {
        for (unsigned i = 0; i < BASE_SIZE; i++)
            b->base_bytes[i] = b->model[i] = (uint8_t)draw(256);
        CHECK(pwrite(b->base, b->base_bytes, BASE_SIZE, 0) == BASE_SIZE);
    }
    open_disk(b);
    return true;
}

static inline void bench_close(struct bench *b)
{
    vmm_disk_destroy(b->disk);
    uint8_t base[BASE_SIZE];
    CHECK(!b->overlay ||
          (pread(b->base, base, BASE_SIZE, 0) == BASE_SIZE && !memcmp(base, b->base_bytes, BASE_SIZE)));
    for (unsigned i = 0; i < b->n_middle; i++)
        close(b->middle[i]);
    close(b->base);
    close(b->fd);
}

/* ---- operations ---- */

#define PIECES 5
struct job {
    struct vmm_disk_io io;
    struct iovec iov[PIECES];
    uint8_t *buffer;
    uint64_t at, size;
    bool over;
};

static inline void job_done(struct vmm_disk_io *io)
{
    ((struct job *)io)->over = true;
}

/* Buffers that do not lie as O_DIRECT would have them, in several pieces. */
static inline void job_prepare(struct job *j, enum vmm_disk_op op, uint64_t at, uint64_t size)
{
    const unsigned skew = draw(2) ? 0 : draw(64);
    *j = (struct job){
        .at = at, .size = size, .buffer = aligned_alloc(4096, (size + 4096 + 64) / 4096 * 4096 + 4096)};
    j->io = (struct vmm_disk_io){.op = op, .at = at, .size = size, .iov = j->iov, .done = job_done};
    uint8_t *next = j->buffer + skew;
    for (uint64_t left = size; left; j->io.n_iov++) {
        uint64_t part = j->io.n_iov == PIECES - 1 ? left : draw(3) ? left : 1 + draw((uint32_t)left);
        j->iov[j->io.n_iov] = (struct iovec){next, part};
        next += part;
        left -= part;
    }
    for (uint64_t i = 0; i < size; i++)
        j->buffer[skew + i] = (uint8_t)draw(256);
    j->buffer += skew;
}

static inline void job_free(struct job *j)
{
    free((void *)((uintptr_t)j->buffer & ~4095ull));
}

static inline void finish(vmm_disk *disk, const struct job *j)
{
    for (vmm_disk_turn(disk); !j->over; vmm_disk_turn(disk))
        vmm_host_io_wait(&disk->host_io);
}

static inline int run(vmm_disk *disk, struct job *j)
{
    j->over = vmm_disk_start(disk, &j->io);
    finish(disk, j);
    return j->io.error;
}

static inline int simple(vmm_disk *disk, enum vmm_disk_op op, uint64_t at, void *bytes, uint64_t size)
{
    struct job j = {.iov = {{bytes, size}}};
    j.io = (struct vmm_disk_io){.op = op, .at = at, .size = size, .iov = j.iov, .n_iov = 1, .done = job_done};
    return run(disk, &j);
}

static inline void check_all(struct bench *b)
{
    uint8_t bytes[SIZE];
    CHECK_EQUAL(simple(b->disk, VMM_DISK_READ, 0, bytes, SIZE), 0);
    for (unsigned i = 0; i < SIZE; i++)
        if (bytes[i] != b->model[i]) {
            fprintf(stderr, "%s %s: byte %#x is %#x, not %#x\n", b->overlay ? "overlay" : "raw",
                    how_names[b->how], i, bytes[i], b->model[i]);
            exit(1);
        }
}

/* Sectors of the disk that no other job of the batch touches: neighbours in one cluster are the interesting ones. */
static inline bool place(const struct job *jobs, unsigned n, uint64_t *at, uint64_t *size)
{
    *at = (uint64_t)draw(SIZE / SECTOR) * SECTOR;
    *size = (uint64_t)(1 + draw(draw(4) ? 16 : 300)) * SECTOR;
    if (*size > SIZE - *at)
        *size = SIZE - *at;
    for (unsigned i = 0; i < n; i++)
        if (*at < jobs[i].at + jobs[i].size && jobs[i].at < *at + *size)
            return false;
    return true;
}

static inline void batch(struct bench *b)
{
    struct job jobs[8];
    unsigned n = 0;
    for (unsigned tries = 1 + draw(8); tries; tries--) {
        uint64_t at, size;
        if (!place(jobs, n, &at, &size))
            continue;
        static const enum vmm_disk_op ops[] = {VMM_DISK_READ, VMM_DISK_WRITE, VMM_DISK_WRITE, VMM_DISK_ZERO,
                                               VMM_DISK_DISCARD};
        struct job *j = &jobs[n++];
        job_prepare(j, ops[draw(5)], at, size);
        j->io.unmap = draw(2);
        j->io.through = draw(64) == 0;
        if (j->io.op == VMM_DISK_WRITE)
            memcpy(b->model + at, j->buffer, size);
        if (j->io.op == VMM_DISK_ZERO)
            memset(b->model + at, 0, size);
    }
    for (unsigned i = 0; i < n; i++)
        jobs[i].over = vmm_disk_start(b->disk, &jobs[i].io);
    for (unsigned i = 0; i < n; i++) {
        struct job *j = &jobs[i];
        finish(b->disk, j);
        CHECK_EQUAL(j->io.error, 0);
        CHECK_EQUAL(j->io.finished, j->size);
        if (j->io.op == VMM_DISK_READ)
            CHECK(!memcmp(j->buffer, b->model + j->at, j->size));
        if (j->io.op == VMM_DISK_DISCARD) { /* undefined by contract: whatever it is now, it stays */
            CHECK_EQUAL(simple(b->disk, VMM_DISK_READ, j->at, b->model + j->at, j->size), 0);
        }
        job_free(j);
    }
    CHECK_EQUAL(b->disk->under_way, 0);
}

#endif
