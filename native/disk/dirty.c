/* SPDX-License-Identifier: Apache-2.0 */
#include "disk/dirty.h"
#include "base/bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#define BITS 64

struct vmm_disk_dirty {
    struct vmm_disk *disk;
    struct vmm_disk_dirty *next; /* of the disk's */
    uint64_t n;                  /* bits that are set */
    uint64_t *bits;              /* one for each cluster; touched where clusters change */
    size_t bits_size;
};

static uint64_t clusters_of(uint64_t size)
{
    return size / VMM_DISK_CLUSTER + (size % VMM_DISK_CLUSTER != 0);
}

/* The bits of [first, end) in the word that `first` lies in. */
static uint64_t mask_of(uint64_t first, uint64_t end)
{
    const uint64_t from = UINT64_MAX << first % BITS, room = BITS - first % BITS;
    return end - first >= room ? from : from & ~(UINT64_MAX << (first % BITS + (end - first)));
}

static void set(struct vmm_disk_dirty *log, uint64_t first, uint64_t end)
{
    for (uint64_t c = first; c < end; c += BITS - c % BITS) {
        const uint64_t more = mask_of(c, end) & ~log->bits[c / BITS];
        log->bits[c / BITS] |= more;
        log->n += (uint64_t)__builtin_popcountll(more);
    }
}

static void clear(struct vmm_disk_dirty *log, uint64_t first, uint64_t end)
{
    for (uint64_t c = first; c < end; c += BITS - c % BITS)
        log->bits[c / BITS] &= ~mask_of(c, end);
    log->n -= end - first; /* all of them were set */
}

void vmm_disk_dirty_mark(struct vmm_disk *disk, uint64_t at, uint64_t size)
{
    for (struct vmm_disk_dirty *log = disk->dirty; log && size; log = log->next)
        set(log, at / VMM_DISK_CLUSTER, clusters_of(at + size));
}

uint64_t vmm_disk_dirty_count(const struct vmm_disk_dirty *log)
{
    return log->n;
}

uint64_t vmm_disk_dirty_take(struct vmm_disk_dirty *log, uint64_t *at, uint64_t max)
{
    const uint64_t size = log->disk->size, end = clusters_of(size);
    const uint64_t from = clusters_of(*at),
                   first = log->n ? vmm_bitmap_next(log->bits, from, end, true) : end;
    if (first == end || max < VMM_DISK_CLUSTER)
        return 0;
    const uint64_t n = max / VMM_DISK_CLUSTER, limit = n < end - first ? first + n : end;
    const uint64_t last = vmm_bitmap_next(log->bits, first, limit, false);
    clear(log, first, last);
    *at = first * VMM_DISK_CLUSTER;
    return (last == end ? size : last * VMM_DISK_CLUSTER) - *at;
}

int vmm_disk_dirty_open(struct vmm_disk *disk, struct vmm_disk_dirty **out)
{
    struct vmm_disk_dirty *log = calloc(1, sizeof(*log));
    if (!log)
        return vmm_error_set(-ENOMEM, "a log of a disk's writes");
    log->bits_size = clusters_of(disk->size) / 8 + sizeof(*log->bits);
    log->bits = mmap(NULL, log->bits_size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (log->bits == MAP_FAILED) {
        free(log);
        return vmm_error_set(-ENOMEM, "a log of a disk's writes");
    }
    log->disk = disk;
    log->next = disk->dirty;
    disk->dirty = log;
    *out = log;
    return 0;
}

void vmm_disk_dirty_close(struct vmm_disk_dirty *log)
{
    struct vmm_disk_dirty **link = &log->disk->dirty;
    while (*link != log)
        link = &(*link)->next;
    *link = log->next;
    munmap(log->bits, log->bits_size);
    free(log);
}
