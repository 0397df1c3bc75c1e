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
#include "virtio/net.h"
#include "core/bucket.h"
#include "net/offload.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define BATCH VMM_END_BATCH
#define TURN_FRAMES 256      /* a queue's worth */
#define TURN_BYTES (1 << 20) /* some 100 us of copying */
#define ANNOUNCE_AGAIN_NS                                                                                    \
    50000000 /* after the first announcement; each wait is so much longer than the last */
#define HEADER sizeof(struct vmm_net_header)
_Static_assert(IOV_MAX >= BATCH && IOV_MAX > VMM_CHAIN_PIECES, "any chain fits a batch");

/* One descriptor of the host end, and what arrives on it. */
struct channel {
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
struct batch {
    unsigned n_chains, n_frames, n_iov;
    struct vmm_queue_mark marks[BATCH]; /* before each chain was taken */
    uint8_t chain_of[BATCH];            /* of each frame; a chain without a frame is to be dropped */
    struct vmm_frame frames[BATCH];
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
    struct vmm_end *end; /* NULL: there is no peer */
    struct vmm_limiter limit_out, limit_in;
    vmm_net_counts counts[VMM_NET_PAIRS_MAX];
    struct channel channels[VMM_NET_PAIRS_MAX];
    struct batch batch;
    struct vmm_chain chains[VMM_QUEUE_SIZE_MAX]; /* taken in this turn; nothing lives in them between two */
};

static struct vmm_virtqueue *receive_queue(struct vmm_net *net, unsigned pair)
{
    return &net->virtio.queues[2 * pair];
}

static struct vmm_virtqueue *transmit_queue(struct vmm_net *net, unsigned pair)
{
    return &net->virtio.queues[2 * pair + 1];
}

/* The control queue follows the last pair there may be (5.1.2). */
static unsigned control_queue(const struct vmm_net *net)
{
    return vmm_virtio_has(&net->virtio, VMM_NET_F_MQ) ? 2 * net->max_pairs : 2;
}

static bool usable(const struct vmm_net *net, const struct vmm_virtqueue *q)
{
    return net->virtio.running && q->enabled;
}

/* ---- the host end, and the link ---- */

static bool link_up(const struct vmm_net *net)
{
    return net->plugged && net->end;
}

/* To be announced is what others can hear: what is asked while the link is down is shown when it comes up. */
static uint16_t status_of(const struct vmm_net *net)
{
    if (!link_up(net))
        return 0;
    return net->announcing ? VMM_NET_S_LINK_UP | VMM_NET_S_ANNOUNCE : VMM_NET_S_LINK_UP;
}

static void show_link(struct vmm_net *net)
{
    const uint16_t status = status_of(net);
    vmm_virtio_set_config(&net->virtio, offsetof(struct vmm_net_space, status), &status, sizeof(status));
}

static void watch(struct channel *channel)
{
    struct vmm_net *net = channel->net;
    const uint32_t interest =
        (channel->starved ? 0 : EPOLLIN) | (net->end->full[channel->index] ? EPOLLOUT : 0);
    if (interest != channel->interest && vmm_loop_modify(net->virtio.loop, &channel->source, interest) == 0)
        channel->interest = interest;
}

static void forget_arrival(struct channel *channel)
{
    if (channel->holding)
        channel->net->end->ops->taken(channel->net->end, channel->index);
    channel->holding = false;
    channel->segments.bytes = NULL;
}

static void detach(struct vmm_net *net)
{
    struct vmm_end *end = net->end;
    if (!end)
        return;
    for (unsigned i = 0; i < end->n_channels; i++) {
        vmm_loop_remove(net->virtio.loop, &net->channels[i].source);
        forget_arrival(&net->channels[i]);
    }
    net->end = NULL;
    end->ops->destroy(end);
}

/* No channel of it may be used after this. */
static void lose(struct vmm_net *net, int error)
{
    detach(net);
    show_link(net);
    vmm_vm_say(net->virtio.vm, "%s: its host end is gone (%s); the link is down", net->virtio.name,
               strerror(-error));
    eventfd_write(net->lost_fd, 1);
}

static void channel_ready(struct vmm_source *source, uint32_t events);

static int attach(struct vmm_net *net, struct vmm_end *end)
{
    detach(net);
    net->end = end;
    for (unsigned i = 0; i < end->n_channels; i++) {
        struct channel *channel = &net->channels[i];
        channel->source = (struct vmm_source){.fd = end->fd[i], .ready = channel_ready, .opaque = channel};
        channel->interest = EPOLLIN;
        channel->starved = false;
        int rc = vmm_loop_add(net->virtio.loop, &channel->source, EPOLLIN);
        if (rc < 0) {
            for (unsigned k = 0; k < i; k++)
                vmm_loop_remove(net->virtio.loop, &net->channels[k].source);
            end->n_channels = 0; /* the descriptors are the caller's again */
            detach(net);
            show_link(net);
            return rc;
        }
    }
    if (end->ops->accept)
        end->ops->accept(end, net->accepted);
    show_link(net);
    return 0;
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
    if (!link_up(net) || chain->out_size < HEADER + VMM_FRAME_MIN ||
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

/* Take up to `max` chains. Answers how many. */
static unsigned collect(struct vmm_net *net, unsigned pair, unsigned max)
{
    struct vmm_virtqueue *q = transmit_queue(net, pair);
    struct batch *batch = &net->batch;
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

/* Give the batch to the host end, and to the ring what that does not take. Answers how many chains are done with. */
static unsigned send_batch(struct vmm_net *net, unsigned pair)
{
    struct vmm_virtqueue *q = transmit_queue(net, pair);
    struct batch *batch = &net->batch;
    vmm_net_counts *counts = &net->counts[pair];
    unsigned done = batch->n_chains;
    if (batch->n_frames) {
        int taken =
            net->end->ops->send(net->end, pair % net->end->n_channels, batch->frames, batch->n_frames);
        if (taken < 0) {
            lose(net, taken);
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

static void transmit(struct vmm_net *net, unsigned pair)
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
        watch(&net->channels[pair % net->end->n_channels]);
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
static bool prepare(struct vmm_net *net, struct channel *channel, vmm_net_counts *counts)
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

/* One frame, or the segments of one. Answers bytes; 0: none is there, or it waits; -errno: the end is gone. */
static int64_t receive_one(struct vmm_net *net, struct channel *channel)
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
            forget_arrival(channel);
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
    forget_arrival(channel);
    return arrival->size;
}

static void receive(struct vmm_net *net, struct channel *channel)
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
        lose(net, (int)got);
        return;
    }
    watch(channel);
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

static void channel_ready(struct vmm_source *source, uint32_t events)
{
    struct channel *channel = source->opaque;
    struct vmm_net *net = channel->net;
    VMM_VIRTIO_LOCKED(&net->virtio);
    /* Another thread may have put another end in its place: what is said of it here is asked again below. */
    if (!net->end || channel->index >= net->end->n_channels)
        return;
    if (events & EPOLLOUT) {
        const int rc = net->end->ops->send(net->end, channel->index, NULL, 0);
        if (rc < 0) {
            lose(net, rc);
            return;
        }
        for (unsigned pair = channel->index; net->end && pair < net->max_pairs; pair += net->end->n_channels)
            transmit(net, pair);
        if (net->end)
            watch(channel);
    }
    if (net->end && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        receive(net, channel);
    /* EPOLLHUP cannot be switched off: what waits for a guest without buffers goes with the peer. */
    if (net->end && events & (EPOLLHUP | EPOLLERR) && channel->starved &&
        hung_up(net->end->fd[channel->index]))
        lose(net, -ECONNRESET);
}

static void receive_all(struct vmm_net *net)
{
    for (unsigned i = 0; net->end && i < net->end->n_channels; i++)
        receive(net, &net->channels[i]);
}

static void limit_out_again(void *opaque)
{
    struct vmm_net *net = opaque;
    VMM_VIRTIO_LOCKED(&net->virtio);
    for (unsigned pair = 0; pair < net->max_pairs; pair++)
        transmit(net, pair);
}

static void limit_in_again(void *opaque)
{
    struct vmm_net *net = opaque;
    VMM_VIRTIO_LOCKED(&net->virtio);
    receive_all(net);
}

/* ---- the control queue (5.1.6.5) ---- */

struct command {
    uint8_t class, number, feature;
    uint8_t size; /* of its argument; 0: it varies */
    bool (*obey)(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument);
};

#define ARGUMENT 2 /* where it begins in the chain, after class and command */

/*
 * Nothing is filtered: a device may pass on more than it was asked for (5.1.6.5.1, 5.1.6.5.2), and on a link between
 * two, what arrives is for whom it arrives at. The modes are remembered for a look at the device, and to be restored.
 */
static bool set_filter(struct vmm_net *net, unsigned bit, uint8_t on)
{
    net->filter = (net->filter & ~(1u << bit)) | (uint32_t)(on & 1) << bit;
    return on <= 1;
}

static bool set_promiscuous(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument)
{
    (void)chain;
    return set_filter(net, VMM_CTRL_RX_PROMISC, argument[0]);
}

static bool set_all_multicast(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument)
{
    (void)chain;
    return set_filter(net, VMM_CTRL_RX_ALLMULTI, argument[0]);
}

/* Two lists of addresses, each after its length in 32 bits: right, or refused. */
static bool set_mac_table(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument)
{
    (void)net;
    (void)argument;
    uint64_t at = ARGUMENT;
    for (int list = 0; list < 2; list++) {
        uint32_t n;
        if (vmm_chain_read(chain, at, &n, sizeof(n)) != sizeof(n))
            return false;
        at += sizeof(n) + 6ull * n;
        if (at > chain->out_size)
            return false;
    }
    return at == chain->out_size;
}

static bool set_mac(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument)
{
    (void)chain;
    /* The driver knows: no new generation, no interrupt. */
    memcpy(net->virtio.config + offsetof(struct vmm_net_space, mac), argument, 6);
    return true;
}

static bool set_pairs(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument)
{
    (void)chain;
    uint16_t pairs;
    memcpy(&pairs, argument, sizeof(pairs));
    if (pairs < 1 || pairs > net->max_pairs)
        return false;
    net->pairs = pairs;
    receive_all(net); /* what waited for buffers of one queue may go to another now */
    return true;
}

/* The bit goes before the command is answered (5.1.6.5.4.2). The driver knows: no new generation, no interrupt. */
static bool acknowledge_announce(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument)
{
    (void)argument;
    if (chain->out_size != ARGUMENT)
        return false;
    if (!net->announcing)
        return true;
    net->announcing = false;
    const uint16_t status = status_of(net);
    memcpy(net->virtio.config + offsetof(struct vmm_net_space, status), &status, sizeof(status));
    if (--net->announces && net->announce_timer.fd >= 0) {
        const struct itimerspec at = {.it_value.tv_nsec =
                                          (long)(VMM_NET_ANNOUNCES - net->announces) * ANNOUNCE_AGAIN_NS};
        timerfd_settime(net->announce_timer.fd, 0, &at, NULL);
    }
    return true;
}

static void announce_again(struct vmm_source *source, uint32_t events)
{
    struct vmm_net *net = source->opaque;
    uint64_t times;
    (void)events;
    VMM_VIRTIO_LOCKED(&net->virtio);
    if (read(source->fd, &times, sizeof(times)) != sizeof(times) || !net->announces)
        return; /* set anew in between; another driver */
    net->announcing = true;
    show_link(net);
}

static const struct {
    uint8_t from_guest, to_guest, offload; /* feature bits; enum vmm_net_offload */
} offload_features[] = {{VMM_NET_F_CSUM, VMM_NET_F_GUEST_CSUM, VMM_OFFLOAD_CSUM},
                        {VMM_NET_F_HOST_TSO4, VMM_NET_F_GUEST_TSO4, VMM_OFFLOAD_TSO4},
                        {VMM_NET_F_HOST_TSO6, VMM_NET_F_GUEST_TSO6, VMM_OFFLOAD_TSO6},
                        {VMM_NET_F_HOST_ECN, VMM_NET_F_GUEST_ECN, VMM_OFFLOAD_ECN}};
#define N_OFFLOADS (sizeof(offload_features) / sizeof(*offload_features))

/* Offloads that feature bits stand for; without checksums there are none (5.1.3.1). */
static unsigned offloads_of(uint64_t features, bool to_guest)
{
    unsigned offloads = 0;
    for (size_t i = 0; i < N_OFFLOADS; i++)
        if (features >> (to_guest ? offload_features[i].to_guest : offload_features[i].from_guest) & 1)
            offloads |= offload_features[i].offload;
    return offloads & VMM_OFFLOAD_CSUM ? offloads : 0;
}

static void accept_offloads(struct vmm_net *net, unsigned offloads)
{
    net->accepted = offloads;
    if (net->end && net->end->ops->accept)
        net->end->ops->accept(net->end, offloads);
}

static bool set_offloads(struct vmm_net *net, const struct vmm_chain *chain, const uint8_t *argument)
{
    (void)chain;
    uint64_t features, possible = 0;
    memcpy(&features, argument, sizeof(features));
    for (size_t i = 0; i < N_OFFLOADS; i++)
        possible |= 1ull << offload_features[i].to_guest;
    if (features & ~(possible & net->virtio.agreed))
        return false;
    accept_offloads(net, offloads_of(features, true));
    return true;
}

static const struct command commands[] = {
    {VMM_CTRL_RX, VMM_CTRL_RX_PROMISC, VMM_NET_F_CTRL_RX, 1, set_promiscuous},
    {VMM_CTRL_RX, VMM_CTRL_RX_ALLMULTI, VMM_NET_F_CTRL_RX, 1, set_all_multicast},
    {VMM_CTRL_MAC, VMM_CTRL_MAC_TABLE_SET, VMM_NET_F_CTRL_RX, 0, set_mac_table},
    {VMM_CTRL_MAC, VMM_CTRL_MAC_ADDR_SET, VMM_NET_F_CTRL_MAC_ADDR, 6, set_mac},
    {VMM_CTRL_ANNOUNCE, VMM_CTRL_ANNOUNCE_ACK, VMM_NET_F_GUEST_ANNOUNCE, 0, acknowledge_announce},
    {VMM_CTRL_MQ, VMM_CTRL_MQ_PAIRS_SET, VMM_NET_F_MQ, 2, set_pairs},
    {VMM_CTRL_OFFLOADS, VMM_CTRL_OFFLOADS_SET, VMM_NET_F_CTRL_GUEST_OFFLOADS, 8, set_offloads},
};

static bool obey(struct vmm_net *net, const struct vmm_chain *chain)
{
    uint8_t words[ARGUMENT + 8] = {0};
    vmm_chain_read(chain, 0, words, sizeof(words));
    for (size_t i = 0; i < sizeof(commands) / sizeof(*commands); i++) {
        const struct command *command = &commands[i];
        if (command->class != words[0] || command->number != words[1])
            continue;
        return vmm_virtio_has(&net->virtio, command->feature) &&
               (!command->size || chain->out_size == (uint64_t)ARGUMENT + command->size) &&
               command->obey(net, chain, words + ARGUMENT);
    }
    return false;
}

static uint32_t control(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    (void)queue;
    struct vmm_net *net = opaque;
    if (chain->out_size < ARGUMENT || chain->in_size < 1) {
        vmm_virtio_broken(&net->virtio, "a control command of %u bytes, with %u for the answer",
                          (unsigned)chain->out_size, (unsigned)chain->in_size);
        return 0;
    }
    const uint8_t ack = obey(net, chain) ? VMM_CTRL_OK : VMM_CTRL_ERROR;
    return (uint32_t)vmm_chain_write(chain, 0, &ack, sizeof(ack));
}

/* ---- the device ---- */

static void net_start(void *opaque)
{
    struct vmm_net *net = opaque;
    net->sent = offloads_of(net->virtio.agreed, false);
    accept_offloads(net, offloads_of(net->virtio.agreed, true));
}

static void net_kick(void *opaque, uint32_t queue)
{
    struct vmm_net *net = opaque;
    const unsigned pair = queue / 2;
    if (queue == control_queue(net)) {
        vmm_virtio_serve(&net->virtio, queue, control);
    } else if (queue > control_queue(net)) {
        return;
    } else if (queue & 1) {
        transmit(net, pair);
    } else {
        for (unsigned i = pair; net->end && i < net->end->n_channels; i += net->pairs)
            receive(net, &net->channels[i]);
    }
}

/* Whatever arrives until the next driver is ready is nobody's. */
static void net_stop(void *opaque)
{
    struct vmm_net *net = opaque;
    net->pairs = 1;
    net->sent = net->filter = 0;
    net->announcing = false;
    net->announces = 0;
    show_link(net);
    accept_offloads(net, 0);
    for (unsigned i = 0; net->end && i < net->end->n_channels; i++) {
        forget_arrival(&net->channels[i]);
        net->channels[i].starved = false;
        watch(&net->channels[i]);
    }
}

/* What the driver asked for on the control queue; its address is in the configuration. */
enum own { OWN_PAIRS, OWN_ACCEPTED, OWN_FILTER, OWN_ANNOUNCES };

static void net_save(void *opaque, uint64_t *own)
{
    const struct vmm_net *net = opaque;
    own[OWN_PAIRS] = net->pairs;
    own[OWN_ACCEPTED] = net->accepted;
    own[OWN_FILTER] = net->filter;
    own[OWN_ANNOUNCES] = net->announces;
}

static int net_load(void *opaque, const uint64_t *own)
{
    struct vmm_net *net = opaque;
    const unsigned most = vmm_virtio_has(&net->virtio, VMM_NET_F_MQ) ? net->max_pairs : 1;
    if (own[OWN_PAIRS] < 1 || own[OWN_PAIRS] > most)
        return vmm_error_set(-EINVAL, "%s: %llu pairs of queues in use of %u", net->virtio.name,
                             (unsigned long long)own[OWN_PAIRS], most);
    if (own[OWN_ACCEPTED] & ~offloads_of(net->virtio.agreed, true) || own[OWN_FILTER] & ~3ull)
        return vmm_error_set(-EINVAL, "%s: offloads %#llx, receive modes %#llx", net->virtio.name,
                             (unsigned long long)own[OWN_ACCEPTED], (unsigned long long)own[OWN_FILTER]);
    if (own[OWN_ANNOUNCES] > (vmm_virtio_has(&net->virtio, VMM_NET_F_GUEST_ANNOUNCE) ? VMM_NET_ANNOUNCES : 0))
        return vmm_error_set(-EINVAL, "%s: %llu announcements", net->virtio.name,
                             (unsigned long long)own[OWN_ANNOUNCES]);
    net->announces = (unsigned)own[OWN_ANNOUNCES];
    net->announcing = net->announces > 0; /* also where its timer was to say so */
    net->pairs = (unsigned)own[OWN_PAIRS];
    net->filter = (uint32_t)own[OWN_FILTER];
    accept_offloads(net, (unsigned)own[OWN_ACCEPTED]);
    return 0;
}

static void net_resumed(void *opaque)
{
    show_link(opaque);
}

static const vmm_virtio_ops net_ops = {.start = net_start,
                                       .kick = net_kick,
                                       .stop = net_stop,
                                       .save = net_save,
                                       .load = net_load,
                                       .resumed = net_resumed};

static uint64_t features_of(const vmm_net_config *config)
{
    uint64_t features = 1ull << VMM_NET_F_MAC | 1ull << VMM_NET_F_STATUS | 1ull << VMM_NET_F_MRG_RXBUF |
                        1ull << VMM_NET_F_CTRL_VQ | 1ull << VMM_NET_F_CTRL_RX |
                        1ull << VMM_NET_F_CTRL_MAC_ADDR | 1ull << VMM_NET_F_GUEST_ANNOUNCE;
    if (config->mtu)
        features |= 1ull << VMM_NET_F_MTU;
    if (config->pairs > 1)
        features |= 1ull << VMM_NET_F_MQ;
    if (config->offloads) {
        features |= 1ull << VMM_NET_F_CTRL_GUEST_OFFLOADS;
        for (size_t i = 0; i < N_OFFLOADS; i++)
            features |= 1ull << offload_features[i].from_guest | 1ull << offload_features[i].to_guest;
    }
    return features;
}

static int net_init(struct vmm_net *net, vmm_vm *vm, const char *name, const vmm_net_config *config)
{
    uint16_t sizes[2 * VMM_NET_PAIRS_MAX + 1];
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
        sizes[i] = VMM_NET_QUEUE_SIZE;
    net->max_pairs = config->pairs;
    net->pairs = 1;
    net->plugged = true;
    for (unsigned i = 0; i < VMM_NET_PAIRS_MAX; i++)
        net->channels[i] = (struct channel){.net = net, .index = i};
    int rc = vmm_virtio_init(&net->virtio, vm, &net_ops, net, VMM_NET_DEVICE_ID, name, features_of(config),
                             2u * config->pairs + 1, sizes, sizeof(struct vmm_net_space));
    if (rc < 0)
        return rc;
    struct vmm_net_space space = {.max_pairs = config->pairs, .mtu = config->mtu};
    memcpy(space.mac, config->mac, sizeof(space.mac));
    memcpy(net->virtio.config, &space, sizeof(space));
    net->lost_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (net->lost_fd < 0)
        return vmm_error_errno("eventfd for a lost link");
    rc = vmm_limiter_init(&net->limit_out, net->virtio.loop, config->bps, config->pps, limit_out_again, net);
    return rc < 0 ? rc
                  : vmm_limiter_init(&net->limit_in, net->virtio.loop, config->bps, config->pps,
                                     limit_in_again, net);
}

int vmm_net_create(vmm_vm *vm, const char *name, const vmm_net_config *config, vmm_net **out)
{
    if (config->pairs < 1 || config->pairs > VMM_NET_PAIRS_MAX)
        return vmm_error_set(-EINVAL, "%s: %u pairs of queues, 1 to %d are possible", name, config->pairs,
                             VMM_NET_PAIRS_MAX);
    struct vmm_net *net = calloc(1, sizeof(*net));
    if (!net)
        return vmm_error_set(-ENOMEM, "%s", name);
    net->lost_fd = net->announce_timer.fd = -1;
    int rc = net_init(net, vm, name, config);
    if (rc < 0) {
        vmm_net_destroy(net);
        return rc;
    }
    *out = net;
    return 0;
}

void vmm_net_destroy(vmm_net *net)
{
    if (!net)
        return;
    if (net->end)
        net->end->ops->destroy(net->end);
    if (net->lost_fd >= 0)
        close(net->lost_fd);
    if (net->announce_timer.fd >= 0)
        close(net->announce_timer.fd);
    vmm_limiter_deinit(&net->limit_out);
    vmm_limiter_deinit(&net->limit_in);
    for (unsigned i = 0; i < VMM_NET_PAIRS_MAX; i++)
        free(net->channels[i].segment);
    vmm_virtio_deinit(&net->virtio);
    free(net);
}

vmm_virtio *vmm_net_virtio(vmm_net *net)
{
    return &net->virtio;
}

/* ---- from Python ---- */

static int unblock(int fd)
{
    const int flags = fcntl(fd, F_GETFL);
    return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? vmm_error_errno("O_NONBLOCK") : 0;
}

static int attach_locked(vmm_net *net, struct vmm_end *end)
{
    VMM_VIRTIO_LOCKED(&net->virtio);
    return attach(net, end);
}

int vmm_net_attach_stream(vmm_net *net, int fd, int header)
{
    struct vmm_end *end;
    int rc = unblock(fd);
    if (rc == 0)
        rc = vmm_stream_end_create(fd, header, &end);
    return rc < 0 ? rc : attach_locked(net, end);
}

int vmm_net_attach_tap(vmm_net *net, const int *fds, uint32_t n)
{
    struct vmm_end *end;
    const int size = HEADER;
    int rc = 0;
    for (uint32_t i = 0; i < n && rc == 0; i++)
        rc = ioctl(fds[i], TUNSETVNETHDRSZ, &size) < 0 ? vmm_error_errno("TUNSETVNETHDRSZ") : unblock(fds[i]);
    if (rc == 0)
        rc = vmm_tap_end_create(fds, n, &end);
    return rc < 0 ? rc : attach_locked(net, end);
}

int vmm_net_lost_fd(vmm_net *net)
{
    return net->lost_fd;
}

void vmm_net_say(vmm_net *net, const char *text)
{
    vmm_vm_say(net->virtio.vm, "%s", text);
}

void vmm_net_plug(vmm_net *net, int in)
{
    VMM_VIRTIO_LOCKED(&net->virtio);
    net->plugged = in;
    show_link(net);
}

/* Few are ever asked. Without it they are asked once. */
static void make_timer(vmm_net *net)
{
    if (net->announce_timer.fd >= 0)
        return;
    const int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    net->announce_timer = (struct vmm_source){.fd = fd, .ready = announce_again, .opaque = net};
    if (fd >= 0 && vmm_loop_add(net->virtio.loop, &net->announce_timer, EPOLLIN) < 0) {
        close(fd);
        net->announce_timer.fd = -1;
    }
}

void vmm_net_announce(vmm_net *net)
{
    VMM_VIRTIO_LOCKED(&net->virtio);
    if (!net->virtio.running || !vmm_virtio_has(&net->virtio, VMM_NET_F_GUEST_ANNOUNCE))
        return;
    make_timer(net);
    net->announces = VMM_NET_ANNOUNCES;
    net->announcing = true;
    show_link(net);
}

int vmm_net_link(vmm_net *net)
{
    VMM_VIRTIO_LOCKED(&net->virtio);
    return link_up(net);
}

int vmm_net_get_counts(vmm_net *net, uint32_t pair, vmm_net_counts *counts)
{
    VMM_VIRTIO_LOCKED(&net->virtio);
    if (pair >= net->max_pairs)
        return vmm_error_set(-EINVAL, "%s has %u pairs of queues", net->virtio.name, net->max_pairs);
    *counts = net->counts[pair];
    return 0;
}
