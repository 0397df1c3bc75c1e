/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-net (virtio 1.2, 5.1). */
#ifndef VMMNET_H
#define VMMNET_H

#include "vmmvirtio.h"

/* cdef: begin */

typedef struct vmm_net vmm_net;

typedef struct vmm_net_config {
    uint8_t mac[6];
    uint16_t mtu;      /* told to the driver; 0: it is not */
    uint16_t pairs;    /* of queues: 1..8 */
    uint8_t offloads;  /* the host end carries virtio-net headers: offer checksum and TSO offloads */
    uint64_t bps, pps; /* bytes and frames a second, each direction by itself; 0: no limit */
} vmm_net_config;

/* Without a host end: its link is down, what the guest sends is dropped. -EINVAL: vmm_error_text says what. */
int vmm_net_create(vmm_vm *vm, const char *name, const vmm_net_config *config, vmm_net **out);
vmm_virtio *vmm_net_virtio(vmm_net *net);
void vmm_net_destroy(vmm_net *net); /* after vmm_vm_destroy; closes the host end */

/*
 * Give it its host end, in place of the one it has; the link goes up. From any thread. The descriptors are the
 * device's if this returns 0, and are made non-blocking.
 * stream: a connected stream socket, each frame after its length in 32 bits, big-endian; `header`: the length counts a
 * virtio-net header before the frame, and both sides are machines of ours.
 * tap: as many queues of one tap interface, with IFF_NO_PI and IFF_VNET_HDR; the header's size is set here.
 */
int vmm_net_attach_stream(vmm_net *net, int fd, int header);
int vmm_net_attach_tap(vmm_net *net, const int *fds, uint32_t n);

/* An eventfd that is signalled when the host end is gone (and was closed): attach another, or do not. */
int vmm_net_lost_fd(vmm_net *net);

/* Tell whoever listens to the machine's messages something about the host end. */
void vmm_net_say(vmm_net *net, const char *text);

/* The cable: pulled (0), or plugged in (1, as it is at first). The link is up while it is in and there is an end. */
void vmm_net_plug(vmm_net *net, int in);
int vmm_net_link(vmm_net *net); /* 1: up */

/*
 * Ask the driver to tell the network where it is now (5.1.6.5.4): once the link is up, if it agreed to be asked; and
 * some times again, half a second in all.
 */
void vmm_net_announce(vmm_net *net);

/* Of one pair of queues; out: from the guest. */
typedef struct vmm_net_counts {
    uint64_t frames_out, bytes_out, frames_in, bytes_in;
    uint64_t dropped_out; /* the link was down, or no frame has such a size */
    uint64_t invalid_out; /* a header that contradicts its frame, or asks for what was not agreed */
    uint64_t dropped_in;  /* no driver, or more than the guest's buffers can ever hold */
    uint64_t invalid_in;
    uint64_t segmented, checksummed; /* done here for a guest that did not agree to it */
    uint64_t starved, full;          /* times that the guest had no buffers; that the host end took no more */
} vmm_net_counts;
int vmm_net_get_counts(vmm_net *net, uint32_t pair, vmm_net_counts *counts); /* -EINVAL: no such pair */

/* cdef: end */

#endif
