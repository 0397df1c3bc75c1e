/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The network device (virtio 1.2, 5.1): queues on one side, a host end (net/end.h) on the other, frames between.
 *
 * All of it runs on the I/O thread, one turn at a time: a turn moves so many frames, then the other sources have
 * theirs. Nothing of the guest's is held between two turns: a frame that cannot go on is given back to its ring (out)
 * or stays in the host end (in), and whoever can help is asked to ring:
 *
 *   the host end takes no more       transmit stops;  EPOLLOUT goes on
 *   the guest has no buffers         receive stops, EPOLLIN is off;  its doorbell goes on
 *   a rate limit                     the same;  its timer goes on
 *
 * A guest that is to announce itself is asked several times, each time once it has said that it does: Linux does so before
 * it takes note that the link came up, and the network may need longer than the guest.
 *
 * A frame that the guest's driver did not agree to take as it is (it lost GUEST_TSO4 in a reboot, the peer on the
 * link did not) is checksummed and segmented here, on the receiving side: the sender cannot know, since
 * the receiver may change its mind while frames are under way.
 */
#include "virtio/net_device.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define BATCH VMM_END_BATCH
#define HEADER sizeof(struct vmm_net_header)
#define TURN_FRAMES 256      /* a queue's worth */
#define TURN_BYTES (1 << 20) /* some 100 us of copying */

static struct vmm_virtqueue *receive_queue(struct vmm_net *net, unsigned pair)
{
    return &net->virtio.queues[2 * pair];
}

static struct vmm_virtqueue *transmit_queue(struct vmm_net *net, unsigned pair)
{
    return &net->virtio.queues[2 * pair + 1];
}

static bool usable(const struct vmm_net *net, const struct vmm_virtqueue *q)
{
    return net->virtio.running && q->enabled;
}

/* ---- from the guest ---- */

/* Make a frame of a chain, or answer false: it is to be dropped. Reads nothing of the frame itself. */
static bool frame_of(struct vmm_net *net, vmm_net_counts *counts, const struct vmm_chain *chain,
                     struct vmm_frame *frame)
{
    if (chain->out_size < HEADER) {
        vmm_virtio_broken(&net->virtio, "a frame to transmit of %u bytes, its header has %u",
                          (unsigned)chain->out_size, (unsigned)HEADER);
        return false;
    }
    if (!vmm_net_link_up(net) || chain->out_size < HEADER + VMM_FRAME_MIN ||
        chain->out_size > HEADER + VMM_FRAME_MAX) {
        counts->dropped_out++;
        return false;
    }
    frame->size = (uint32_t)(chain->out_size - HEADER);
    vmm_chain_read(chain, 0, &frame->header, HEADER);
    frame->header.flags &= (uint8_t)~VMM_HDR_DATA_VALID; /* not the driver's to say (5.1.6.2.1) */
    if (!vmm_net_header_check(&frame->header, frame->size, net->sent)) {
        counts->invalid_out++;
        return false;
    }
    return true;
}

/* Take up to `max` chains. Returns how many. */
static unsigned collect(struct vmm_net *net, unsigned pair, unsigned max)
{
    struct vmm_virtqueue *q = transmit_queue(net, pair);
    struct vmm_net_batch *batch = &net->batch;
    batch->n_chains = batch->n_frames = batch->n_iov = 0;
    while (batch->n_chains < max && batch->n_iov + 1 + VMM_CHAIN_PIECES <= IOV_MAX) {
        struct vmm_chain *chain = &net->chains[batch->n_chains];
        batch->marks[batch->n_chains] = vmm_queue_mark(&q->ring);
        if (!vmm_virtio_pop(&net->virtio, q->index, chain))
            break;
        struct vmm_frame *frame = &batch->frames[batch->n_frames];
        if (frame_of(net, &net->counts[pair], chain, frame)) {
            frame->iov = &batch->iov[batch->n_iov];
            frame->n = 1 + vmm_chain_slice(chain, false, HEADER, frame->size, frame->iov + 1);
            batch->n_iov += frame->n;
            batch->chain_of[batch->n_frames++] = (uint8_t)batch->n_chains;
        }
        batch->n_chains++;
    }
    return net->virtio.running ? batch->n_chains : 0;
}

