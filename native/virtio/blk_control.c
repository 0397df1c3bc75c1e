/* SPDX-License-Identifier: Apache-2.0 */
/* The block device as the monitor uses it: size, logs of its disk, what the disk holds, counters. */
#include "disk/dirty.h"
#include "disk/undo.h"
#include "virtio/blk_device.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

int vmm_blk_resize(vmm_blk *blk, uint64_t size, int follow)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    if (!size || size % blk->limits.sector)
        return vmm_error_set(-EINVAL, "%s: %llu bytes are not whole sectors", blk->virtio.name,
                             (unsigned long long)size);
    vmm_blk_quiesce(blk); /* what was inside the old size has happened before the new one */
    const int rc = vmm_disk_resize(blk->disk, size, follow);
    if (rc < 0)
        return rc;
    blk->limits.size = size;
    const uint64_t capacity = size / VMM_BLK_UNIT;
    vmm_virtio_set_config(&blk->virtio, offsetof(struct vmm_blk_config, capacity), &capacity,
                          sizeof(capacity));
    return 0;
}

int vmm_blk_undo_open(vmm_blk *blk, int fd, vmm_undo **out)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    vmm_blk_quiesce(blk);
    return vmm_disk_undo_open(blk->disk, fd, out);
}

int64_t vmm_blk_undo_back(vmm_blk *blk, vmm_undo *undo)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    vmm_blk_quiesce(blk);
    return vmm_disk_undo_back(undo);
}

void vmm_blk_undo_close(vmm_blk *blk, vmm_undo *undo)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    vmm_disk_undo_close(undo);
}

int vmm_blk_dirty_open(vmm_blk *blk, vmm_disk_dirty **out)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    return vmm_disk_dirty_open(blk->disk, out);
}

uint64_t vmm_blk_dirty_count(vmm_blk *blk, vmm_disk_dirty *log)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    return vmm_disk_dirty_count(log);
}

uint64_t vmm_blk_dirty_take(vmm_blk *blk, vmm_disk_dirty *log, uint64_t *at, uint64_t max)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    return vmm_disk_dirty_take(log, at, max);
}

void vmm_blk_dirty_close(vmm_blk *blk, vmm_disk_dirty *log)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    vmm_disk_dirty_close(log);
}

/* Its files are open for as long as the device is: what lies there is read without the lock. */
static struct vmm_extent extent_at(struct vmm_blk *blk, uint64_t at, uint64_t size)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    const uint64_t left = at < blk->limits.size ? blk->limits.size - at : 0;
    if (size > left)
        size = left;
    return size ? blk->disk->kind->map(blk->disk, at, size) : (struct vmm_extent){.fd = -1};
}

uint64_t vmm_blk_extent(vmm_blk *blk, uint64_t at, int *zeros)
{
    const struct vmm_extent extent = extent_at(blk, at, UINT64_MAX);
    *zeros = 1;
    if (extent.fd < 0)
        return extent.size;
    const off_t data = lseek(extent.fd, (off_t)extent.at, SEEK_DATA);
    if (data < 0 && errno == ENXIO)
        return extent.size; /* a hole to the end of the file */
    const uint64_t hole = data < 0 ? 0 : ((uint64_t)data - extent.at) & ~(VMM_DISK_CLUSTER - 1);
    if (hole)
        return hole < extent.size ? hole : extent.size;
    *zeros = 0;
    const off_t next = data < 0 ? -1 : lseek(extent.fd, data, SEEK_HOLE);
    if (next < data || next < 0)
        return extent.size; /* a block device does not say */
    const uint64_t size = ((uint64_t)next - extent.at + VMM_DISK_CLUSTER - 1) & ~(VMM_DISK_CLUSTER - 1);
    return size && size < extent.size ? size : extent.size;
}

int vmm_blk_peek(vmm_blk *blk, uint64_t at, uint64_t size, void *to)
{
    for (uint8_t *next = to; size;) {
        const struct vmm_extent extent = extent_at(blk, at, size);
        int64_t got = extent.size ? (int64_t)extent.size : -ENODATA;
        if (extent.size && extent.fd < 0)
            memset(next, 0, extent.size);
        else if (extent.size)
            got = vmm_disk_read_whole(extent.fd, next, extent.size, extent.at);
        if (got >= 0 && (uint64_t)got < extent.size)
            got = -ENODATA;
        if (got < 0)
            return vmm_error_set((int)got, "%s: reading %s at byte %llu: %s", blk->virtio.name, blk->label,
                                 (unsigned long long)at,
                                 got == -ENODATA ? "the file ends before it" : strerror((int)-got));
        next += extent.size;
        at += extent.size;
        size -= extent.size;
    }
    return 0;
}

static void synced(struct vmm_disk_io *io)
{
    (void)io;
}

int vmm_blk_sync(vmm_blk *blk)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    vmm_blk_quiesce(blk);
    struct vmm_disk_io io = {.op = VMM_DISK_FLUSH, .done = synced};
    if (!vmm_disk_start(blk->disk, &io))
        vmm_disk_drain(blk->disk, false);
    return io.error ? vmm_error_host(io.error, "%s: flushing %s: %s", blk->virtio.name, blk->label,
                                     strerror(-io.error))
                    : 0;
}

uint64_t vmm_blk_size(vmm_blk *blk)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    return blk->limits.size;
}

int vmm_blk_get_stats(vmm_blk *blk, uint32_t queue, vmm_blk_stats *stats)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    if (queue >= blk->virtio.n_queues)
        return vmm_error_set(-EINVAL, "%s has %u queues", blk->virtio.name, blk->virtio.n_queues);
    *stats = blk->stats[queue];
    return 0;
}

uint64_t vmm_blk_throttled(vmm_blk *blk)
{
    VMM_VIRTIO_LOCKED(&blk->virtio);
    return blk->limiter.throttled;
}
