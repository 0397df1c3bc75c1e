/* SPDX-License-Identifier: Apache-2.0 */
/* Operations step by step: a step is one run of the disk that lies together, and one call of host_io.c. */
#include "disk/disk.h"
#include "disk/dirty.h"
#include "disk/undo_log.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BOUNCE_SIZE (128u << 10)
#define ZEROS_SIZE (64u << 10)

#define WAITING (VMM_HOST_IO_PENDING + 1) /* a step that did not begin: another operation is in its way */

/*
 * A step keeps so much for an undo log at most, read and copied on the spot. More than host_io.c writes on the spot,
 * so that others have their turn between two steps of a long write.
 */
#define KEEP_SIZE (2ull << 20)

static const _Alignas(4096) uint8_t zeros[ZEROS_SIZE];

/* ---- lists ---- */

static void list_init(struct vmm_disk_list *list)
{
    *list = (struct vmm_disk_list){.last = &list->first};
}

static void list_append(struct vmm_disk_list *list, struct vmm_disk_io *io)
{
    io->next = NULL;
    *list->last = io;
    list->last = &io->next;
}

static struct vmm_disk_io *list_take_all(struct vmm_disk_list *list)
{
    struct vmm_disk_io *first = list->first;
    list_init(list);
    return first;
}

/* ---- the caller's buffers ---- */

/* Shorten iov to `size` bytes, until restore(). */
static void cut(struct vmm_disk_io *io, uint64_t size)
{
    io->piece = size;
    for (io->cut = 1; size > io->iov[io->cut - 1].iov_len; io->cut++)
        size -= io->iov[io->cut - 1].iov_len;
    io->cut_size = io->iov[io->cut - 1].iov_len;
    io->iov[io->cut - 1].iov_len = size;
}

static void restore(struct vmm_disk_io *io)
{
    if (io->cut)
        io->iov[io->cut - 1].iov_len = io->cut_size;
    io->cut = 0;
}

static void consume(struct vmm_disk_io *io, uint64_t n)
{
    for (; n && n >= io->iov->iov_len; io->iov++, io->n_iov--)
        n -= io->iov->iov_len;
    if (n) {
        io->iov->iov_base = (uint8_t *)io->iov->iov_base + n;
        io->iov->iov_len -= n;
    }
}

/* Copy n bytes between the cut and one run of memory, from the beginning of both. */
static void copy(const struct vmm_disk_io *io, bool to_iov, uint8_t *run, uint64_t n)
{
    for (unsigned i = 0; i < io->cut && n; i++) {
        const size_t part = io->iov[i].iov_len < n ? io->iov[i].iov_len : n;
        memcpy(to_iov ? io->iov[i].iov_base : run, to_iov ? run : io->iov[i].iov_base, part);
        run += part;
        n -= part;
    }
}

static void fill_with_zeros(const struct vmm_disk_io *io)
{
    for (unsigned i = 0; i < io->cut; i++)
        memset(io->iov[i].iov_base, 0, io->iov[i].iov_len);
}

static bool aligned(const struct vmm_disk_io *io, uint32_t alignment)
{
    uintptr_t all = 0;
    for (unsigned i = 0; i < io->cut; i++)
        all |= (uintptr_t)io->iov[i].iov_base | io->iov[i].iov_len;
    return !(all & (alignment - 1));
}

/* ---- one step ---- */

/* The first of the step's bytes, as many as there is room for, go by way of a buffer. */
static void stand_in(struct vmm_disk_io *io, uint8_t *buffer, uint64_t room)
{
    if (io->piece > room) {
        restore(io);
        cut(io, room);
    }
    io->bounce_iov = (struct iovec){.iov_base = buffer, .iov_len = io->piece};
    if (io->op == VMM_DISK_WRITE)
        copy(io, false, buffer, io->piece);
}