/* Give the batch to the host end, and to the ring what that does not take. Returns how many chains are done with. */
static unsigned send_batch(struct vmm_net *net, unsigned pair)
{
    struct vmm_virtqueue *q = transmit_queue(net, pair);
    struct vmm_net_batch *batch = &net->batch;
    vmm_net_counts *counts = &net->counts[pair];
    unsigned done = batch->n_chains;
    if (batch->n_frames) {
        int taken =
            net->end->ops->send(net->end, pair % net->end->n_channels, batch->frames, batch->n_frames);
        if (taken < 0) {
            vmm_net_lose(net, taken);
            counts->dropped_out += batch->n_frames;
            taken = 0;
        } else if (taken < (int)batch->n_frames) {
            counts->full++;
            done = batch->chain_of[taken];
            vmm_queue_rewind(&q->ring, batch->marks[done]);
        }
        for (int i = 0; i < taken; i++) {
            counts->frames_out++;
            counts->bytes_out += batch->frames[i].size;
            vmm_limiter_charge(&net->limit_out, batch->frames[i].size);
        }
    }
    for (unsigned i = 0; i < done; i++)
        vmm_queue_push(&q->ring, &net->chains[i], 0);
    return done;
}

static bool full(const struct vmm_net *net, unsigned pair)
{
    return net->end && net->end->full[pair % net->end->n_channels];
}

void vmm_net_transmit(struct vmm_net *net, unsigned pair)
{
    struct vmm_virtqueue *q = transmit_queue(net, pair);
    /* With a limit frames go one by one: what a batch took more would be a burst. */
    const unsigned most = vmm_limiter_limits(&net->limit_out) ? 1 : BATCH;
    unsigned work = 0; /* chains, and looks at the ring: a guest may take back what it offered, for ever */
    bool limited = false;
    if (!usable(net, q) || full(net, pair))
        return;
    do {
        work++;
        vmm_queue_suppress(&q->ring);
        while (work < TURN_FRAMES && !full(net, pair)) {
            limited = !vmm_limiter_open(&net->limit_out);
            if (limited || !collect(net, pair, most))
                break;
            work += send_batch(net, pair);
        }
        if (!net->virtio.running)
            return;
        vmm_virtio_publish(&net->virtio, q->index);
    } while (!limited && !full(net, pair) && work < TURN_FRAMES && vmm_queue_arm(&q->ring));
    if (net->end)
        vmm_net_watch(&net->channels[pair % net->end->n_channels]);
    if (work >= TURN_FRAMES && !full(net, pair))
        vmm_virtqueue_ring(q);
}

/* ---- to the guest ---- */

enum outcome { GIVEN, DROPPED, STARVED };

/*
 * Take buffers for `need` bytes: into net->chains, how many of them into *n. STARVED: they are back in the ring, and
 * a doorbell will ring for the next.
 */
