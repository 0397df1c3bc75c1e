/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-fs, a host directory a guest can mount: a continuation of vmmvirtio.h, under the same rules. Files are
 * served by a daemon of its own (virtiofsd) that takes the queues through the vhost-user protocol; what is here
 * starts it, hands it the queues, and notices its end.
 *
 * Order of calls
 *   vmm_fs_server_start -> vmm_fs_create -> as any device
 */
#ifndef VMMFS_H
#define VMMFS_H

#include "vmmvirtio.h"

/* cdef: begin */

enum vmm_fs_server_flags { VMM_FS_READONLY = 1 };
enum vmm_fs_server_fds {
    VMM_FS_SERVER_LISTENER = 3
}; /* the descriptor on which the server finds `listener` */

/*
 * Start the program argv[0] (a path; argv ends with NULL) in namespaces of its own: processes, mounts and, unless we
 * are root, users, where our user is root. `directory` (absolute) is mounted there without device nodes and set-uid
 * programs, and read-only if the flag says so. Its standard output and error are `log`. *server is a pidfd: when it is killed, whatever it started dies with it.
 * -EPERM, -ENOSPC, -EACCES, -EINVAL: this host gives ordinary users no namespaces; -ENOENT ...: from mount or exec.
 */
int vmm_fs_server_start(const char *const *argv, const char *directory, uint32_t flags, int listener, int log,
                        int *server);

typedef struct vmm_fs vmm_fs;

/*
 * The device `name` (virtio 1.2, 5.11) with its tag (1..36 bytes), served by the vhost-user back end at the other
 * end of the stream socket `socket`. `server` is its pidfd and `log` the reading end of what it prints (-1: it has
 * none). All three are the device's from here on, whether this succeeds or not. Waits for the back end's first
 * answers. -EPIPE: it is gone; -ETIMEDOUT: it is silent; -EPROTO: it breaks the protocol or cannot do what is needed.
 */
int vmm_fs_create(vmm_vm *vm, const char *name, const char *tag, int socket, int server, int log,
                  vmm_fs **out);
vmm_virtio *vmm_fs_virtio(vmm_fs *fs);
/* Ends the server. */
void vmm_fs_destroy(vmm_fs *fs);

/* cdef: end */

#endif
