/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-net's numbers (virtio 1.2, 5.1). */
#ifndef VMM_VIRTIO_NET_H
#define VMM_VIRTIO_NET_H

#include "net/end.h"
#include "virtio/virtio.h"
#include "vmmnet.h"

#define VMM_NET_DEVICE_ID 1
#define VMM_NET_QUEUE_SIZE VMM_QUEUE_SIZE_MAX

/* Bits of the feature word (5.1.3). */
enum vmm_net_feature {
    VMM_NET_F_CSUM = 0,
    VMM_NET_F_GUEST_CSUM = 1,
    VMM_NET_F_CTRL_GUEST_OFFLOADS = 2,
    VMM_NET_F_MTU = 3,
    VMM_NET_F_MAC = 5,
    VMM_NET_F_GUEST_TSO4 = 7,
    VMM_NET_F_GUEST_TSO6 = 8,
    VMM_NET_F_GUEST_ECN = 9,
    VMM_NET_F_HOST_TSO4 = 11,
    VMM_NET_F_HOST_TSO6 = 12,
    VMM_NET_F_HOST_ECN = 13,
    VMM_NET_F_MRG_RXBUF = 15,
    VMM_NET_F_STATUS = 16,
    VMM_NET_F_CTRL_VQ = 17,
    VMM_NET_F_CTRL_RX = 18,
    VMM_NET_F_GUEST_ANNOUNCE = 21,
    VMM_NET_F_MQ = 22,
    VMM_NET_F_CTRL_MAC_ADDR = 23,
};

/* Configuration space (5.1.4). */
struct vmm_net_space {
    uint8_t mac[6];
    uint16_t status; /* enum vmm_net_status */
    uint16_t max_pairs, mtu;
};
#define VMM_NET_ANNOUNCES 5 /* so often a guest announces itself */
enum vmm_net_status { VMM_NET_S_LINK_UP = 1, VMM_NET_S_ANNOUNCE = 2 };
_Static_assert(sizeof(struct vmm_net_space) == 12, "5.1.4, up to mtu");

/* Commands on the control queue: class, command (5.1.6.5). */
enum vmm_net_class {
    VMM_CTRL_RX = 0,
    VMM_CTRL_MAC = 1,
    VMM_CTRL_ANNOUNCE = 3,
    VMM_CTRL_MQ = 4,
    VMM_CTRL_OFFLOADS = 5
};
enum vmm_net_command {
    VMM_CTRL_RX_PROMISC = 0,
    VMM_CTRL_RX_ALLMULTI = 1,
    VMM_CTRL_MAC_TABLE_SET = 0,
    VMM_CTRL_MAC_ADDR_SET = 1,
    VMM_CTRL_ANNOUNCE_ACK = 0,
    VMM_CTRL_MQ_PAIRS_SET = 0,
    VMM_CTRL_OFFLOADS_SET = 0,
};
enum vmm_net_ack { VMM_CTRL_OK = 0, VMM_CTRL_ERROR = 1 };

#endif
