/* SPDX-License-Identifier: Apache-2.0 */
/* A file or block device as it is: byte n of the disk is byte n of the file. */
#include "disk/disk.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

static struct vmm_extent raw_map(struct vmm_disk *disk, uint64_t at, uint64_t size)
{
    return (struct vmm_extent){.fd = disk->fd, .at = at, .size = size};
}

static int raw_resize(struct vmm_disk *disk, uint64_t size, bool follow)
{
    return !follow && ftruncate(disk->fd, (off_t)size) < 0 ? vmm_error_errno("ftruncate of a disk image") : 0;
}

int vmm_disk_open_raw(int fd, uint64_t size, uint32_t alignment, uint32_t flags, vmm_disk **out)
{
    static const struct vmm_disk_kind raw = {.map = raw_map, .resize = raw_resize};
    return vmm_disk_create(&raw, fd, size, 0, alignment, flags, out);
}
