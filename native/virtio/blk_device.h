/* SPDX-License-Identifier: Apache-2.0 */
/* The block device as blk.c, which serves the guest, and blk_control.c, which serves the monitor, see it. */
#ifndef VMM_VIRTIO_BLK_DEVICE_H
#define VMM_VIRTIO_BLK_DEVICE_H

#include "core/bucket.h"
#include "disk/disk.h"
#include "virtio/blk.h"
#include "virtio/virtio.h"

#define VMM_BLK_QUEUES_MAX 16

/* virtio 1.2, 5.2.4: little-endian, as is the host. */
struct vmm_blk_config {
    uint64_t capacity;
    uint32_t size_max, seg_max;
    uint16_t cylinders;
    uint8_t heads, sectors;
    uint32_t blk_size;
    uint8_t physical_block_exp, alignment_offset;
    uint16_t min_io_size;
    uint32_t opt_io_size;
    uint8_t writeback, unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_sector_alignment;
    uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
    uint8_t write_zeroes_may_unmap, unused1[3];
} __attribute__((packed));
_Static_assert(offsetof(struct vmm_blk_config, writeback) == 32 && sizeof(struct vmm_blk_config) == 60,
               "virtio 1.2, 5.2.4");

struct vmm_blk_job {
    struct vmm_disk_io io;
    struct vmm_blk *blk;
    struct vmm_blk_job *next_free;
    uint16_t queue;
    uint16_t range; /* of parsed, under way */
    uint8_t *status;
    struct vmm_blk_request parsed;
    struct iovec data[VMM_CHAIN_PIECES]; /* of the chain, for the disk, which consumes them */
    struct vmm_chain chain;              /* last: of both only the beginning is touched */
};

struct vmm_blk {
    struct vmm_virtio virtio;
    struct vmm_disk *disk;
    char *label;
    struct vmm_blk_limits limits;
    bool failed; /* a host error has been told */
    uint8_t serial[VMM_BLK_ID];
    struct vmm_source completions;
    struct vmm_limiter limiter;
    uint32_t held; /* queues in which requests wait for a free one, or for the limiter */
    unsigned first_held;
    uint32_t pushed; /* queues with answers that were not published */
    struct vmm_blk_job *pool, *free;
    unsigned n_used; /* of pool, ever: the rest has not been touched */
    vmm_blk_stats stats[VMM_BLK_QUEUES_MAX];
};

/* Wait until no request is under way, with the device's lock held. `opaque` is the device, as vmm_virtio_ops has it. */
void vmm_blk_quiesce(void *opaque);

#endif
