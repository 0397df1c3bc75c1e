/* SPDX-License-Identifier: Apache-2.0 */
/* Opening an undo log, and going back by it. */
#include "disk/undo.h"
#include "disk/undo_log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* So much is given back to the host when it is no longer needed; less stays for the next round to write over. */
#define ROOM_MAX (16ull << 20)

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
    if (undo->n_kept * VMM_UNDO_CLUSTER >= ROOM_MAX && ftruncate(undo->fd, 0) < 0)
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
        struct vmm_undo_run left = undo->runs[i];
        while (left.n) {
            const struct vmm_undo_run part = {left.first,
                                              left.n < VMM_UNDO_BUFFER ? left.n : VMM_UNDO_BUFFER};
            const uint64_t size = vmm_undo_size(disk, part);
            const int64_t got = vmm_disk_read_whole(undo->fd, undo->buffer, size, slot * VMM_UNDO_CLUSTER);
            int rc = got < 0 ? (int)got : (uint64_t)got < size ? -EIO : 0;
            if (!rc)
                rc = write_now(disk, part.first * VMM_UNDO_CLUSTER, size, undo->buffer);
            if (rc)
                return vmm_error_host(rc, "writing back what the disk held at byte %llu",
                                      (unsigned long long)(part.first * VMM_UNDO_CLUSTER));
            slot += part.n;
            left = (struct vmm_undo_run){left.first + part.n, left.n - part.n};
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
    const uint64_t clusters = undo->disk->size / VMM_UNDO_CLUSTER + 1;
    undo->kept_size = clusters / 8 + sizeof(*undo->kept);
    undo->kept = mmap(NULL, undo->kept_size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (undo->kept == MAP_FAILED)
        undo->kept = NULL;
    if (!undo->kept || posix_memalign((void **)&undo->buffer, 4096, VMM_UNDO_BUFFER * VMM_UNDO_CLUSTER))
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
