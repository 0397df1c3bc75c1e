/* SPDX-License-Identifier: Apache-2.0 */
/* Checksums and TCP segmentation in software, for a guest that did not agree to take them over. */
#ifndef VMM_NET_OFFLOAD_H
#define VMM_NET_OFFLOAD_H

#include "net/end.h"

/* Linux's TCP_MIN_MSS is 88, tap takes less: below this a frame would become thousands. */
#define VMM_GSO_SIZE_MIN 48

/*
 * Is this header one that a frame of `size` bytes may have towards who accepts `offloads`? Everything in it that is
 * acted on is inside the frame afterwards; hdr_len, which is a hint, is made so. Bits without a meaning here go.
 */
bool vmm_net_header_check(struct vmm_net_header *header, uint32_t size, unsigned offloads);

/* What the frame asks of its receiver. */
unsigned vmm_net_header_needs(const struct vmm_net_header *header);

/* Complete the checksum that a checked header leaves to the receiver. */
void vmm_checksum_complete(struct vmm_net_header *header, uint8_t *bytes, uint32_t size);

/* A TCP frame being cut into segments. */
struct vmm_segments {
    const uint8_t
        *bytes;        /* the large frame; stays until the last segment was made. NULL: none is being cut */
    uint32_t size, at; /* at: payload bytes cut off so far */
    uint16_t network, transport, payload, mss; /* offsets of the headers and the payload */
    uint16_t index;
    bool ipv6;
};

/* Begin with a frame whose checked header asks for segmentation. false: it is no such TCP frame. */
bool vmm_segments_begin(struct vmm_segments *segments, const struct vmm_net_header *header,
                        const uint8_t *bytes, uint32_t size);
/* The next segment into `to` (VMM_FRAME_MAX bytes), complete with checksums. Returns its size; 0: that was all. */
uint32_t vmm_segments_next(struct vmm_segments *segments, uint8_t *to);

#endif
