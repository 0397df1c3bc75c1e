/* SPDX-License-Identifier: Apache-2.0 */
/* A virtio-blk device with a driver in front of it that has no transport: for tests of the device's data path. */
#ifndef VMM_TESTS_BLK_GUEST_H
#define VMM_TESTS_BLK_GUEST_H

#include "disk/disk.h"
#include "ring.h"
#include "virtio/blk.h"
#include "virtio/virtio.h"

#include <poll.h>
#include <time.h>

#define GUEST_QUEUES 4
#define GUEST_DATA 0x100000ull /* buffers; below: rings, headers, tables */

struct guest {
    vmm_vm *vm;
    vmm_blk *blk;
    vmm_virtio *dev;
    struct ring rings[GUEST_QUEUES];
    unsigned n_queues;
    _Atomic unsigned config_interrupts, queue_interrupts;
    unsigned said;
    char text[200];
    uint64_t headers; /* gpa of the next header; status bytes lie in its page's upper half */
};

static void guest_queue_interrupt(void *opaque, unsigned queue)
{
    (void)queue;
    ((struct guest *)opaque)->queue_interrupts++;
}
static void guest_config_interrupt(void *opaque)
{
    ((struct guest *)opaque)->config_interrupts++;
}
static void guest_ignore(void *opaque)
{
    (void)opaque;
}
static void guest_ignore_doorbells(void *opaque, bool on)
{
    (void)opaque;
    (void)on;
}
static void guest_say(void *opaque, const char *text)
{
    struct guest *g = opaque;
    g->said++;
    snprintf(g->text, sizeof(g->text), "%s", text);
}

static inline void guest_create(struct guest *g, vmm_disk *disk, const vmm_blk_options *options)
{
    static const struct vmm_virtio_transport transport = {.queue_interrupt = guest_queue_interrupt,
                                                          .config_interrupt = guest_config_interrupt,
                                                          .doorbells = guest_ignore_doorbells,
                                                          .reset = guest_ignore};
    *g = (struct guest){.vm = machine_create(), .n_queues = options->queues};
    vmm_vm_on_message(g->vm, guest_say, g);
    CHECK_EQUAL(vmm_blk_create(g->vm, "virtio-blk0", "test.img", disk, options, &g->blk), 0);
    g->dev = vmm_blk_virtio(g->blk);
    g->dev->transport = &transport;
    g->dev->transport_opaque = g;
}

/* Bring it up as a driver does (virtio 1.2, 3.1.1), with these of the features it offers. */
static inline void guest_start(struct guest *g, uint64_t features, uint16_t size)
{
    VMM_VIRTIO_LOCKED(g->dev);
    const uint64_t agreed = (features & g->dev->offered) | VMM_F_VERSION_1;
    const uint8_t ok = VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER | VMM_STATUS_FEATURES_OK;
    const uint32_t ring_features = (agreed & VMM_F_INDIRECT_DESC ? VMM_QUEUE_INDIRECT : 0) |
                                   (agreed & VMM_F_EVENT_IDX ? VMM_QUEUE_EVENT_IDX : 0) |
                                   (agreed & VMM_F_RING_PACKED ? VMM_QUEUE_PACKED : 0);
    vmm_virtio_write_status(g->dev, 0);
    vmm_virtio_write_status(g->dev, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER);
    vmm_virtio_driver_features(g->dev, 0, (uint32_t)agreed);
    vmm_virtio_driver_features(g->dev, 1, (uint32_t)(agreed >> 32));
    vmm_virtio_write_status(g->dev, ok);
    CHECK(g->dev->status & VMM_STATUS_FEATURES_OK);
    for (unsigned i = 0; i < g->n_queues; i++) {
        ring_init(&g->rings[i], g->vm, 0x10000 * (i + 1), size, ring_features);
        ring_give(&g->rings[i], &g->dev->queues[i].ring);
        vmm_virtqueue_enable(&g->dev->queues[i]);
    }
    g->headers = 0x80000;
    vmm_virtio_write_status(g->dev, ok | VMM_STATUS_DRIVER_OK);
    CHECK(g->dev->running);
}

static inline void guest_destroy(struct guest *g)
{
    vmm_virtio_reset(g->dev);
    vmm_vm_destroy(g->vm);
    vmm_blk_destroy(g->blk);
}

/* One of 64 headers with its status byte, filled. Answers the header's address; the status is 2 KiB further. */
#define GUEST_STATUS 2048
static inline uint64_t guest_header(struct guest *g, uint32_t type, uint64_t sector)
{
    const uint64_t at = g->headers;
    g->headers = at == 0x80000 + 63 * 16 ? 0x80000 : at + 16;
    const struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header = {type, 0, sector};
    memcpy(machine_at(g->vm, at, 16), &header, 16);
    *(uint8_t *)machine_at(g->vm, at + GUEST_STATUS, 1) = 0xff;
    return at;
}

static inline void guest_ring(struct guest *g, unsigned queue)
{
    if (ring_doorbell(&g->rings[queue]))
        vmm_virtqueue_ring(&g->dev->queues[queue]);
}

/* Wait for the next used buffer. */
static inline uint32_t guest_wait(struct guest *g, unsigned queue, int *id)
{
    uint32_t written;
    int any;
    for (int i = 0; i < 20 * PATIENCE_MS; i++) {
        if (ring_collect(&g->rings[queue], id ? id : &any, &written))
            return written;
        const struct timespec pause = {.tv_nsec = 50000};
        nanosleep(&pause, NULL);
    }
    CHECK(!"the device answered");
    return 0;
}

/* One request with `size` bytes at GUEST_DATA, read or written by the device. Answers its status. */
static inline uint8_t guest_request(struct guest *g, uint32_t type, uint64_t sector, uint32_t size, bool in)
{
    const uint64_t header = guest_header(g, type, sector);
    const struct piece pieces[] = {OUT(header, 16), {GUEST_DATA, size, in}, IN(header + GUEST_STATUS, 1)};
    const struct piece bare[] = {OUT(header, 16), IN(header + GUEST_STATUS, 1)};
    ring_offer(&g->rings[0], size ? pieces : bare, size ? 3 : 2);
    guest_ring(g, 0);
    guest_wait(g, 0, NULL);
    return *(uint8_t *)machine_at(g->vm, header + GUEST_STATUS, 1);
}

static inline uint8_t *guest_data(struct guest *g)
{
    return machine_at(g->vm, GUEST_DATA, 0x400000);
}

#endif