static int64_t transfer(struct vmm_disk *disk, struct vmm_disk_io *io, struct vmm_extent extent)
{
    const bool write = io->op == VMM_DISK_WRITE;
    const bool direct =
        disk->alignment > 1 && extent.fd == disk->fd; /* a base is read through the page cache */
    cut(io, extent.size);
    if (extent.fd < 0) {
        fill_with_zeros(io);
        return (int64_t)extent.size;
    }
    if (direct && !aligned(io, disk->alignment)) {
        if (!io->bounce && posix_memalign((void **)&io->bounce, 4096, BOUNCE_SIZE))
            return -ENOMEM;
        stand_in(io, io->bounce, BOUNCE_SIZE);
    } else if (direct) {
        io->buffer = vmm_bounce_take(&disk->bounce, extent.size);
        if (io->buffer)
            stand_in(io, io->buffer, VMM_BOUNCE_SIZE);
    }
    const bool bounced = io->bounce_iov.iov_base;
    return vmm_host_io_transfer(&disk->host_io, &io->op_under_way, write, direct, extent.fd,
                                bounced ? &io->bounce_iov : io->iov, bounced ? 1 : io->cut, io->piece,
                                extent.at);
}

/* Which way of making zeros is left to try; 0: writing them. */
static int zero_mode(const struct vmm_disk *disk, const struct vmm_disk_io *io)
{
    if (io->unmap && !disk->no_punch)
        return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    return disk->no_zero ? 0 : FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
}

static int64_t zero(struct vmm_disk *disk, struct vmm_disk_io *io, uint64_t at, uint64_t size)
{
    const int mode = zero_mode(disk, io);
    io->piece = mode || size < ZEROS_SIZE ? size : ZEROS_SIZE;
    io->allocate_mode = mode;
    if (mode)
        return vmm_host_io_allocate(&disk->host_io, &io->op_under_way, disk->fd, mode, at, size);
    io->bounce_iov = (struct iovec){.iov_base = (void *)zeros, .iov_len = io->piece};
    return vmm_host_io_transfer(&disk->host_io, &io->op_under_way, true, disk->alignment > 1, disk->fd,
                                &io->bounce_iov, 1, io->piece, at);
}

static int64_t discard(struct vmm_disk *disk, struct vmm_disk_io *io, struct vmm_extent extent)
{
    io->piece = extent.size;
    if (extent.fd != disk->fd || disk->no_punch || disk->undo)
        return (int64_t)extent.size; /* advice that nobody can take */
    io->allocate_mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    return vmm_host_io_allocate(&disk->host_io, &io->op_under_way, disk->fd, io->allocate_mode, extent.at,
                                extent.size);
}

static int64_t begin_step(struct vmm_disk *disk, struct vmm_disk_io *io)
{
    const uint64_t at = io->at + io->finished;
    uint64_t size = io->size - io->finished;
    io->allocate_mode = 0;
    if (io->op == VMM_DISK_READ)
        return transfer(disk, io, disk->kind->map(disk, at, size));
    if (io->op == VMM_DISK_DISCARD)
        return discard(disk, io, disk->kind->map(disk, at, size));
    if (disk->undo) {
        if (size > KEEP_SIZE - at % KEEP_SIZE)
            size = KEEP_SIZE - at % KEEP_SIZE;
        const int rc = vmm_disk_undo_keep(disk, at, size);
        io->unkept = rc < 0;
        if (rc)
            return rc;
    }
    const int rc = disk->kind->prepare ? disk->kind->prepare(disk, io, at, size) : 0;
    if (rc)
        return rc == VMM_DISK_WAIT ? WAITING : rc;
    const struct vmm_extent extent = {.fd = disk->fd, .at = disk->data_at + at, .size = size};
    return io->op == VMM_DISK_WRITE ? transfer(disk, io, extent) : zero(disk, io, extent.at, size);
}

static void settled(struct vmm_disk_io *io)
{
    if (!io->allocating)
        return;
    *io->allocating = io->next_allocating;
    if (io->next_allocating)
        io->next_allocating->allocating = io->allocating;
    io->allocating = NULL;
}

static void end_step(struct vmm_disk *disk, struct vmm_disk_io *io, int64_t result)
{
    const uint64_t at = io->at + io->finished, size = io->size - io->finished;
    if (io->allocate_mode && result == 0)
        result = (int64_t)io->piece;
    if (io->op == VMM_DISK_READ && io->bounce_iov.iov_base && result > 0)
        copy(io, true, io->bounce_iov.iov_base, (uint64_t)result);
    vmm_bounce_give_back(&disk->bounce, io->buffer);
    io->buffer = NULL;
    io->bounce_iov.iov_base = NULL;
    restore(io);
    settled(io);
    if (result == -EINTR || result == -EAGAIN)
        return; /* once more */
    if (io->allocate_mode && (result == -EOPNOTSUPP || result == -ENOSYS)) {
        *(io->allocate_mode & FALLOC_FL_PUNCH_HOLE ? &disk->no_punch : &disk->no_zero) = true;
        return; /* another way */
    }
    if (result > 0 && (io->op == VMM_DISK_WRITE || io->op == VMM_DISK_ZERO) && disk->kind->written) {
        result = (int64_t)disk->kind->written(disk, at, (uint64_t)result, size);
        if (!result && !io->stalled) { /* once more, for the rest of it or for the host's reason */
            io->stalled = true;
            return;
        }
        io->stalled = false;
    }
    if (result <= 0) {
        io->error = result ? (int)result : io->op == VMM_DISK_READ ? -ENODATA : -EIO;
        return;
    }
    if (io->op == VMM_DISK_READ || io->op == VMM_DISK_WRITE)
        consume(io, (uint64_t)result);
    io->finished += (uint64_t)result;
}

