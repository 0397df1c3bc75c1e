/* SPDX-License-Identifier: Apache-2.0 */
/* The end of a process that vmm_fs_server_start started. */
#ifndef VMM_VIRTIO_FS_SERVER_H
#define VMM_VIRTIO_FS_SERVER_H

#include "vmmfs.h"

/* Give it `grace_ms` to end by itself, then kill it and all it started; reap it. `server` stays open. */
void vmm_fs_server_end(int server, int grace_ms);

#endif
