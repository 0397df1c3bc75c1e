/* SPDX-License-Identifier: Apache-2.0 */
/* States that nobody saved, between the steps of a guest: refused without a trace, or what a driver could have done. */
#include "driven.h"
#include "vmmballoon.h"

#include <errno.h>

enum { LONGEST = 64 };

/* A few bytes of the state, most of them where there is something. */
static void corrupt(vmm_virtio_state *state, struct input *in)
{
    uint8_t *bytes = (uint8_t *)state;
    const size_t used = offsetof(vmm_virtio_state, queues) + 5 * sizeof(vmm_queue_state);
    for (unsigned n = take(in, 1) & 3; n--;)
        bytes[take(in, 2) % used] = (uint8_t)take(in, 1);
}

static void load(struct driver *driver, struct input *in)
{
    vmm_virtio *dev = driver->dev;
    vmm_virtio_state before, wrong, after;
    CHECK(vmm_virtio_save(dev, &before) == 0);
    wrong = before;
    corrupt(&wrong, in);
    const bool running = dev->running;
    const int rc = vmm_virtio_load(dev, &wrong);
    CHECK(rc == 0 || rc == -EINVAL);
    CHECK(vmm_virtio_save(dev, &after) == 0);
    CHECK(after.status == (rc ? before : wrong).status && (!rc || dev->running == running));
    for (unsigned i = 0; i < 5; i++)
        CHECK(after.queues[i].position == (rc ? before : wrong).queues[i].position);
    uint64_t own[VMM_VIRTIO_OWN];
    vmm_virtio_save_own(dev, own);
    own[take(in, 1) % VMM_VIRTIO_OWN] ^= take(in, 1);
    vmm_virtio_load_own(dev, own);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static vmm_vm *vm;
    static vmm_balloon *balloon;
    static struct driver driver;
    if (!vm) {
        vm = machine_create();
        CHECK(vmm_balloon_create(vm, "virtio-balloon0", 7, &balloon) == 0);
    }
    struct input in = {data, data + size};
    const uint64_t features = take(&in, 1) & (1 << 1 | 1 << 2 | 1 << 5);
    driver_start(&driver, vm, vmm_balloon_virtio(balloon), features, take_flavour(&in));
    while (in.at < in.end) {
        const uint8_t op = (uint8_t)take(&in, 1);
        const unsigned queue = (op >> 4) % 5;
        switch (op & 7) {
        case 0:
        case 1:
            guest_offers(&driver, queue, queue > 2 || (queue == 2 && op & 8), LONGEST, &in);
            break;
        case 2:
            guest_scribbles(&driver, queue, &in);
            break;
        case 3:
            guest_configures(&driver, &in);
            break;
        case 4:
        case 5:
            load(&driver, &in);
            break;
        default:
            doorbells(&driver);
        }
    }
    vmm_virtio_reset(driver.dev);
    return 0;
}
