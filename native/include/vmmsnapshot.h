/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of a snapshot are made of: pages of memory in a sparse file, and checksums of them
 * (docs/snapshot-format.md). No function here knows a machine.
 *
 * A bitmap says which pages are meant: page n is bit n % 64 of word n / 64; bits past the last page are clear.
 * Checksums are CRC-32C: one for each VMM_CHUNK bytes of memory, over those of its pages that the bitmap has, in
 * order; 0 where it has none. `size` is a multiple of VMM_PAGE everywhere.
 */
#ifndef VMMSNAPSHOT_H
#define VMMSNAPSHOT_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

enum vmm_snapshot_units { VMM_PAGE = 4096, VMM_CHUNK = 65536 };

/* CRC-32C of n more bytes, after those that made `crc` (0: none); and the same for n bytes of zeros, at once. */
uint32_t vmm_crc32c(uint32_t crc, const void *bytes, size_t n);
uint32_t vmm_crc32c_portable(uint32_t crc, const void *bytes,
                             size_t n); /* the same, without the instruction */
uint32_t vmm_crc32c_zeros(uint32_t crc, uint64_t n);

/* CRC-32C of a whole file, whose holes are not read. -errno. */
int vmm_file_crc32c(int fd, uint32_t *crc);

/* Add to a bitmap the pages of a private mapping, or of anonymous memory, that are this process's own: a page that
 * was only read is still the file's. -errno. */
int vmm_pages_own(const void *host, uint64_t size, uint64_t *bitmap);

/*
 * Find the pages of [host, host + size) that are not all zeros. Memory that was never touched is not touched now:
 * what lies in a hole of `fd` from `offset` on is known to be zeros (fd < 0: no such file). `privately`: the
 * memory is not the file itself; a page this process has of its own is looked at as well. Returns how many.
 */
int64_t vmm_pages_find(const void *host, uint64_t size, int fd, uint64_t offset, int privately,
                       uint64_t *bitmap);

/* Write the pages of a bitmap to where they lie from `offset` on, zeros left as holes, and make their checksums.
 * The file is new, and as long as it will be. -errno (-ENOSPC: the disk is full). */
int vmm_pages_write(int fd, uint64_t offset, const void *host, uint64_t size, const uint64_t *bitmap,
                    uint32_t *checksums);

/* Read all of them; every other page must be zeros. On as many threads as are worth it, which end with the call.
 * -EBADMSG: some byte is not what was written, or is not there. */
int vmm_pages_check(int fd, uint64_t offset, uint64_t size, const uint64_t *bitmap,
                    const uint32_t *checksums);

/* Copy the pages of a bitmap into memory. -EBADMSG: the file ends before. */
int vmm_pages_read(int fd, uint64_t offset, void *host, uint64_t size, const uint64_t *bitmap);

/* renameat2: `exchange` swaps two names that are there, else `to` must not be there. -errno. */
int vmm_rename(const char *from, const char *to, int exchange);

/* cdef: end */

#endif
