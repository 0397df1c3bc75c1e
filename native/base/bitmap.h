/* SPDX-License-Identifier: Apache-2.0 */
/* Bitmaps of pages, or clusters of a disk, in words of 64: page n is bit n % 64 of word n / 64. */
#ifndef VMM_BASE_BITMAP_H
#define VMM_BASE_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

/* The first page from `from` on, below `end`, whose bit is `value`; `end`: none. */
static inline uint64_t vmm_bitmap_next(const uint64_t *bits, uint64_t from, uint64_t end, bool value)
{
    while (from < end) {
        const uint64_t rest = (value ? bits[from / 64] : ~bits[from / 64]) >> from % 64;
        if (rest) {
            from += (uint64_t)__builtin_ctzll(rest);
            return from < end ? from : end;
        }
        from = (from / 64 + 1) * 64;
    }
    return end;
}

#endif
