/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Going back: a log of what a disk held when the log was opened, cluster by cluster, for the clusters that have changed
 * since. Any number of logs at a time, each with its own past; going back to one is a change like any other for
 * the rest of them.
 *
 * Old bytes are kept before the first write of a cluster begins. So a cluster that something is writing is in every
 * log, and what is read of one that is in no log yet is not in motion. Where they cannot be read or kept, the write
 * fails. A discard is advice, and not taken while there is a log: it would cost reading all that it gives away.
 */
#ifndef VMM_DISK_UNDO_H
#define VMM_DISK_UNDO_H

#include "disk/disk.h"

/*
 * fd: an empty file for the old bytes, of which a copy is kept; -1: in memory. Waits for what is under way, as the
 * next does. The disk keeps its size from here to the last close.
 */
int vmm_disk_undo_open(struct vmm_disk *disk, int fd, struct vmm_undo **out);
/*
 * Make the disk what it was, and the log empty: it goes on from here. Returns how many clusters of 4096 bytes were
 * written; -errno: some were not, and the log still has everything. What was written is stable after the next flush.
 */
int64_t vmm_disk_undo_back(struct vmm_undo *undo);
void vmm_disk_undo_close(struct vmm_undo *undo);

#endif
