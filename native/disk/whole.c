/* SPDX-License-Identifier: Apache-2.0 */
/* Reads and writes that are over when they return, of files and of what a disk holds. */
#include "disk/disk.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

int64_t vmm_disk_read_whole(int fd, uint8_t *to, uint64_t n, uint64_t at)
{
    uint64_t done = 0;
    while (done < n) {
        const ssize_t got = pread(fd, to + done, n - done, (off_t)(at + done));
        if (got < 0 && errno != EINTR)
            return -errno;
        if (got == 0)
            break;
        done += got > 0 ? (uint64_t)got : 0;
    }
    return (int64_t)done;
}

int vmm_disk_write_whole(int fd, const uint8_t *from, uint64_t n, uint64_t at)
{
    for (uint64_t done = 0; done < n;) {
        const ssize_t put = pwrite(fd, from + done, n - done, (off_t)(at + done));
        if (put < 0 && errno != EINTR)
            return -errno;
        if (put == 0)
            return -EIO;
        done += put > 0 ? (uint64_t)put : 0;
    }
    return 0;
}

int vmm_disk_read_now(struct vmm_disk *disk, uint64_t at, uint64_t size, uint8_t *to)
{
    while (size) {
        struct vmm_extent extent = disk->kind->map(disk, at, size);
        if (extent.fd < 0) {
            memset(to, 0, extent.size);
        } else {
            const int64_t got = vmm_disk_read_whole(extent.fd, to, extent.size, extent.at);
            if (got <= 0)
                return got ? (int)got : -ENODATA; /* the file has shrunk */
            extent.size = (uint64_t)got; /* less: it ends within the last sector, or is looked at again */
        }
        to += extent.size;
        at += extent.size;
        size -= extent.size;
    }
    return 0;
}
