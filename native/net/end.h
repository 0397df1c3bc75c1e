/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's end of a network device: where its frames go to and come from. A passive thing: the device watches
 * the descriptors and calls the ops, with its lock held; no op blocks, none touches guest memory after it returned.
 *
 * An end has one channel (a descriptor) or as many as the device has queue pairs.
 */
#ifndef VMM_NET_END_H
#define VMM_NET_END_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define VMM_NET_PAIRS_MAX 8 /* more than one I/O thread can feed */

/* Ethernet header, IPv6 header and the largest payload it can announce, with room for two VLAN tags. */
#define VMM_FRAME_MAX (14 + 8 + 40 + 65535)
#define VMM_FRAME_MIN 14

#define VMM_END_BATCH                                                                                        \
    64 /* frames in one call: a system call costs as much as copying some twenty small ones */

/* Precedes every frame in a ring, on a tap and on a link (virtio 1.2, 5.1.6; little-endian, as the host is). */
struct vmm_net_header {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
_Static_assert(sizeof(struct vmm_net_header) == 12, "the header of virtio 1.2 has 12 bytes");

enum vmm_net_header_flags { VMM_HDR_NEEDS_CSUM = 1, VMM_HDR_DATA_VALID = 2 };
enum vmm_net_gso { VMM_GSO_NONE = 0, VMM_GSO_TCPV4 = 1, VMM_GSO_TCPV6 = 4, VMM_GSO_ECN = 0x80 };

/* What whoever takes frames is content with beyond plain ones. */
enum vmm_net_offload {
    VMM_OFFLOAD_CSUM = 1,
    VMM_OFFLOAD_TSO4 = 2,
    VMM_OFFLOAD_TSO6 = 4,
    VMM_OFFLOAD_ECN = 8
};
#define VMM_OFFLOAD_ALL 15u

/* A frame on its way out. Its pieces are guest memory, which may change at any moment: to be moved, not read. */
struct vmm_frame {
    struct vmm_net_header header;
    uint32_t size;     /* bytes of all pieces but the first */
    uint32_t n;        /* pieces, with the first */
    struct iovec *iov; /* iov[0] is the end's, for what goes before the frame */
};

/* A frame on its way in: whole, in the end's own memory, unchanged until taken. */
struct vmm_arrival {
    struct vmm_net_header header; /* zero from an end without headers; as hostile as the peer otherwise */
    uint8_t *bytes;
    uint32_t size; /* VMM_FRAME_MIN .. VMM_FRAME_MAX */
};

struct vmm_end {
    const struct vmm_end_ops *ops;
    unsigned n_channels;
    int fd[VMM_NET_PAIRS_MAX];    /* the end's own, non-blocking */
    bool full[VMM_NET_PAIRS_MAX]; /* takes no more: call send again after EPOLLOUT, if with no frame */
};

struct vmm_end_ops {
    /*
     * Take up to VMM_END_BATCH frames, the oldest first; the iov of all of them are one array without gaps, of at
     * most IOV_MAX.
     * Returns how many were taken, which is fewer only when full. -errno: the peer is gone.
     */
    int (*send)(struct vmm_end *end, unsigned channel, struct vmm_frame *frames, unsigned n);
    /* The oldest frame that was not taken: 1; 0: none until EPOLLIN; -errno: the peer is gone, or no such peer. */
    int (*next)(struct vmm_end *end, unsigned channel, struct vmm_arrival *arrival);
    void (*taken)(struct vmm_end *end, unsigned channel);
    /* What the guest accepts from now on. NULL: the end cannot do anything about it. */
    void (*accept)(struct vmm_end *end, unsigned offloads);
    void (*destroy)(struct vmm_end *end); /* closes the descriptors */
};

/*
 * Frames on a stream socket, each after its length (32 bits, big-endian): passt, QEMU's `-netdev stream`. With
 * `header`, the length counts a virtio-net header before the frame: the link between two of our machines.
 */
int vmm_stream_end_create(int fd, bool header, struct vmm_end **out);

/* Queues of one tap interface: IFF_NO_PI | IFF_VNET_HDR, a 12-byte header. */
int vmm_tap_end_create(const int *fds, unsigned n, struct vmm_end **out);

#endif
