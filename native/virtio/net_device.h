/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The network device's files, each above the one before: net_link.c has the host end and the link, net_frames.c moves
 * frames, net_control.c obeys the driver's commands and has it announce itself, net.c is the device.
 */
#ifndef VMM_VIRTIO_NET_DEVICE_H
#define VMM_VIRTIO_NET_DEVICE_H

#include "core/bucket.h"
#include "net/end.h"
#include "net/offload.h"
#include "virtio/net.h"
#include "virtio/virtio.h"

#include <limits.h>

_Static_assert(IOV_MAX >= VMM_END_BATCH && IOV_MAX > VMM_CHAIN_PIECES, "any chain fits a batch");

/* One descriptor of the host end, and what arrives on it. */
struct vmm_net_channel {
    struct vmm_net *net;
    unsigned index;
    struct vmm_source source;
    uint32_t interest; /* what epoll watches for */
    bool starved;      /* a frame waits for the guest's buffers or for a rate limit */
    bool holding;      /* `arrival` was prepared for the guest, and not given to it yet */
    struct vmm_arrival arrival;
    struct vmm_segments segments;
    uint8_t *segment; /* VMM_FRAME_MAX bytes: the segment that is next */
    uint32_t segment_size;
};

/* Frames from one ring on their way to the host end. */
struct vmm_net_batch {
    unsigned n_chains, n_frames, n_iov;
    struct vmm_queue_mark marks[VMM_END_BATCH]; /* before each chain was taken */
    uint8_t chain_of[VMM_END_BATCH];            /* of each frame; a chain without a frame is to be dropped */
    struct vmm_frame frames[VMM_END_BATCH];
    struct iovec iov[IOV_MAX];
};

struct vmm_net {
    struct vmm_virtio virtio;
    unsigned max_pairs, pairs; /* of queues: there, in use */
    unsigned sent, accepted;   /* enum vmm_net_offload: what the guest may send; what it takes */
    uint32_t filter;
    bool plugged;
    bool announcing;    /* the driver is to say where it is, and has not said yet that it does */
    unsigned announces; /* how often it is still to do so, this time included */
    struct vmm_source announce_timer;
    int lost_fd;
    struct vmm_end *end;                                               /* NULL: there is no peer */
    void (*channel_ready)(struct vmm_source *source, uint32_t events); /* of every channel */
    struct vmm_limiter limit_out, limit_in;
    vmm_net_counts counts[VMM_NET_PAIRS_MAX];
    struct vmm_net_channel channels[VMM_NET_PAIRS_MAX];
    struct vmm_net_batch batch;
    struct vmm_chain chains[VMM_QUEUE_SIZE_MAX]; /* taken in this turn; nothing lives in them between two */
};

/* The control queue follows the last pair there may be (5.1.2). */
static inline unsigned vmm_net_control_queue(const struct vmm_net *net)
{
    return vmm_virtio_has(&net->virtio, VMM_NET_F_MQ) ? 2 * net->max_pairs : 2;
}

/* ---- net_link.c ---- */

bool vmm_net_link_up(const struct vmm_net *net);
uint16_t vmm_net_status(const struct vmm_net *net); /* of the configuration space: 5.1.4 */
void vmm_net_show_link(struct vmm_net *net);
/* Have epoll watch for what can be acted upon now. */
void vmm_net_watch(struct vmm_net_channel *channel);
void vmm_net_forget_arrival(struct vmm_net_channel *channel);
/* The host end is gone: no channel of it may be used after this. */
void vmm_net_lose(struct vmm_net *net, int error);
/* Take another host end in place of the one there is. -errno: its descriptors are the caller's again. */
int vmm_net_attach(struct vmm_net *net, struct vmm_end *end);

/* ---- net_frames.c ---- */

void vmm_net_transmit(struct vmm_net *net, unsigned pair);
void vmm_net_receive(struct vmm_net *net, struct vmm_net_channel *channel);
void vmm_net_receive_all(struct vmm_net *net);
void vmm_net_channel_ready(struct vmm_source *source, uint32_t events);
/* A rate limit opens again; `opaque` is the device. */
void vmm_net_limit_out_again(void *opaque);
void vmm_net_limit_in_again(void *opaque);

/* ---- net_control.c ---- */

/* Obey one command, as vmm_virtio_serve calls it. */
uint32_t vmm_net_control(void *opaque, unsigned queue, struct vmm_chain *chain);
/* Offloads that feature bits stand for; without checksums there are none (5.1.3.1). */
unsigned vmm_net_offloads(uint64_t features, bool to_guest);
uint64_t vmm_net_offload_features(void); /* every feature bit that stands for one */
void vmm_net_accept_offloads(struct vmm_net *net, unsigned offloads);

#endif
