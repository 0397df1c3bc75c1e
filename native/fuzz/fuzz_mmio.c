/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mmio transport's registers in any order and size, its rings, and states of it that nobody saved. What must hold:
 * the wire is up as long as the guest has an interrupt to acknowledge, a saved state loads again, and a refused one leaves
 * no trace.
 */
#include "driven.h"
#include "vmmballoon.h"

#include <errno.h>

enum { QUEUES = 5, LONGEST = 64, ISR = 0x60 };

static int level;

static void set_level(void *opaque, uint32_t n, int now)
{
    (void)opaque;
    (void)n;
    level = now;
}

/* Registers that take a driver through its start, so that random ones need not find the way. */
static void start(vmm_virtio_mmio *transport, struct driver *driver, uint32_t flavour)
{
    const vmm_device_ops *ops = vmm_virtio_mmio_ops();
    const struct {
        uint16_t offset;
        uint32_t value;
    } steps[] = {{0x70, 0}, {0x70, 3}, {0x24, 1}, {0x20, 1}, {0x24, 0}, {0x20, 0x34000000}, {0x70, 11}};
    for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++)
        ops->write(transport, steps[i].offset, 4, steps[i].value);
    for (unsigned i = 0; i < QUEUES; i++) {
        struct ring *ring = &driver->ring[i];
        ring_init(ring, driver->dev->vm, DRIVER_RINGS + i * 0x10000, driver->dev->queues[i].size_max,
                  flavour);
        const uint64_t areas[3] = {ring->desc, ring->driver, ring->device};
        ops->write(transport, 0x30, 4, i);
        ops->write(transport, 0x38, 4, ring->size);
        for (unsigned area = 0; area < 3; area++) {
            ops->write(transport, 0x80 + area * 0x10, 4, (uint32_t)areas[area]);
            ops->write(transport, 0x84 + area * 0x10, 4, (uint32_t)(areas[area] >> 32));
        }
        ops->write(transport, 0x44, 4, 1);
    }
    ops->write(transport, 0x70, 4, 15);
}

static void load(vmm_virtio_mmio *transport, struct input *in)
{
    vmm_virtio_mmio_state before, wrong, after;
    vmm_virtio_mmio_save(transport, &before);
    wrong = before;
    for (unsigned n = take(in, 1) & 3; n--;) {
        const uint64_t at = take(in, 1) % sizeof wrong;
        ((uint8_t *)&wrong)[at] = (uint8_t)take(in, 1);
    }
    const bool same = !memcmp(&before, &wrong, sizeof before);
    const int rc = vmm_virtio_mmio_load(transport, &wrong);
    CHECK(rc == 0 || (rc == -EINVAL && !same));
    vmm_virtio_mmio_save(transport, &after);
    CHECK(!memcmp(rc ? &before : &wrong, &after, sizeof after));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const vmm_line line = {.set = set_level};
    static vmm_vm *vm;
    static vmm_balloon *balloon;
    static vmm_virtio_mmio *transport;
    static struct driver driver;
    if (!vm) {
        vm = machine_create();
        CHECK_EQUAL(vmm_balloon_create(vm, "virtio-balloon0", 7, &balloon), 0);
        driver.dev = vmm_balloon_virtio(balloon);
        CHECK_EQUAL(vmm_virtio_mmio_create(driver.dev, 0xc0000000, &line, &transport), 0);
        vmm_loop_pause(driver.dev->loop);
    }
    const vmm_device_ops *ops = vmm_virtio_mmio_ops();
    struct input in = {data, data + size};
    const uint8_t first = (uint8_t)take(&in, 1);
    if (first & 1)
        start(transport, &driver, first & VMM_QUEUE_PACKED);
    while (in.at < in.end) {
        const uint8_t op = (uint8_t)take(&in, 1);
        const unsigned queue = (op >> 4) % QUEUES;
        switch (op & 7) {
        case 0:
        case 1: {
            const uint64_t offset = take(&in, 1) << 2;
            ops->write(transport, offset % 0x200, 4, take(&in, 4));
            break;
        }
        case 2:
            ops->write(transport, take(&in, 2) % 0x1000, 1u << (op >> 4 & 3), take(&in, 4));
            break;
        case 3:
            ops->read(transport, take(&in, 2) % 0x1000, 1u << (op >> 4 & 3));
            break;
        case 4:
            if (first & 1 && driver.dev->running)
                guest_offers(&driver, queue, queue > 2 || (queue == 2 && op & 8), LONGEST, &in);
            break;
        case 5:
            if (first & 1)
                guest_scribbles(&driver, queue, &in);
            break;
        case 6:
            load(transport, &in);
            break;
        default:
            doorbells(&driver);
        }
        CHECK_EQUAL(level != 0, ops->read(transport, ISR, 4) != 0);
    }
    vmm_virtio_reset(driver.dev);
    CHECK_EQUAL(level, 0);
    return 0;
}
