/* SPDX-License-Identifier: Apache-2.0 */
/* The network device's host end, and whether the link is up. */
#include "virtio/net_device.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

bool vmm_net_link_up(const struct vmm_net *net)
{
    return net->plugged && net->end;
}

/* To be announced is what others can hear: what is asked while the link is down is shown when it comes up. */
uint16_t vmm_net_status(const struct vmm_net *net)
{
    if (!vmm_net_link_up(net))
        return 0;
    return net->announcing ? VMM_NET_S_LINK_UP | VMM_NET_S_ANNOUNCE : VMM_NET_S_LINK_UP;
}

void vmm_net_show_link(struct vmm_net *net)
{
    const uint16_t status = vmm_net_status(net);
    vmm_virtio_set_config(&net->virtio, offsetof(struct vmm_net_space, status), &status, sizeof(status));
}

void vmm_net_watch(struct vmm_net_channel *channel)
{
    struct vmm_net *net = channel->net;
    const uint32_t interest =
        (channel->starved ? 0 : EPOLLIN) | (net->end->full[channel->index] ? EPOLLOUT : 0);
    if (interest != channel->interest && vmm_loop_modify(net->virtio.loop, &channel->source, interest) == 0)
        channel->interest = interest;
}

void vmm_net_forget_arrival(struct vmm_net_channel *channel)
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
        vmm_net_forget_arrival(&net->channels[i]);
    }
    net->end = NULL;
    end->ops->destroy(end);
}

/* No channel of it may be used after this. */
void vmm_net_lose(struct vmm_net *net, int error)
{
    detach(net);
    vmm_net_show_link(net);
    vmm_vm_say(net->virtio.vm, "%s: its host end is gone (%s); the link is down", net->virtio.name,
               strerror(-error));
    eventfd_write(net->lost_fd, 1);
}

int vmm_net_attach(struct vmm_net *net, struct vmm_end *end)
{
    detach(net);
    net->end = end;
    for (unsigned i = 0; i < end->n_channels; i++) {
        struct vmm_net_channel *channel = &net->channels[i];
        channel->source =
            (struct vmm_source){.fd = end->fd[i], .ready = net->channel_ready, .opaque = channel};
        channel->interest = EPOLLIN;
        channel->starved = false;
        int rc = vmm_loop_add(net->virtio.loop, &channel->source, EPOLLIN);
        if (rc < 0) {
            for (unsigned k = 0; k < i; k++)
                vmm_loop_remove(net->virtio.loop, &net->channels[k].source);
            end->n_channels = 0; /* the descriptors are the caller's again */
            detach(net);
            vmm_net_show_link(net);
            return rc;
        }
    }
    if (end->ops->accept)
        end->ops->accept(end, net->accepted);
    vmm_net_show_link(net);
    return 0;
}
