/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Disks: the host's end (a raw file or block device, or an overlay over one) and virtio-blk in front of it.
 *
 * Order of calls
 *   vmm_disk_open_raw or vmm_disk_open_overlay -> vmm_blk_create, which owns the disk from then on -> ... ->
 *   vmm_vm_destroy -> vmm_blk_destroy
 */
#ifndef VMMBLK_H
#define VMMBLK_H

#include "vmmvirtio.h"

/* cdef: begin */

typedef struct vmm_disk vmm_disk;

enum vmm_disk_flags {
    VMM_DISK_BLOCKING = 1, /* no io_uring: system calls that block the I/O thread */
};

/*
 * A file or block device as it is, `size` bytes of it. Of the descriptor a copy is kept, and with it the locks on its
 * open file. alignment: what O_DIRECT asks of offsets, sizes and memory if it is open so (a power of two up to 4096),
 * else 1.
 */
int vmm_disk_open_raw(int fd, uint64_t size, uint32_t alignment, uint32_t flags, vmm_disk **out);

/*
 * A file with a disk's bytes from data_at on, for the clusters of 4096 that have a bit in the bitmap at bitmap_at
 * (docs/disk-overlay.md); all three are multiples of 4096. bitmap_size 0: all of them, and data_at is 0. After
 * `size` the disk is zeros.
 */
typedef struct vmm_disk_layer {
    int32_t fd;
    uint64_t size, bitmap_at, bitmap_size, data_at;
} vmm_disk_layer;

/*
 * What was written, in layers[0], over what is only read: the nearest first, the last of the n a file as it is, which
 * O_DIRECT does not reach: `alignment` is layers[0]'s. The disk has layers[0].size bytes. Of each descriptor a copy is
 * kept. -EINVAL: no base, or a bitmap without room for its layer's bytes; else what reading a bitmap met.
 */
int vmm_disk_open_overlay(const vmm_disk_layer *layers, uint32_t n, uint32_t alignment, uint32_t flags,
                          vmm_disk **out);

/* A disk that was given to no device. Nothing may be under way. Also records what an overlay has not recorded yet. */
void vmm_disk_destroy(vmm_disk *disk);
uint64_t vmm_disk_size(const vmm_disk *disk);

typedef struct vmm_blk vmm_blk;

typedef struct vmm_blk_options {
    uint32_t sector; /* logical: 512 or 4096 */
    uint32_t queues; /* 1..16 */
    uint8_t readonly;
    uint8_t
        block_exponent; /* physical block: sector << this; what is written in such blocks is written fastest */
    uint64_t bytes_per_second, operations_per_second; /* 0: no limit */
    uint8_t serial[20];                               /* GET_ID; padded with zeros */
} vmm_blk_options;

/* On success the disk is the device's. label: what messages call the disk. */
int vmm_blk_create(vmm_vm *vm, const char *name, const char *label, vmm_disk *disk,
                   const vmm_blk_options *options, vmm_blk **out);
vmm_virtio *vmm_blk_virtio(vmm_blk *blk);
void vmm_blk_destroy(vmm_blk *blk); /* after vmm_vm_destroy */

/*
 * Another size, in bytes: the file is made to hold it, the guest is told. -EINVAL: not a whole number of sectors, or an
 * overlay without room; -EBUSY: an overlay cannot shrink, or a log is open; else as ftruncate. follow: the file has that size already.
 */
int vmm_blk_resize(vmm_blk *blk, uint64_t size, int follow);
uint64_t vmm_blk_size(vmm_blk *blk);

/*
 * Going back to what the disk holds when the log is opened: any number of logs at a time, gone back to in any order,
 * any number of times. From open to close the disk keeps its size (-EBUSY), discards are not taken, and a write whose
 * old bytes cannot be kept is an I/O error. All three wait for the requests that are under way; requests that are
 * taken while the disk goes back are of its future, so the machine had better be paused.
 *   open   fd: an empty file for the old bytes, of which a copy is kept; -1: in memory.
 *   back   Returns how many clusters of 4096 bytes were written, and leaves the log empty and open; -errno: some were
 *          not, and the log has everything still. What was written is on stable storage after the next flush.
 * A device that is destroyed closes its logs.
 */
typedef struct vmm_undo vmm_undo;
int vmm_blk_undo_open(vmm_blk *blk, int fd, vmm_undo **out);
int64_t vmm_blk_undo_back(vmm_blk *blk, vmm_undo *undo);
void vmm_blk_undo_close(vmm_blk *blk, vmm_undo *undo);

/*
 * Copying a disk while its guest writes: a log of the clusters of 4096 bytes that requests have changed since it was
 * opened, and what the disk holds. While a log is open the disk keeps its size (-EBUSY).
 *   count  clusters in the log
 *   take   The first run at or after byte *at, which it is set to, at most `max` bytes of it: clean from now on. Returns
 *          its bytes, 0 if there is none. Taken before it is read, whatever a request changes meanwhile is in the log
 *          again.
 *   extent From byte `at` on, the bytes of the extent there; *zeros is true for a hole, which reads as zeros. In whole clusters, but at
 *          the end of a layer and of the disk; 0 behind that.
 *   peek   Copy what a request would read; memory as O_DIRECT has it. The device's requests do not wait for it. -errno.
 * A device that is destroyed closes its logs.
 */
typedef struct vmm_disk_dirty vmm_disk_dirty;
int vmm_blk_dirty_open(vmm_blk *blk, vmm_disk_dirty **out);
uint64_t vmm_blk_dirty_count(vmm_blk *blk, vmm_disk_dirty *log);
uint64_t vmm_blk_dirty_take(vmm_blk *blk, vmm_disk_dirty *log, uint64_t *at, uint64_t max);
void vmm_blk_dirty_close(vmm_blk *blk, vmm_disk_dirty *log);
uint64_t vmm_blk_extent(vmm_blk *blk, uint64_t at, int *zeros);
int vmm_blk_peek(vmm_blk *blk, uint64_t at, uint64_t size, void *to);

/* Make [at, at + size) of a file that is being filled zeros, and a hole if it can have one. -errno. */
int vmm_disk_clear(int fd, uint64_t at, uint64_t size);

/* Wait for the requests under way, and put the disk on stable storage, an overlay's bitmap included. -errno. */
int vmm_blk_sync(vmm_blk *blk);

typedef struct vmm_blk_stats {
    uint64_t reads, writes, flushes, discards, zeroings; /* requests answered without an error */
    uint64_t bytes_read, bytes_written;
    uint64_t errors, unsupported; /* requests answered with VIRTIO_BLK_S_IOERR, with VIRTIO_BLK_S_UNSUPP */
} vmm_blk_stats;
/* -EINVAL: no such queue. */
int vmm_blk_get_stats(vmm_blk *blk, uint32_t queue, vmm_blk_stats *stats);
/* How often the rate limits held requests back. */
uint64_t vmm_blk_throttled(vmm_blk *blk);

/* cdef: end */

#endif
