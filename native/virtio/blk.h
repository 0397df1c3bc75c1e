/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-blk's request parser (virtio 1.2, 5.2.6): from bytes that were copied once to what is to be done. */
#ifndef VMM_VIRTIO_BLK_H
#define VMM_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>

#define VMM_BLK_HEADER 16u /* type, reserved, sector */
#define VMM_BLK_RANGE 16u  /* sector, number of sectors, flags */
#define VMM_BLK_RANGES_MAX 16u
#define VMM_BLK_ID 20u
#define VMM_BLK_UNIT 512u /* of every sector number and capacity on the wire, whatever the logical sector */
/* The longest range of a discard and of zeroing, in units: 2 GiB, and 32 MiB for what may have to be written. */
#define VMM_BLK_DISCARD_MAX (1u << 22)
#define VMM_BLK_ZERO_MAX (1u << 16)

enum vmm_blk_status { VMM_BLK_OK = 0, VMM_BLK_IOERR = 1, VMM_BLK_UNSUPP = 2 };

enum vmm_blk_type {
    VMM_BLK_IN = 0,
    VMM_BLK_OUT = 1,
    VMM_BLK_FLUSH = 4,
    VMM_BLK_GET_ID = 8,
    VMM_BLK_DISCARD = 11,
    VMM_BLK_WRITE_ZEROES = 13,
};

struct vmm_blk_limits {
    uint64_t size;   /* bytes of the disk */
    uint32_t sector; /* logical: everything is a multiple of it */
    bool readonly;
};

struct vmm_blk_range {
    uint64_t at, size; /* bytes, inside the disk, whole sectors */
    bool unmap;
};

struct vmm_blk_request {
    enum vmm_blk_type type;
    unsigned n_ranges; /* IN, OUT and FLUSH: one; DISCARD and WRITE_ZEROES: one or more; GET_ID: none */
    struct vmm_blk_range ranges[VMM_BLK_RANGES_MAX];
};

/*
 * head: the first n_head bytes the driver lets the device read, at most VMM_BLK_HEADER + VMM_BLK_RANGES_MAX *
 * VMM_BLK_RANGE; out_size and in_size: all it lets it read and write. Returns VMM_BLK_OK, or what to answer the driver.
 * The caller has seen to it that there is a whole header, and a byte for the status.
 */
enum vmm_blk_status vmm_blk_parse(const struct vmm_blk_limits *limits, const uint8_t *head, uint32_t n_head,
                                  uint64_t out_size, uint64_t in_size, struct vmm_blk_request *request);

#endif
