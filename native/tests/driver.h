/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A driver of a whole device, over ring.h, for tests and fuzzers: it negotiates, owns a ring for each queue, counts
 * interrupts. The machine's I/O thread is parked, and what it would do is done by driver_turn: a test decides when.
 *
 *     driver_start(&driver, vm, vmm_rng_virtio(rng), features, VMM_QUEUE_EVENT_IDX);
 *     driver_offer(&driver, 0, (struct piece[]){IN(0x5000, 64)}, 1);
 *     driver_turn(&driver);
 *     CHECK(driver_collect(&driver, 0, &written));
 */
#ifndef VMM_TESTS_DRIVER_H
#define VMM_TESTS_DRIVER_H

#include "ring.h"
#include "virtio/virtio.h"

#include <poll.h>
#include <sys/epoll.h>

#define DRIVER_QUEUES 8
#define DRIVER_RINGS 0x100000ull /* guest-physical; a ring each 64 KiB */

struct driver {
    vmm_virtio *dev;
    struct ring ring[DRIVER_QUEUES];
    unsigned interrupts[DRIVER_QUEUES], config_interrupts;
};

static inline void driver_queue_interrupt(void *opaque, unsigned queue)
{
    ((struct driver *)opaque)->interrupts[queue]++;
}
static inline void driver_config_interrupt(void *opaque)
{
    ((struct driver *)opaque)->config_interrupts++;
}
static inline void driver_doorbells(void *opaque, bool on)
{
    (void)opaque;
    (void)on;
}
static inline void driver_reset(void *opaque)
{
    (void)opaque;
}

/* From reset to DRIVER_OK. `flavour`: enum vmm_queue_features. Every ring is whole and empty. */
static inline void driver_start(struct driver *d, vmm_vm *vm, vmm_virtio *dev, uint64_t features,
                                uint32_t flavour)
{
    static const struct vmm_virtio_transport transport = {driver_queue_interrupt, driver_config_interrupt,
                                                          driver_doorbells, driver_reset};
    *d = (struct driver){.dev = dev};
    if (!dev->transport)
        vmm_loop_pause(dev->loop);
    dev->transport = &transport;
    dev->transport_opaque = d;
    features |= VMM_F_VERSION_1 | (flavour & VMM_QUEUE_INDIRECT ? VMM_F_INDIRECT_DESC : 0) |
                (flavour & VMM_QUEUE_EVENT_IDX ? VMM_F_EVENT_IDX : 0) |
                (flavour & VMM_QUEUE_PACKED ? VMM_F_RING_PACKED : 0);
    VMM_VIRTIO_LOCKED(dev);
    vmm_virtio_write_status(dev, 0);
    vmm_virtio_write_status(dev, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER);
    vmm_virtio_driver_features(dev, 0, (uint32_t)features);
    vmm_virtio_driver_features(dev, 1, (uint32_t)(features >> 32));
    vmm_virtio_write_status(dev, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER | VMM_STATUS_FEATURES_OK);
    CHECK(dev->status & VMM_STATUS_FEATURES_OK);
    CHECK(dev->n_queues <= DRIVER_QUEUES);
    for (uint32_t i = 0; i < dev->n_queues; i++) {
        struct ring *ring = &d->ring[i];
        struct vmm_virtqueue *q = vmm_virtio_queue(dev, i);
        ring_init(ring, vm, DRIVER_RINGS + i * 0x10000, q->size_max, flavour);
        const uint64_t areas[3] = {ring->desc, ring->driver, ring->device};
        vmm_virtqueue_size(q, ring->size);
        for (int area = 0; area < 3; area++) {
            vmm_virtqueue_area(q, (enum vmm_queue_area)area, false, (uint32_t)areas[area]);
            vmm_virtqueue_area(q, (enum vmm_queue_area)area, true, (uint32_t)(areas[area] >> 32));
        }
        vmm_virtqueue_enable(q);
        CHECK(q->enabled);
    }
    vmm_virtio_write_status(dev, dev->status | VMM_STATUS_DRIVER_OK);
    CHECK(dev->running);
}

/* What the I/O thread would do for one source. true: there was something. */
static inline bool driver_source(struct vmm_source *source, uint32_t events)
{
    struct pollfd fd = {.fd = source->fd, .events = (short)events};
    if (!source->live || poll(&fd, 1, 0) <= 0)
        return false;
    source->ready(source, (uint32_t)fd.revents);
    return true;
}

/* Every doorbell that rang is answered, and those that ring meanwhile. Bounded: a device that rings for ever fails. */
static inline void driver_turn(struct driver *d)
{
    bool more = true;
    for (unsigned rounds = 0; more; rounds++) {
        CHECK(rounds < 100000);
        more = false;
        for (uint32_t i = 0; i < d->dev->n_queues; i++)
            more |= driver_source(&d->dev->queues[i].source, EPOLLIN);
    }
}

/* Offer a chain, and ring the doorbell if the device wants that. Answers its id. */
static inline int driver_offer(struct driver *d, unsigned queue, const struct piece *pieces, unsigned n)
{
    const int id = ring_offer(&d->ring[queue], pieces, n);
    CHECK(id >= 0);
    if (ring_doorbell(&d->ring[queue]))
        vmm_virtqueue_ring(&d->dev->queues[queue]);
    return id;
}

/* Take a used buffer back. */
static inline bool driver_collect(struct driver *d, unsigned queue, uint32_t *written)
{
    int id;
    return ring_collect(&d->ring[queue], &id, written);
}

#endif