/* ---- operations ---- */

static void over(struct vmm_disk *disk, struct vmm_disk_io *io)
{
    free(io->bounce);
    io->bounce = NULL;
    io->over = true;
    disk->under_way--;
    if (io->op == VMM_DISK_WRITE || io->op == VMM_DISK_ZERO || io->op == VMM_DISK_DISCARD)
        vmm_disk_dirty_mark(disk, io->at, io->size);
    if (io->later)
        io->done(io);
}

static void flush(struct vmm_disk *disk);

/* Go on until the operation is over or something is waited for. */
static void advance(struct vmm_disk *disk, struct vmm_disk_io *io)
{
    while (!io->error && io->finished < io->size) {
        if (disk->cancelling) {
            io->error = -ECANCELED;
            break;
        }
        const int64_t result = begin_step(disk, io);
        if (result == VMM_HOST_IO_PENDING)
            return;
        if (result == WAITING) {
            list_append(&disk->waiting, io);
            return;
        }
        end_step(disk, io, result);
    }
    if (!io->error && (io->op == VMM_DISK_FLUSH || (io->through && io->op != VMM_DISK_READ))) {
        list_append(&disk->flush_next, io);
        flush(disk);
        return;
    }
    over(disk, io);
}

/* Those that waited look again, in the order in which they came. */
static void wake_waiting(struct vmm_disk *disk)
{
    for (struct vmm_disk_io *io = list_take_all(&disk->waiting), *next; io; io = next) {
        next = io->next;
        advance(disk, io);
    }
}

static void step_done(struct vmm_host_io_op *op, int64_t result)
{
    struct vmm_disk_io *io = (void *)((uint8_t *)op - offsetof(struct vmm_disk_io, op_under_way));
    struct vmm_disk *disk = io->disk;
    end_step(disk, io, result);
    advance(disk, io);
    wake_waiting(disk);
}

/* ---- flushing: one round at a time serves everyone who was there when it began ---- */

/* 0 or -errno: the round is over. VMM_HOST_IO_PENDING: the host is syncing. */
static int64_t flush_round(struct vmm_disk *disk, int64_t result)
{
    for (;;) {
        if (result == 0 && !disk->recorded) {
            disk->recorded = true;
            const int more = disk->kind->record ? disk->kind->record(disk) : 0;
            if (more <= 0)
                return more;
        } else if (result != -EINTR && result != -EAGAIN) {
            return result;
        }
        /* Also where it was interrupted: as with a transfer, nothing has failed. */
        result = vmm_host_io_sync(&disk->host_io, &disk->flush_op, disk->fd);
    }
}

static void flush_over(struct vmm_disk *disk, int64_t result)
{
    if (disk->kind->end_flush)
        disk->kind->end_flush(disk);
    if (result < 0 && !disk->flush_failed)
        disk->flush_failed = (int)result;
    for (struct vmm_disk_io *io = list_take_all(&disk->flush_now), *next; io; io = next) {
        next = io->next;
        io->error = (int)result;
        over(disk, io);
    }
}

static void flush(struct vmm_disk *disk)
{
    while (disk->flush_next.first && !disk->flush_now.first) {
        for (struct vmm_disk_io *io = list_take_all(&disk->flush_next), *next; io; io = next) {
            next = io->next;
            list_append(&disk->flush_now, io);
        }
        disk->recorded = false;
        int64_t result = disk->flush_failed;
        if (!result && disk->kind->begin_flush)
            result = disk->kind->begin_flush(disk);
        if (!result)
            result = vmm_host_io_sync(&disk->host_io, &disk->flush_op, disk->fd);
        result = flush_round(disk, result);
        if (result == VMM_HOST_IO_PENDING)
            return;
        flush_over(disk, result);
    }
}

