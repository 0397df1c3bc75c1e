/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames on a stream socket. One system call moves as many as there are, which is what makes small frames cheap
 * here: a socket that keeps message boundaries costs the kernel a buffer, a wake-up and a call for each.
 *
 * What arrives goes through a buffer of ours. It is copied once more than if it were read into the guest's memory,
 * but its length is known before a guest buffer is taken, its header is checked where nobody can change it, and a
 * frame that waits for guest buffers, or is being segmented, stays where it is.
 */
#include "base/error.h"
#include "net/end.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PREFIX_MAX (4 + sizeof(struct vmm_net_header))

/* Several small frames, or one large with the beginning of the next; about what a socket holds. */
#define ARRIVED_SIZE (256 * 1024)
_Static_assert(ARRIVED_SIZE >= 2 * (PREFIX_MAX + VMM_FRAME_MAX),
               "a frame always fits behind a part of another");

struct prefix {
    uint32_t length; /* big-endian */
    struct vmm_net_header header;
};
_Static_assert(sizeof(struct prefix) == PREFIX_MAX, "a prefix goes out as it is");

struct stream {
    struct vmm_end end;
    uint32_t prefix_size;
    struct prefix prefixes[VMM_END_BATCH];
    /* The rest of a frame that the socket took a part of: goes before any other. */
    size_t rest_at, rest_size;
    uint8_t rest[PREFIX_MAX + VMM_FRAME_MAX];
    /* arrived[at, filled) was read and not yet taken. */
    size_t at, filled;
    uint8_t arrived[ARRIVED_SIZE];
};

/* Bytes the socket took; 0: it is full; -errno: the peer is gone. */
static ssize_t write_some(struct stream *stream, struct iovec *iov, size_t n)
{
    const struct msghdr message = {.msg_iov = iov, .msg_iovlen = n};
    for (;;) {
        const ssize_t written = sendmsg(stream->end.fd[0], &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (written >= 0)
            return written;
        if (errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
}

/* Keep what of a frame follows its first `done` bytes, so that it is the guest's no more. */
static void keep_rest(struct stream *stream, const struct vmm_frame *frame, size_t done)
{
    stream->rest_at = stream->rest_size = 0;
    for (unsigned i = 0; i < frame->n; i++) {
        const struct iovec *piece = &frame->iov[i];
        if (done >= piece->iov_len) {
            done -= piece->iov_len;
            continue;
        }
        const size_t n = piece->iov_len - done;
        memcpy(stream->rest + stream->rest_size, (const uint8_t *)piece->iov_base + done, n);
        stream->rest_size += n;
        done = 0;
    }
}

static int stream_send(struct vmm_end *end, unsigned channel, struct vmm_frame *frames, unsigned n)
{
    struct stream *stream = (struct stream *)end;
    (void)channel;
    while (stream->rest_at < stream->rest_size) {
        struct iovec rest = {stream->rest + stream->rest_at, stream->rest_size - stream->rest_at};
        const ssize_t written = write_some(stream, &rest, 1);
        if (written <= 0)
            return (int)written;
        stream->rest_at += (size_t)written;
    }
    assert(n <= VMM_END_BATCH);
    end->full[0] = false;
    if (!n)
        return 0;
    size_t pieces = 0;
    for (unsigned i = 0; i < n; i++) {
        struct prefix *prefix = &stream->prefixes[i];
        prefix->length = htobe32(stream->prefix_size - 4 + frames[i].size);
        prefix->header = frames[i].header;
        frames[i].iov[0] = (struct iovec){prefix, stream->prefix_size};
        pieces += frames[i].n;
    }
    const ssize_t written = write_some(stream, frames[0].iov, pieces);
    if (written < 0)
        return (int)written;
    size_t left = (size_t)written;
    unsigned taken = 0;
    for (; taken < n && left >= stream->prefix_size + frames[taken].size; taken++)
        left -= stream->prefix_size + frames[taken].size;
    end->full[0] = taken < n;
    if (left)
        keep_rest(stream, &frames[taken++], left);
    return (int)taken;
}

/* Read what there is. 1: something; 0: nothing; -errno: the peer is gone. */
static int read_some(struct stream *stream)
{
    if (stream->at == stream->filled) {
        stream->at = stream->filled = 0;
    } else if (sizeof(stream->arrived) - stream->at < PREFIX_MAX + VMM_FRAME_MAX) {
        memmove(stream->arrived, stream->arrived + stream->at, stream->filled - stream->at);
        stream->filled -= stream->at;
        stream->at = 0;
    }
    const ssize_t n = recv(stream->end.fd[0], stream->arrived + stream->filled,
                           sizeof(stream->arrived) - stream->filled, MSG_DONTWAIT);
    if (n > 0) {
        stream->filled += (size_t)n;
        return 1;
    }
    if (n == 0)
        return -ECONNRESET;
    return errno == EAGAIN || errno == EINTR ? 0 : -errno;
}

/* The length of the frame at the front with its prefix; 0: not known yet; -EPROTO: no frame has this length. */
static int64_t front_length(const struct stream *stream)
{
    uint32_t length;
    if (stream->filled - stream->at < sizeof(length))
        return 0;
    memcpy(&length, stream->arrived + stream->at, sizeof(length));
    length = be32toh(length);
    const uint32_t header = stream->prefix_size - 4;
    if (length < header + VMM_FRAME_MIN || length > header + VMM_FRAME_MAX)
        return -EPROTO;
    return (int64_t)length + 4;
}

static int stream_next(struct vmm_end *end, unsigned channel, struct vmm_arrival *arrival)
{
    struct stream *stream = (struct stream *)end;
    (void)channel;
    for (;;) {
        const int64_t length = front_length(stream);
        if (length < 0)
            return (int)length;
        if (length && stream->filled - stream->at >= (size_t)length) {
            uint8_t *front = stream->arrived + stream->at;
            *arrival = (struct vmm_arrival){.bytes = front + stream->prefix_size,
                                            .size = (uint32_t)length - stream->prefix_size};
            memcpy(&arrival->header, front + 4, stream->prefix_size - 4);
            return 1;
        }
        const int got = read_some(stream);
        if (got <= 0)
            return got;
    }
}

static void stream_taken(struct vmm_end *end, unsigned channel)
{
    struct stream *stream = (struct stream *)end;
    (void)channel;
    stream->at += (size_t)front_length(stream);
}

static void stream_destroy(struct vmm_end *end)
{
    if (end->n_channels)
        close(end->fd[0]);
    free(end);
}

static const struct vmm_end_ops stream_ops = {
    .send = stream_send, .next = stream_next, .taken = stream_taken, .destroy = stream_destroy};

int vmm_stream_end_create(int fd, bool header, struct vmm_end **out)
{
    struct stream *stream = malloc(sizeof(*stream)); /* its buffers are written before they are read */
    if (!stream)
        return vmm_error_set(-ENOMEM, "allocating a stream end");
    stream->end = (struct vmm_end){.ops = &stream_ops, .n_channels = 1, .fd = {fd}};
    stream->prefix_size = header ? PREFIX_MAX : 4;
    stream->rest_at = stream->rest_size = 0;
    stream->at = stream->filled = 0;
    *out = &stream->end;
    return 0;
}
