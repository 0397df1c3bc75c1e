/* SPDX-License-Identifier: Apache-2.0 */
/* The control queue (virtio 1.2, 5.1.6.5), offloads, and announcements after migration. */
#include "virtio/net_device.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define ANNOUNCE_AGAIN_NS                                                                                    \
    50000000 /* after the first announcement; each wait is so much longer than the last */

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
    vmm_net_receive_all(net); /* what waited for buffers of one queue may go to another now */
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
    const uint16_t status = vmm_net_status(net);
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
    vmm_net_show_link(net);
}

static const struct {
    uint8_t from_guest, to_guest, offload; /* feature bits; enum vmm_net_offload */
} offload_features[] = {{VMM_NET_F_CSUM, VMM_NET_F_GUEST_CSUM, VMM_OFFLOAD_CSUM},
                        {VMM_NET_F_HOST_TSO4, VMM_NET_F_GUEST_TSO4, VMM_OFFLOAD_TSO4},
                        {VMM_NET_F_HOST_TSO6, VMM_NET_F_GUEST_TSO6, VMM_OFFLOAD_TSO6},
                        {VMM_NET_F_HOST_ECN, VMM_NET_F_GUEST_ECN, VMM_OFFLOAD_ECN}};
#define N_OFFLOADS (sizeof(offload_features) / sizeof(*offload_features))

/* Offloads that feature bits stand for; without checksums there are none (5.1.3.1). */
unsigned vmm_net_offloads(uint64_t features, bool to_guest)
{
    unsigned offloads = 0;
    for (size_t i = 0; i < N_OFFLOADS; i++)
        if (features >> (to_guest ? offload_features[i].to_guest : offload_features[i].from_guest) & 1)
            offloads |= offload_features[i].offload;
    return offloads & VMM_OFFLOAD_CSUM ? offloads : 0;
}

void vmm_net_accept_offloads(struct vmm_net *net, unsigned offloads)
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
    vmm_net_accept_offloads(net, vmm_net_offloads(features, true));
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

uint32_t vmm_net_control(void *opaque, unsigned queue, struct vmm_chain *chain)
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

uint64_t vmm_net_offload_features(void)
{
    uint64_t features = 0;
    for (size_t i = 0; i < N_OFFLOADS; i++)
        features |= 1ull << offload_features[i].from_guest | 1ull << offload_features[i].to_guest;
    return features;
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
    vmm_net_show_link(net);
}
