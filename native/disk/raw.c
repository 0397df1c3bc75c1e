/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A file or block device as it is: byte n of the disk is byte n of the file. A file that ends within the disk's last
 * sector reads as zeros from there on; a write of that sector makes it whole. QEMU does the same.
 */
#include "disk/disk.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR_MAX 4096

/* Where the file ends, if that is within the last sector; else the disk's end, and a file that is shorter is an error. */
static void find_end(struct vmm_disk *disk)
{
    struct stat file;
    disk->end = disk->size;
    if (fstat(disk->fd, &file) == 0 && S_ISREG(file.st_mode) && (uint64_t)file.st_size < disk->size &&
        disk->size - (uint64_t)file.st_size < SECTOR_MAX)
        disk->end = (uint64_t)file.st_size;
}

static struct vmm_extent raw_map(struct vmm_disk *disk, uint64_t at, uint64_t size)
{
    /* A read across the end comes up short, and goes on here: O_DIRECT could not ask for less than a sector. */
    return (struct vmm_extent){.fd = at < disk->end ? disk->fd : -1, .at = at, .size = size};
}

static uint64_t raw_written(struct vmm_disk *disk, uint64_t at, uint64_t n, uint64_t size)
{
    (void)size;
    if (at + n > disk->end)
        find_end(disk); /* zeroing may have left the file as it is */
    return n;
}

static int raw_resize(struct vmm_disk *disk, uint64_t size, bool follow)
{
    if (!follow && ftruncate(disk->fd, (off_t)size) < 0)
        return vmm_error_errno("ftruncate of a disk image");
    disk->size = size;
    find_end(disk);
    return 0;
}

int vmm_disk_open_raw(int fd, uint64_t size, uint32_t alignment, uint32_t flags, vmm_disk **out)
{
    static const struct vmm_disk_kind raw = {.map = raw_map, .written = raw_written, .resize = raw_resize};
    const int rc = vmm_disk_create(&raw, fd, size, 0, alignment, flags, out);
    if (rc == 0)
        find_end(*out);
    return rc;
}
