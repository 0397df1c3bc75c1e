/* SPDX-License-Identifier: Apache-2.0 */
#include "net/offload.h"

#include <endian.h>
#include <string.h>

enum {
    ETHER_TYPE = 12,
    ETHER_IPV4 = 0x0800,
    ETHER_IPV6 = 0x86dd,
    ETHER_VLAN = 0x8100,
    ETHER_QINQ = 0x88a8,
    VLAN_TAGS_MAX = 2,

    /* RFC 791, RFC 8200, RFC 9293: offsets in the headers */
    IPV4_LENGTH = 2,
    IPV4_ID = 4,
    IPV4_FRAGMENT = 6,
    IPV4_PROTOCOL = 9,
    IPV4_CHECKSUM = 10,
    IPV4_ADDRESSES = 12,
    IPV4_SIZE = 20,
    IPV6_LENGTH = 4,
    IPV6_ADDRESSES = 8,
    IPV6_SIZE = 40,
    TCP_SEQUENCE = 4,
    TCP_OFFSET = 12,
    TCP_FLAGS = 13,
    TCP_CHECKSUM = 16,
    TCP_SIZE = 20,

    TCP_FIN = 0x01,
    TCP_PSH = 0x08,
    TCP_CWR = 0x80,
    PROTOCOL_TCP = 6,
};

static uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static void put16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

/* One's complement sum (RFC 1071), in memory order: the sum of swapped words is the swapped sum. */
static uint64_t sum(const uint8_t *bytes, size_t n, uint64_t so_far)
{
    for (; n >= 8; bytes += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, bytes, 8);
        so_far += word;
        so_far += so_far < word; /* end-around carry */
    }
    uint64_t last = 0;
    memcpy(&last, bytes, n);
    so_far += last;
    return so_far + (so_far < last);
}

/* To 16 bits in memory order, complemented. Zero, which UDP reserves, becomes its equal. */
static uint16_t fold(uint64_t wide)
{
    wide = (wide >> 32) + (wide & 0xffffffff);
    wide = (wide >> 32) + (wide & 0xffffffff);
    uint32_t narrow = (uint32_t)(wide >> 16) + (uint32_t)(wide & 0xffff);
    narrow = (narrow >> 16) + (narrow & 0xffff);
    narrow = (narrow >> 16) + (narrow & 0xffff);
    const uint16_t checksum = (uint16_t)~narrow;
    return checksum ? checksum : 0xffff;
}

unsigned vmm_net_header_needs(const struct vmm_net_header *header)
{
    unsigned needs = header->flags & VMM_HDR_NEEDS_CSUM ? VMM_OFFLOAD_CSUM : 0;
    switch (header->gso_type & ~VMM_GSO_ECN) {
    case VMM_GSO_TCPV4:
        needs |= VMM_OFFLOAD_TSO4;
        break;
    case VMM_GSO_TCPV6:
        needs |= VMM_OFFLOAD_TSO6;
        break;
    }
    return header->gso_type & VMM_GSO_ECN ? needs | VMM_OFFLOAD_ECN : needs;
}

bool vmm_net_header_check(struct vmm_net_header *header, uint32_t size, unsigned offloads)
{
    header->num_buffers = 0;
    header->flags &= VMM_HDR_NEEDS_CSUM | VMM_HDR_DATA_VALID;
    if (header->hdr_len > size)
        header->hdr_len = (uint16_t)size;
    if (header->flags & VMM_HDR_NEEDS_CSUM) {
        /* 32-bit sums: the fields are 16 bits each */
        if (header->csum_start < VMM_FRAME_MIN ||
            (uint32_t)header->csum_start + header->csum_offset + 2 > size)
            return false;
    } else {
        header->csum_start = header->csum_offset = 0;
    }
    if (header->gso_type == VMM_GSO_NONE) {
        header->gso_size = 0;
    } else {
        const uint8_t kind = header->gso_type & (uint8_t)~VMM_GSO_ECN;
        if (kind != VMM_GSO_TCPV4 && kind != VMM_GSO_TCPV6)
            return false;
        if (!(header->flags & VMM_HDR_NEEDS_CSUM) || header->gso_size < VMM_GSO_SIZE_MIN)
            return false;
    }
    return !(vmm_net_header_needs(header) & ~offloads);
}

void vmm_checksum_complete(struct vmm_net_header *header, uint8_t *bytes, uint32_t size)
{
    /* The field holds the pseudo-header's sum already (virtio 1.2, 5.1.6.2). */
    const uint16_t checksum = fold(sum(bytes + header->csum_start, size - header->csum_start, 0));
    memcpy(bytes + header->csum_start + header->csum_offset, &checksum, 2);
    header->flags &= (uint8_t)~VMM_HDR_NEEDS_CSUM;
    header->csum_start = header->csum_offset = 0;
}

