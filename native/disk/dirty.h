/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which clusters of a disk change: for who copies it while its guest writes. Any number of logs at a time.
 *
 * A write is marked when it is over and before anybody is told so, also one that failed: it may have changed a part. So
 * who takes a run out of the log and then reads it has every write that was over, and finds the others in the log
 * later. What is read meanwhile may be in motion; it is in the log again then.
 */
#ifndef VMM_DISK_DIRTY_H
#define VMM_DISK_DIRTY_H

#include "disk/disk.h"

#define VMM_DISK_CLUSTER 4096ull

/* From now on. The disk keeps its size from here to the last close. */
int vmm_disk_dirty_open(struct vmm_disk *disk, struct vmm_disk_dirty **out);
uint64_t vmm_disk_dirty_count(const struct vmm_disk_dirty *log); /* clusters */
/*
 * The first run at or after byte *at, which it is set to, and at most `max` bytes of it: clean from now on. Returns its
 * bytes (the disk's last cluster may be a part of one); 0: there is none.
 */
uint64_t vmm_disk_dirty_take(struct vmm_disk_dirty *log, uint64_t *at, uint64_t max);
void vmm_disk_dirty_close(struct vmm_disk_dirty *log);

/* [at, at + size) has been written, or may have been. */
void vmm_disk_dirty_mark(struct vmm_disk *disk, uint64_t at, uint64_t size);

#endif