static enum outcome take_buffers(struct vmm_net *net, struct vmm_virtqueue *q, uint64_t need, unsigned *n)
{
    const bool mergeable = vmm_virtio_has(&net->virtio, VMM_NET_F_MRG_RXBUF);
    const struct vmm_queue_mark mark = vmm_queue_mark(&q->ring);
    uint64_t room = 0;
    for (*n = 0; room < need; ++*n) {
        /* More than one buffer only if they may be merged; never more than the ring has: then it can hold no such
         * frame, and whoever waits for it would wait for ever. */
        if (*n == (mergeable ? q->ring.size : 1)) {
            vmm_queue_rewind(&q->ring, mark);
            return DROPPED;
        }
        struct vmm_chain *chain = &net->chains[*n];
        /* Arm while the ring is empty: with buffers in it, that are too few, the driver's next would not ring. */
        if (!vmm_virtio_pop(&net->virtio, q->index, chain) &&
            (!vmm_queue_arm(&q->ring) || !vmm_virtio_pop(&net->virtio, q->index, chain))) {
            if (!net->virtio.running)
                return DROPPED;
            vmm_queue_rewind(&q->ring, mark);
            return STARVED;
        }
        if (chain->in_size < HEADER) {
            vmm_virtio_broken(&net->virtio, "a receive buffer of %u bytes, a header alone has %u",
                              (unsigned)chain->in_size, (unsigned)HEADER);
            return DROPPED;
        }
        room += chain->in_size;
    }
    return GIVEN;
}

static enum outcome give(struct vmm_net *net, unsigned pair, const struct vmm_net_header *header,
                         const uint8_t *bytes, uint32_t size)
{
    struct vmm_virtqueue *q = receive_queue(net, pair);
    unsigned n;
    if (!usable(net, q) || !net->plugged)
        return DROPPED;
    enum outcome outcome = take_buffers(net, q, HEADER + size, &n);
    if (outcome != GIVEN)
        return outcome;
    struct vmm_net_header out = *header;
    out.num_buffers = (uint16_t)n;
    uint32_t given = 0;
    for (unsigned i = 0; i < n; i++) {
        const struct vmm_chain *chain = &net->chains[i];
        const size_t before = i ? 0 : vmm_chain_write(chain, 0, &out, HEADER);
        const size_t written = vmm_chain_write(chain, before, bytes + given, size - given);
        given += (uint32_t)written;
        vmm_queue_push(&q->ring, chain, (uint32_t)(before + written));
    }
    return GIVEN;
}

/* Make what arrived into what the guest takes. false: no frame has such a header. */
static bool prepare(struct vmm_net *net, struct vmm_net_channel *channel, vmm_net_counts *counts)
{
    struct vmm_arrival *arrival = &channel->arrival;
    if (!vmm_net_header_check(&arrival->header, arrival->size, VMM_OFFLOAD_ALL))
        return false;
    const unsigned missing = vmm_net_header_needs(&arrival->header) & ~net->accepted;
    if (missing & ~VMM_OFFLOAD_CSUM) {
        if (!channel->segment && !(channel->segment = malloc(VMM_FRAME_MAX)))
            return false;
        counts->segmented++;
        return vmm_segments_begin(&channel->segments, &arrival->header, arrival->bytes, arrival->size);
    }
    if (missing) {
        counts->checksummed++;
        vmm_checksum_complete(&arrival->header, arrival->bytes, arrival->size);
    }
    if (!(net->accepted & VMM_OFFLOAD_CSUM))
        arrival->header.flags = 0;
    return true;
}

/* One frame, or the segments of one. Returns bytes; 0: none is there, or it waits; -errno: the end is gone. */
static int64_t receive_one(struct vmm_net *net, struct vmm_net_channel *channel)
{
    const unsigned pair = channel->index % net->pairs;
    vmm_net_counts *counts = &net->counts[pair];
    struct vmm_arrival *arrival = &channel->arrival;
    if (!channel->holding) {
        const int got = net->end->ops->next(net->end, channel->index, arrival);
        if (got <= 0)
            return got;
        channel->holding = true;
        channel->segments.bytes = NULL;
        if (!prepare(net, channel, counts)) {
            counts->invalid_in++;
            vmm_net_forget_arrival(channel);
            return arrival->size;
        }
        if (channel->segments.bytes)
            channel->segment_size = vmm_segments_next(&channel->segments, channel->segment);
    }
    static const struct vmm_net_header plain;
    enum outcome outcome;
    do {
        const bool cut = channel->segments.bytes;
        const uint32_t size = cut ? channel->segment_size : arrival->size;
        if (!vmm_limiter_open(&net->limit_in)) {
            channel->starved = true;
            return 0;
        }
        outcome = cut ? give(net, pair, &plain, channel->segment, size)
                      : give(net, pair, &arrival->header, arrival->bytes, size);
        if (!channel->holding) /* the guest broke a rule, and the device stopped: nothing is held for it */
            return arrival->size;
        if (outcome == STARVED) {
            counts->starved++;
            channel->starved = true;
            return 0;
        }
        if (outcome == GIVEN) {
            counts->frames_in++;
            counts->bytes_in += size;
            vmm_limiter_charge(&net->limit_in, size);
        } else {
            counts->dropped_in++;
        }
        channel->segment_size = cut ? vmm_segments_next(&channel->segments, channel->segment) : 0;
    } while (channel->segment_size);
    vmm_net_forget_arrival(channel);
    return arrival->size;
}

