/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole device against a guest that does anything, for libFuzzer: an input is the rings' flavour and then a schedule
 * of steps. The rings are those of driver.h; the steps here are any device's, each target has its own beside them.
 */
#ifndef VMM_FUZZ_DRIVEN_H
#define VMM_FUZZ_DRIVEN_H

#include "driver.h"

struct input {
    const uint8_t *at, *end;
};

static inline uint64_t take(struct input *in, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && in->at < in->end; i++)
        value |= (uint64_t)*in->at++ << 8 * i;
    return value;
}

/* Where buffers lie: 16 places of 256 bytes from here, which guest_fills; or near the ends of memory. */
#define BUFFERS 0x200000ull

static inline struct piece take_piece(struct input *in, bool inward, uint32_t longest)
{
    static const uint64_t edges[] = {MACHINE_RAM - 16, MACHINE_RAM - 4096, MACHINE_HIGH, ~0ull - 15};
    static const uint32_t sizes[] = {0,  1,   2,   4,    16,   43,   44,    45,
                                     64, 100, 256, 1024, 4096, 8192, 65536, 1u << 20};
    const uint8_t where = (uint8_t)take(in, 1), how = (uint8_t)take(in, 1);
    const uint64_t gpa = where & 0x80 ? edges[where & 3] : BUFFERS + (where & 15) * 256 + (where >> 4 & 7);
    const uint32_t size = how & 0x40 ? (uint32_t)take(in, 3) : sizes[how & 15];
    return (struct piece){gpa, size < longest ? size : longest, inward ^ (how >> 7)};
}

/* A buffer on a queue that the device fills (inward) or empties, of one to four pieces; mostly as it should be. */
static inline void guest_offers(struct driver *d, unsigned queue, bool inward, uint32_t longest,
                                struct input *in)
{
    struct piece pieces[4];
    const unsigned n = 1 + (take(in, 1) & 3);
    for (unsigned i = 0; i < n; i++)
        pieces[i] = take_piece(in, inward, longest);
    if (ring_offer(&d->ring[queue], pieces, n) >= 0)
        vmm_virtqueue_ring(&d->dev->queues[queue]);
}

static inline void guest_fills(struct driver *d, struct input *in)
{
    const uint64_t at = BUFFERS + take(in, 2) % 0x1000;
    const unsigned n = 1 + (take(in, 1) & 63);
    uint8_t *bytes = machine_at(d->ring[0].vm, at, n);
    for (unsigned i = 0; i < n; i++)
        bytes[i] = (uint8_t)take(in, 1);
}

/* Two bytes of a ring, whichever they are. */
static inline void guest_scribbles(struct driver *d, unsigned queue, struct input *in)
{
    const uint64_t at = (take(in, 1) % 3) * 0x1000 + take(in, 1) * 2;
    const uint16_t value = (uint16_t)take(in, 2);
    memcpy(machine_at(d->ring[0].vm, d->ring[queue].desc + at, 2), &value, 2);
    vmm_virtqueue_ring(&d->dev->queues[queue]);
}

static inline void guest_configures(struct driver *d, struct input *in)
{
    VMM_VIRTIO_LOCKED(d->dev);
    const uint64_t offset = take(in, 1) & 31;
    const uint32_t size = 1u << (take(in, 1) & 3);
    vmm_virtio_config_write(d->dev, offset, size, take(in, 4));
}

/* Buffers come back while the guest leaves its rings alone; afterwards nothing in them needs to make sense. */
static inline void doorbells(struct driver *d)
{
    for (unsigned round = 0; round < 4; round++)
        for (uint32_t i = 0; i < d->dev->n_queues; i++)
            driver_source(&d->dev->queues[i].source, EPOLLIN);
}

static inline uint32_t take_flavour(struct input *in)
{
    return (uint32_t)take(in, 1) & (VMM_QUEUE_INDIRECT | VMM_QUEUE_EVENT_IDX | VMM_QUEUE_PACKED);
}

#endif
