/* SPDX-License-Identifier: Apache-2.0 */
/* Parsing block requests; it touches neither the device nor guest memory. */
#include "virtio/blk.h"

#include <string.h>

static uint32_t le32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof(value));
    return value;
}

static uint64_t le64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof(value));
    return value;
}

/* `sector` in units, size in bytes. */
static bool fits(const struct vmm_blk_limits *limits, uint64_t sector, uint64_t size)
{
    if (sector > limits->size / VMM_BLK_UNIT)
        return false;
    const uint64_t at = sector * VMM_BLK_UNIT;
    return size <= limits->size - at && at % limits->sector == 0 && size % limits->sector == 0;
}

static enum vmm_blk_status parse_data(const struct vmm_blk_limits *limits, uint64_t sector, uint64_t size,
                                      struct vmm_blk_request *request)
{
    if (!fits(limits, sector, size))
        return VMM_BLK_IOERR;
    request->n_ranges = 1;
    request->ranges[0] = (struct vmm_blk_range){.at = sector * VMM_BLK_UNIT, .size = size};
    return VMM_BLK_OK;
}

/* 5.2.6.2: a flag that is not known, or unmap in a discard: UNSUPP; too many ranges, too long, outside: IOERR. */
static enum vmm_blk_status parse_ranges(const struct vmm_blk_limits *limits, const uint8_t *ranges,
                                        uint32_t n, uint64_t size, uint32_t sectors_max, uint32_t flags_known,
                                        struct vmm_blk_request *request)
{
    if (!size || size != n || size % VMM_BLK_RANGE)
        return VMM_BLK_IOERR;
    request->n_ranges = (unsigned)(size / VMM_BLK_RANGE);
    for (unsigned i = 0; i < request->n_ranges; i++) {
        const uint8_t *range = ranges + i * VMM_BLK_RANGE;
        const uint64_t sector = le64(range);
        const uint32_t sectors = le32(range + 8), flags = le32(range + 12);
        if (flags & ~flags_known)
            return VMM_BLK_UNSUPP;
        if (sectors > sectors_max || !fits(limits, sector, (uint64_t)sectors * VMM_BLK_UNIT))
            return VMM_BLK_IOERR;
        request->ranges[i] = (struct vmm_blk_range){
            .at = sector * VMM_BLK_UNIT, .size = (uint64_t)sectors * VMM_BLK_UNIT, .unmap = flags & 1};
    }
    return VMM_BLK_OK;
}

enum vmm_blk_status vmm_blk_parse(const struct vmm_blk_limits *limits, const uint8_t *head, uint32_t n_head,
                                  uint64_t out_size, uint64_t in_size, struct vmm_blk_request *request)
{
    const uint32_t type = le32(head);
    const uint64_t sector = le64(head + 8);
    const uint8_t *ranges = head + VMM_BLK_HEADER;
    const uint32_t n_ranges = n_head - VMM_BLK_HEADER;
    request->type = type;
    request->n_ranges = 0;
    switch (type) {
    case VMM_BLK_FLUSH:
        request->n_ranges = 1; /* of no bytes */
        request->ranges[0] = (struct vmm_blk_range){0};
        return VMM_BLK_OK;
    case VMM_BLK_GET_ID:
        return VMM_BLK_OK;
    case VMM_BLK_IN:
        return parse_data(limits, sector, in_size - 1, request);
    case VMM_BLK_OUT:
    case VMM_BLK_DISCARD:
    case VMM_BLK_WRITE_ZEROES:
        break;
    default:
        return VMM_BLK_UNSUPP;
    }
    if (limits->readonly)
        return VMM_BLK_IOERR;
    const uint64_t size = out_size - VMM_BLK_HEADER;
    if (type == VMM_BLK_OUT)
        return parse_data(limits, sector, size, request);
    return type == VMM_BLK_DISCARD
               ? parse_ranges(limits, ranges, n_ranges, size, VMM_BLK_DISCARD_MAX, 0, request)
               : parse_ranges(limits, ranges, n_ranges, size, VMM_BLK_ZERO_MAX, 1, request);
}
