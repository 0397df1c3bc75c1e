/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio socket device (virtio 1.2, 5.10): stream sockets between ports of the guest and UNIX sockets of the host, by
 * the convention Firecracker made known.
 *
 *   host to guest   connect to `path`, write "CONNECT <port>\n"; "OK <host port>\n" comes back, then the stream. The
 *                   socket is closed without an answer if the guest refuses.
 *   guest to host   the guest connects to CID 2, <port>; it reaches whoever listens on the UNIX socket `path`_<port>.
 *
 * Closing half a stream works both ways (shutdown). Neither side makes memory grow: there are at most 256
 * connections, each with 128 KiB for bytes that the host's end is slow to take, and what the guest is slow to take
 * stays in the host's socket.
 */
#ifndef VMMVSOCK_H
#define VMMVSOCK_H

#include "vmmvirtio.h"

/* cdef: begin */

/* ---- vsock ---- */

typedef struct vmm_vsock vmm_vsock;
/*
 * `cid`: the guest's context identifier, 3..0xfffffffe. `listener`: a listening UNIX stream socket bound to `path`; the
 * device's from here on. -EINVAL: no such cid, or a path too long for a port's number behind it.
 */
int vmm_vsock_create(vmm_vm *vm, const char *name, uint64_t cid, const char *path, int listener,
                     vmm_vsock **out);
void vmm_vsock_destroy(vmm_vsock *device); /* after vmm_vm_destroy */
vmm_virtio *vmm_vsock_virtio(vmm_vsock *device);

/* End every connection and tell the guest so (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET): it was copied or moved. */
void vmm_vsock_disconnect(vmm_vsock *device);

typedef struct vmm_vsock_info {
    uint64_t cid;
    uint32_t connections;           /* now, with those that are being opened or closed */
    uint64_t from_host, from_guest; /* connections opened, ever */
    uint64_t resets;                /* packets and connections answered with RST */
} vmm_vsock_info;
void vmm_vsock_get_info(vmm_vsock *device, vmm_vsock_info *info);

/* cdef: end */

#endif
