/* SPDX-License-Identifier: Apache-2.0 */
#include "disk/undo.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* As an overlay's, and for its reason: guests write such blocks. A roll-back costs what was written, not its surroundings. */
#define CLUSTER 4096ull
#define BUFFER_CLUSTERS 32u
/* So much is given back to the host when it is no longer needed; less stays for the next round to write over. */
#define ROOM_MAX (16ull << 20)

struct run {
    uint64_t first, n; /* clusters */
};

struct vmm_undo {
    struct vmm_disk *disk;
    struct vmm_undo *next; /* of the disk's */
    int fd;                /* old bytes: those of the runs, one after the other, in whole clusters */
    uint64_t n_kept;       /* clusters */
    struct run *runs;
    size_t n_runs, room;
    uint64_t *kept; /* a bit for each cluster of the disk */
    size_t kept_size;
    uint8_t *buffer; /* BUFFER_CLUSTERS; aligned for O_DIRECT */
};

static bool is_kept(const struct vmm_undo *undo, uint64_t cluster)
{
    return undo->kept[cluster / 64] >> (cluster % 64) & 1;
}

/* Bytes of a run; the disk's last cluster may be a part of one. */
static uint64_t size_of(const struct vmm_disk *disk, struct run run)
{
    const uint64_t left = disk->size - run.first * CLUSTER;
    return run.n * CLUSTER < left ? run.n * CLUSTER : left;
}

/* ---- keeping ---- */

/* The next clusters before `end` that are not kept, at most a buffer of them; none: n is 0. */
static struct run next_missing(const struct vmm_undo *undo, uint64_t from, uint64_t end)
{
    while (from < end && is_kept(undo, from))
        from++;
    struct run run = {.first = from};
    while (from + run.n < end && run.n < BUFFER_CLUSTERS && !is_kept(undo, from + run.n))
        run.n++;
    return run;
}

static int keep(struct vmm_undo *undo, struct run run)
{
    if (undo->n_runs == undo->room) {
        const size_t room = undo->room ? undo->room * 2 : 16;
        struct run *runs = realloc(undo->runs, room * sizeof(*runs));
        if (!runs)
            return -ENOMEM;
        undo->runs = runs;
        undo->room = room;
    }
    const uint64_t size = size_of(undo->disk, run);
    int rc = vmm_disk_read_now(undo->disk, run.first * CLUSTER, size, undo->buffer);
    if (!rc)
        rc = vmm_disk_write_whole(undo->fd, undo->buffer, size, undo->n_kept * CLUSTER);
    if (rc)
        return rc;
    struct run *last = undo->n_runs ? &undo->runs[undo->n_runs - 1] : NULL;
    if (last && last->first + last->n == run.first)
        last->n += run.n;
    else
        undo->runs[undo->n_runs++] = run;
    undo->n_kept += run.n;
    for (uint64_t c = run.first; c < run.first + run.n; c++)
        undo->kept[c / 64] |= 1ull << (c % 64);
    return 0;
}

int vmm_disk_undo_keep(struct vmm_disk *disk, uint64_t at, uint64_t size)
{
    const uint64_t end = (at + size - 1) / CLUSTER + 1;
    for (struct vmm_undo *undo = disk->undo; undo; undo = undo->next) {
        struct run run = {.first = at / CLUSTER};
        while ((run = next_missing(undo, run.first + run.n, end)).n) {
            const int rc = keep(undo, run);
            if (rc)
                return rc;
        }
    }
    return 0;
}

/* ---- going back ---- */

static void ignore(struct vmm_disk_io *io)
{
    (void)io;
}

static int write_now(struct vmm_disk *disk, uint64_t at, uint64_t size, uint8_t *from)
{
    struct iovec iov = {.iov_base = from, .iov_len = size};
    struct vmm_disk_io io = {
        .op = VMM_DISK_WRITE, .at = at, .size = size, .iov = &iov, .n_iov = 1, .done = ignore};
    if (!vmm_disk_start(disk, &io))
        vmm_disk_drain(disk, false);
    return io.error;
}

static void empty(struct vmm_undo *undo)
{
    for (size_t i = 0; i < undo->n_runs; i++)
        for (uint64_t c = undo->runs[i].first; c < undo->runs[i].first + undo->runs[i].n; c++)
            undo->kept[c / 64] &= ~(1ull << (c % 64));
    if (undo->n_kept * CLUSTER >= ROOM_MAX && ftruncate(undo->fd, 0) < 0)
        errno = 0; /* then its room is used again */
    undo->n_runs = 0;
    undo->n_kept = 0;
}

int64_t vmm_disk_undo_back(struct vmm_undo *undo)
{
    struct vmm_disk *disk = undo->disk;
    uint64_t slot = 0; /* in the log's file */
    vmm_disk_drain(disk, false);
    for (size_t i = 0; i < undo->n_runs; i++) {
        struct run left = undo->runs[i];
        while (left.n) {
            const struct run part = {left.first, left.n < BUFFER_CLUSTERS ? left.n : BUFFER_CLUSTERS};
            const uint64_t size = size_of(disk, part);
            const int64_t got = vmm_disk_read_whole(undo->fd, undo->buffer, size, slot * CLUSTER);
            int rc = got < 0 ? (int)got : (uint64_t)got < size ? -EIO : 0;
            if (!rc)
                rc = write_now(disk, part.first * CLUSTER, size, undo->buffer);
            if (rc)
                return vmm_error_host(rc, "writing back what the disk held at byte %llu",
                                      (unsigned long long)(part.first * CLUSTER));
            slot += part.n;
            left = (struct run){left.first + part.n, left.n - part.n};
        }
    }
    empty(undo);
    return (int64_t)slot;
}

/* ---- life ---- */

static int set_up(struct vmm_undo *undo, int fd)
{
    undo->fd = fd < 0 ? memfd_create("vmm-undo", MFD_CLOEXEC) : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (undo->fd < 0)
        return vmm_error_errno("a file for what a disk held");
    const uint64_t clusters = undo->disk->size / CLUSTER + 1;
    undo->kept_size = clusters / 8 + sizeof(*undo->kept);
    undo->kept = mmap(NULL, undo->kept_size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (undo->kept == MAP_FAILED)
        undo->kept = NULL;
    if (!undo->kept || posix_memalign((void **)&undo->buffer, 4096, BUFFER_CLUSTERS * CLUSTER))
        return vmm_error_set(-ENOMEM, "a disk's undo log");
    return 0;
}

int vmm_disk_undo_open(struct vmm_disk *disk, int fd, struct vmm_undo **out)
{
    struct vmm_undo *undo = calloc(1, sizeof(*undo));
    if (!undo)
        return vmm_error_set(-ENOMEM, "a disk's undo log");
    undo->disk = disk;
    vmm_disk_drain(disk, false);
    undo->next = disk->undo;
    disk->undo = undo;
    const int rc = set_up(undo, fd);
    if (rc) {
        vmm_disk_undo_close(undo);
        return rc;
    }
    *out = undo;
    return 0;
}

void vmm_disk_undo_close(struct vmm_undo *undo)
{
    struct vmm_undo **link = &undo->disk->undo;
    while (*link != undo)
        link = &(*link)->next;
    *link = undo->next;
    if (undo->fd >= 0)
        close(undo->fd);
    if (undo->kept)
        munmap(undo->kept, undo->kept_size);
    free(undo->buffer);
    free(undo->runs);
    free(undo);
}
