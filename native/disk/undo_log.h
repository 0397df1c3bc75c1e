/* SPDX-License-Identifier: Apache-2.0 */
/* The log of undo.h as disk.c keeps it: which clusters it has, and where. */
#ifndef VMM_DISK_UNDO_LOG_H
#define VMM_DISK_UNDO_LOG_H

#include "disk/disk.h"

/* As an overlay's, and for its reason: guests write such blocks. A roll-back costs what was written, not its surroundings. */
#define VMM_UNDO_CLUSTER 4096ull
#define VMM_UNDO_BUFFER 32u

struct vmm_undo_run {
    uint64_t first, n; /* clusters */
};

struct vmm_undo {
    struct vmm_disk *disk;
    struct vmm_undo *next; /* of the disk's */
    int fd;                /* old bytes: those of the runs, one after the other, in whole clusters */
    uint64_t n_kept;       /* clusters */
    struct vmm_undo_run *runs;
    size_t n_runs, room;
    uint64_t *kept; /* a bit for each cluster of the disk */
    size_t kept_size;
    uint8_t *buffer; /* VMM_UNDO_BUFFER; aligned for O_DIRECT */
};

/* Bytes of a run; the disk's last cluster may be a part of one. */
static inline uint64_t vmm_undo_size(const struct vmm_disk *disk, struct vmm_undo_run run)
{
    const uint64_t left = disk->size - run.first * VMM_UNDO_CLUSTER;
    return run.n * VMM_UNDO_CLUSTER < left ? run.n * VMM_UNDO_CLUSTER : left;
}

/* Before [at, at + size) is written, with the disk's logs open: keep what they have not. 0 or -errno. */
int vmm_disk_undo_keep(struct vmm_disk *disk, uint64_t at, uint64_t size);
void vmm_disk_undo_close(struct vmm_undo *undo);

#endif
