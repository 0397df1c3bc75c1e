/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queues of a tap interface: one frame a system call, each after its virtio-net header. The kernel checksums and
 * segments what the guest did not agree to take.
 */
#include "base/error.h"
#include "net/end.h"

#include <errno.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

struct tap_channel {
    bool waiting; /* the frame below was read and not yet taken */
    uint32_t size;
    struct vmm_net_header header;
    uint8_t bytes[VMM_FRAME_MAX];
};

struct tap {
    struct vmm_end end;
    struct tap_channel channels[];
};

static int tap_send(struct vmm_end *end, unsigned channel, struct vmm_frame *frames, unsigned n)
{
    end->full[channel] = false;
    for (unsigned i = 0; i < n; i++) {
        struct vmm_frame *frame = &frames[i];
        frame->iov[0] = (struct iovec){&frame->header, sizeof(frame->header)};
        while (writev(end->fd[channel], frame->iov, (int)frame->n) < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN) {
                end->full[channel] = true;
                return (int)i;
            }
            if (errno == EBADFD)
                return -ENODEV;
            break; /* EIO while the interface is down, EINVAL for what the kernel makes no sense of: lost */
        }
    }
    return (int)n;
}

static int tap_next(struct vmm_end *end, unsigned channel, struct vmm_arrival *arrival)
{
    struct tap_channel *from = &((struct tap *)end)->channels[channel];
    while (!from->waiting) {
        struct iovec iov[] = {{&from->header, sizeof(from->header)}, {from->bytes, sizeof(from->bytes)}};
        const ssize_t n = readv(end->fd[channel], iov, 2);
        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        if (n == 0)
            return -ENODEV;
        from->waiting = n >= (ssize_t)sizeof(from->header) + VMM_FRAME_MIN;
        from->size = (uint32_t)n - sizeof(from->header);
    }
    *arrival = (struct vmm_arrival){.header = from->header, .bytes = from->bytes, .size = from->size};
    return 1;
}

static void tap_taken(struct vmm_end *end, unsigned channel)
{
    ((struct tap *)end)->channels[channel].waiting = false;
}

static void tap_accept(struct vmm_end *end, unsigned offloads)
{
    const struct {
        unsigned offload, flag;
    } flags[] = {{VMM_OFFLOAD_CSUM, TUN_F_CSUM},
                 {VMM_OFFLOAD_TSO4, TUN_F_TSO4},
                 {VMM_OFFLOAD_TSO6, TUN_F_TSO6},
                 {VMM_OFFLOAD_ECN, TUN_F_TSO_ECN}};
    unsigned long arg = 0;
    for (size_t i = 0; i < sizeof(flags) / sizeof(*flags); i++)
        if (offloads & flags[i].offload)
            arg |= flags[i].flag;
    /* A refusal changes nothing: the device segments what the guest does not take. */
    (void)ioctl(end->fd[0], TUNSETOFFLOAD, arg);
}

static void tap_destroy(struct vmm_end *end)
{
    for (unsigned i = 0; i < end->n_channels; i++)
        close(end->fd[i]);
    free(end);
}

static const struct vmm_end_ops tap_ops = {
    .send = tap_send, .next = tap_next, .taken = tap_taken, .accept = tap_accept, .destroy = tap_destroy};

int vmm_tap_end_create(const int *fds, unsigned n, struct vmm_end **out)
{
    if (n < 1 || n > VMM_NET_PAIRS_MAX)
        return vmm_error_set(-EINVAL, "a tap end has 1 to %d queues, not %u", VMM_NET_PAIRS_MAX, n);
    struct tap *tap = calloc(1, sizeof(*tap) + n * sizeof(tap->channels[0]));
    if (!tap)
        return vmm_error_set(-ENOMEM, "allocating a tap end");
    tap->end = (struct vmm_end){.ops = &tap_ops, .n_channels = n};
    memcpy(tap->end.fd, fds, n * sizeof(*fds));
    *out = &tap->end;
    return 0;
}