static void sync_done(struct vmm_host_io_op *op, int64_t result)
{
    struct vmm_disk *disk = (void *)((uint8_t *)op - offsetof(struct vmm_disk, flush_op));
    result = flush_round(disk, result);
    if (result == VMM_HOST_IO_PENDING)
        return;
    flush_over(disk, result);
    flush(disk);
}

/* ---- for the user of the disk ---- */

bool vmm_disk_start(struct vmm_disk *disk, struct vmm_disk_io *io)
{
    io->disk = disk;
    io->error = 0;
    io->finished = 0;
    io->later = io->over = io->unkept = io->stalled = false;
    io->bounce = NULL;
    io->buffer = NULL;
    io->bounce_iov.iov_base = NULL;
    io->cut = 0;
    io->allocating = NULL;
    io->op_under_way.done = step_done;
    if (io->op == VMM_DISK_FLUSH)
        io->size = 0;
    disk->under_way++;
    advance(disk, io);
    io->later = !io->over;
    return io->over;
}

bool vmm_disk_turn(struct vmm_disk *disk)
{
    bool any = false;
    for (bool more = true; more; any |= more) { /* what completes may go on with another step */
        vmm_host_io_submit(&disk->host_io);
        more = vmm_host_io_reap(&disk->host_io);
    }
    return any;
}

int vmm_disk_fd(const struct vmm_disk *disk)
{
    return disk->host_io.ring;
}

void vmm_disk_drain(struct vmm_disk *disk, bool cancel)
{
    disk->cancelling = cancel;
    while (disk->under_way) {
        wake_waiting(disk);
        vmm_host_io_wait(&disk->host_io);
        vmm_host_io_reap(&disk->host_io);
    }
    disk->cancelling = false;
}

uint64_t vmm_disk_size(const vmm_disk *disk)
{
    return disk->size;
}

int vmm_disk_resize(struct vmm_disk *disk, uint64_t size, bool follow)
{
    if (disk->undo || disk->dirty)
        return vmm_error_set(-EBUSY, "a checkpoint or a migration holds the disk at its size");
    const int rc = disk->kind->resize(disk, size, follow);
    if (!rc)
        disk->size = size;
    return rc;
}

/* ---- clearing a file, on the spot ---- */

int vmm_disk_clear(int fd, uint64_t at, uint64_t size)
{
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)size) == 0)
        return 0;
    int rc = 0;
    for (uint64_t n; size && !rc; at += n, size -= n) {
        n = size < ZEROS_SIZE ? size : ZEROS_SIZE;
        rc = vmm_disk_write_whole(fd, zeros, n, at);
    }
    return rc;
}

/* ---- life ---- */

int vmm_disk_create(const struct vmm_disk_kind *kind, int fd, uint64_t size, uint64_t data_at,
                    uint32_t alignment, uint32_t flags, struct vmm_disk **out)
{
    if (!alignment || alignment & (alignment - 1) || alignment > 4096 || data_at % 4096)
        return vmm_error_set(-EINVAL, "a disk with O_DIRECT alignment %u", alignment);
    struct vmm_disk *disk = calloc(1, sizeof(*disk));
    if (!disk)
        return vmm_error_set(-ENOMEM, "a disk");
    disk->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (disk->fd < 0) {
        const int rc = vmm_error_errno("F_DUPFD_CLOEXEC of a disk");
        free(disk);
        return rc;
    }
    disk->kind = kind;
    disk->size = size;
    disk->data_at = data_at;
    disk->alignment = alignment;
    disk->flush_op.done = sync_done;
    list_init(&disk->waiting);
    list_init(&disk->flush_next);
    list_init(&disk->flush_now);
    vmm_host_io_init(&disk->host_io, flags & VMM_DISK_BLOCKING);
    *out = disk;
    return 0;
}

void vmm_disk_destroy(vmm_disk *disk)
{
    if (!disk)
        return;
    while (disk->undo)
        vmm_disk_undo_close(disk->undo);
    while (disk->dirty)
        vmm_disk_dirty_close(disk->dirty);
    if (disk->kind->close)
        disk->kind->close(disk);
    vmm_host_io_deinit(&disk->host_io);
    vmm_bounce_deinit(&disk->bounce);
    close(disk->fd);
    free(disk);
}
