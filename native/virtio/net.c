/* SPDX-License-Identifier: Apache-2.0 */
/* The network device (virtio 1.2, 5.1): its life, and what the monitor does with it. */
#include "virtio/net_device.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void net_start(void *opaque)
{
    struct vmm_net *net = opaque;
    net->sent = vmm_net_offloads(net->virtio.agreed, false);
    vmm_net_accept_offloads(net, vmm_net_offloads(net->virtio.agreed, true));
}

static void net_kick(void *opaque, uint32_t queue)
{
    struct vmm_net *net = opaque;
    const unsigned pair = queue / 2;
    if (queue == vmm_net_control_queue(net)) {
        vmm_virtio_serve(&net->virtio, queue, vmm_net_control);
    } else if (queue > vmm_net_control_queue(net)) {
        return;
    } else if (queue & 1) {
        vmm_net_transmit(net, pair);
    } else {
        for (unsigned i = pair; net->end && i < net->end->n_channels; i += net->pairs)
            vmm_net_receive(net, &net->channels[i]);
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
    vmm_net_show_link(net);
    vmm_net_accept_offloads(net, 0);
    for (unsigned i = 0; net->end && i < net->end->n_channels; i++) {
        vmm_net_forget_arrival(&net->channels[i]);
        net->channels[i].starved = false;
        vmm_net_watch(&net->channels[i]);
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
    if (own[OWN_ACCEPTED] & ~vmm_net_offloads(net->virtio.agreed, true) || own[OWN_FILTER] & ~3ull)
        return vmm_error_set(-EINVAL, "%s: offloads %#llx, receive modes %#llx", net->virtio.name,
                             (unsigned long long)own[OWN_ACCEPTED], (unsigned long long)own[OWN_FILTER]);
    if (own[OWN_ANNOUNCES] > (vmm_virtio_has(&net->virtio, VMM_NET_F_GUEST_ANNOUNCE) ? VMM_NET_ANNOUNCES : 0))
        return vmm_error_set(-EINVAL, "%s: %llu announcements", net->virtio.name,
                             (unsigned long long)own[OWN_ANNOUNCES]);
    net->announces = (unsigned)own[OWN_ANNOUNCES];
    net->announcing = net->announces > 0; /* also where its timer was to say so */
    net->pairs = (unsigned)own[OWN_PAIRS];
    net->filter = (uint32_t)own[OWN_FILTER];
    vmm_net_accept_offloads(net, (unsigned)own[OWN_ACCEPTED]);
    return 0;
}

static void net_resumed(void *opaque)
{
    vmm_net_show_link(opaque);
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
        features |= 1ull << VMM_NET_F_CTRL_GUEST_OFFLOADS | vmm_net_offload_features();
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
    net->channel_ready = vmm_net_channel_ready;
    for (unsigned i = 0; i < VMM_NET_PAIRS_MAX; i++)
        net->channels[i] = (struct vmm_net_channel){.net = net, .index = i};
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
    rc = vmm_limiter_init(&net->limit_out, net->virtio.loop, config->bps, config->pps,
                          vmm_net_limit_out_again, net);
    return rc < 0 ? rc
                  : vmm_limiter_init(&net->limit_in, net->virtio.loop, config->bps, config->pps,
                                     vmm_net_limit_in_again, net);
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
    return vmm_net_attach(net, end);
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
    const int size = sizeof(struct vmm_net_header);
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
    vmm_net_show_link(net);
}

int vmm_net_link(vmm_net *net)
{
    VMM_VIRTIO_LOCKED(&net->virtio);
    return vmm_net_link_up(net);
}

int vmm_net_get_counts(vmm_net *net, uint32_t pair, vmm_net_counts *counts)
{
    VMM_VIRTIO_LOCKED(&net->virtio);
    if (pair >= net->max_pairs)
        return vmm_error_set(-EINVAL, "%s has %u pairs of queues", net->virtio.name, net->max_pairs);
    *counts = net->counts[pair];
    return 0;
}
