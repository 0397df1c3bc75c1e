/* SPDX-License-Identifier: Apache-2.0 */
/* Keeping old bytes before the disk writes over them; it knows files and clusters, and starts no operation. */
#include "disk/undo_log.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static bool is_kept(const struct vmm_undo *undo, uint64_t cluster)
{
    return undo->kept[cluster / 64] >> (cluster % 64) & 1;
}

/* The next clusters before `end` that are not kept, at most a buffer of them; none: n is 0. */
static struct vmm_undo_run next_missing(const struct vmm_undo *undo, uint64_t from, uint64_t end)
{
    while (from < end && is_kept(undo, from))
        from++;
    struct vmm_undo_run run = {.first = from};
    while (from + run.n < end && run.n < VMM_UNDO_BUFFER && !is_kept(undo, from + run.n))
        run.n++;
    return run;
}

static int keep(struct vmm_undo *undo, struct vmm_undo_run run)
{
    if (undo->n_runs == undo->room) {
        const size_t room = undo->room ? undo->room * 2 : 16;
        struct vmm_undo_run *runs = realloc(undo->runs, room * sizeof(*runs));
        if (!runs)
            return -ENOMEM;
        undo->runs = runs;
        undo->room = room;
    }
    const uint64_t size = vmm_undo_size(undo->disk, run);
    int rc = vmm_disk_read_now(undo->disk, run.first * VMM_UNDO_CLUSTER, size, undo->buffer);
    if (!rc)
        rc = vmm_disk_write_whole(undo->fd, undo->buffer, size, undo->n_kept * VMM_UNDO_CLUSTER);
    if (rc)
        return rc;
    struct vmm_undo_run *last = undo->n_runs ? &undo->runs[undo->n_runs - 1] : NULL;
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
    const uint64_t end = (at + size - 1) / VMM_UNDO_CLUSTER + 1;
    for (struct vmm_undo *undo = disk->undo; undo; undo = undo->next) {
        struct vmm_undo_run run = {.first = at / VMM_UNDO_CLUSTER};
        while ((run = next_missing(undo, run.first + run.n, end)).n) {
            const int rc = keep(undo, run);
            if (rc)
                return rc;
        }
    }
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