void vmm_net_receive(struct vmm_net *net, struct vmm_net_channel *channel)
{
    struct vmm_virtqueue *q = receive_queue(net, channel->index % net->pairs);
    unsigned frames = 0;
    int64_t bytes = 0, got = 0;
    channel->starved = false;
    if (usable(net, q))
        vmm_queue_suppress(&q->ring);
    for (; frames < TURN_FRAMES && bytes < TURN_BYTES; frames++, bytes += got) {
        got = receive_one(net, channel);
        if (got <= 0)
            break;
    }
    if (net->virtio.running)
        vmm_virtio_publish(&net->virtio, q->index);
    if (got < 0) {
        vmm_net_lose(net, (int)got);
        return;
    }
    vmm_net_watch(channel);
    /* What was read already does not make the descriptor readable again. */
    if (got > 0)
        vmm_virtqueue_ring(q);
}

/* ---- events ---- */

static bool hung_up(int fd)
{
    struct pollfd poll_fd = {.fd = fd};
    return poll(&poll_fd, 1, 0) == 1 && poll_fd.revents & (POLLHUP | POLLERR);
}

void vmm_net_channel_ready(struct vmm_source *source, uint32_t events)
{
    struct vmm_net_channel *channel = source->opaque;
    struct vmm_net *net = channel->net;
    VMM_VIRTIO_LOCKED(&net->virtio);
    /* Another thread may have put another end in its place: what is said of it here is asked again below. */
    if (!net->end || channel->index >= net->end->n_channels)
        return;
    if (events & EPOLLOUT) {
        const int rc = net->end->ops->send(net->end, channel->index, NULL, 0);
        if (rc < 0) {
            vmm_net_lose(net, rc);
            return;
        }
        for (unsigned pair = channel->index; net->end && pair < net->max_pairs; pair += net->end->n_channels)
            vmm_net_transmit(net, pair);
        if (net->end)
            vmm_net_watch(channel);
    }
    if (net->end && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        vmm_net_receive(net, channel);
    /* EPOLLHUP cannot be switched off: what waits for a guest without buffers goes with the peer. */
    if (net->end && events & (EPOLLHUP | EPOLLERR) && channel->starved &&
        hung_up(net->end->fd[channel->index]))
        vmm_net_lose(net, -ECONNRESET);
}

void vmm_net_receive_all(struct vmm_net *net)
{
    for (unsigned i = 0; net->end && i < net->end->n_channels; i++)
        vmm_net_receive(net, &net->channels[i]);
}

void vmm_net_limit_out_again(void *opaque)
{
    struct vmm_net *net = opaque;
    VMM_VIRTIO_LOCKED(&net->virtio);
    for (unsigned pair = 0; pair < net->max_pairs; pair++)
        vmm_net_transmit(net, pair);
}

void vmm_net_limit_in_again(void *opaque)
{
    struct vmm_net *net = opaque;
    VMM_VIRTIO_LOCKED(&net->virtio);
    vmm_net_receive_all(net);
}