bool vmm_segments_begin(struct vmm_segments *segments, const struct vmm_net_header *header,
                        const uint8_t *bytes, uint32_t size)
{
    uint32_t type = ETHER_TYPE;
    for (int tags = 0; tags < VLAN_TAGS_MAX && type + 6 <= size; tags++) {
        const uint16_t tag = get16(bytes + type);
        if (tag != ETHER_VLAN && tag != ETHER_QINQ)
            break;
        type += 4;
    }
    const uint32_t network = type + 2, transport = header->csum_start;
    const bool ipv6 = (header->gso_type & ~VMM_GSO_ECN) == VMM_GSO_TCPV6;
    /* All of it is inside the frame, then: network + a header <= transport, transport + a header <= size. */
    if (transport < network + (ipv6 ? IPV6_SIZE : IPV4_SIZE) || transport + TCP_SIZE > size)
        return false;
    if (header->csum_offset != TCP_CHECKSUM || get16(bytes + type) != (ipv6 ? ETHER_IPV6 : ETHER_IPV4))
        return false;
    const uint8_t *ip = bytes + network;
    if (ip[0] >> 4 != (ipv6 ? 6 : 4))
        return false;
    if (!ipv6 && ((ip[0] & 15u) * 4 != transport - network || ip[IPV4_PROTOCOL] != PROTOCOL_TCP ||
                  (get16(ip + IPV4_FRAGMENT) & 0x3fff)))
        return false;
    const uint32_t payload = transport + (bytes[transport + TCP_OFFSET] >> 4) * 4u;
    /* The payload's offset has 16 bits, and so has the length field of a segment. */
    if (payload < transport + TCP_SIZE || payload >= size || payload > UINT16_MAX ||
        payload - network + header->gso_size > UINT16_MAX)
        return false;
    *segments = (struct vmm_segments){.bytes = bytes,
                                      .size = size,
                                      .network = (uint16_t)network,
                                      .transport = (uint16_t)transport,
                                      .payload = (uint16_t)payload,
                                      .mss = header->gso_size,
                                      .ipv6 = ipv6};
    return true;
}

uint32_t vmm_segments_next(struct vmm_segments *s, uint8_t *to)
{
    const uint32_t left = s->size - s->payload - s->at;
    if (!left)
        return 0;
    const uint32_t n = left < s->mss ? left : s->mss, size = s->payload + n;
    memcpy(to, s->bytes, s->payload);
    memcpy(to + s->payload, s->bytes + s->payload + s->at, n);

    uint8_t *ip = to + s->network, *tcp = to + s->transport;
    const uint16_t segment = (uint16_t)(size - s->transport);
    uint64_t pseudo;
    if (s->ipv6) {
        put16(ip + IPV6_LENGTH, (uint16_t)(size - s->network - IPV6_SIZE));
        pseudo = sum(ip + IPV6_ADDRESSES, 32, 0);
    } else {
        put16(ip + IPV4_LENGTH, (uint16_t)(size - s->network));
        put16(ip + IPV4_ID, (uint16_t)(get16(ip + IPV4_ID) + s->index));
        put16(ip + IPV4_CHECKSUM, 0);
        const uint16_t checksum = fold(sum(ip, s->transport - s->network, 0));
        memcpy(ip + IPV4_CHECKSUM, &checksum, 2);
        pseudo = sum(ip + IPV4_ADDRESSES, 8, 0);
    }
    uint32_t sequence;
    memcpy(&sequence, tcp + TCP_SEQUENCE, 4);
    sequence = htobe32(be32toh(sequence) + s->at);
    memcpy(tcp + TCP_SEQUENCE, &sequence, 4);
    /* RFC 3168, 6.1.2: CWR is said once. The end and the push belong to the last byte. */
    if (s->at)
        tcp[TCP_FLAGS] &= (uint8_t)~TCP_CWR;
    if (n < left)
        tcp[TCP_FLAGS] &= (uint8_t) ~(TCP_FIN | TCP_PSH);
    put16(tcp + TCP_CHECKSUM, 0);
    /* Folded once, so that two small numbers more cannot carry out of it. */
    pseudo = (pseudo >> 32) + (pseudo & 0xffffffff) + htobe16(PROTOCOL_TCP) + htobe16(segment);
    const uint16_t checksum = fold(sum(tcp, segment, pseudo));
    memcpy(tcp + TCP_CHECKSUM, &checksum, 2);
    s->at += n;
    s->index++;
    return size;
}
