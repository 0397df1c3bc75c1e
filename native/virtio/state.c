/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A virtio device as a value, and back. What is saved follows from what a driver can have done (virtio 1.2, 2.1 to 2.7
 * and 3.1): what follows from the rest, like the features agreed or whether the device runs, is not in it, so that no
 * state contradicts itself there. A loaded state is as hostile as a driver: checked as a whole before anything changes.
 */
#include "virtio/virtio.h"

#include <errno.h>
#include <string.h>

_Static_assert(sizeof((vmm_virtio_state *)0)->config == VMM_VIRTIO_CONFIG_MAX &&
                   sizeof((vmm_virtio_state *)0)->queues / sizeof(vmm_queue_state) == VMM_VIRTIO_QUEUES_MAX &&
                   sizeof((vmm_virtio_state *)0)->fault == sizeof((struct vmm_virtio *)0)->fault,
               "a state holds the largest device");

#define STATUS_ALL                                                                                           \
    (VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER | VMM_STATUS_DRIVER_OK | VMM_STATUS_FEATURES_OK |            \
     VMM_STATUS_NEEDS_RESET | VMM_STATUS_FAILED)

/* ---- save ---- */

static int check_quiet(const struct vmm_virtio *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++) {
        const struct vmm_virtqueue *q = &dev->queues[i];
        if (q->external)
            return vmm_error_set(-EBUSY,
                                 "%s: its queues are served by another process, whose state cannot "
                                 "be saved: take the device out of the machine",
                                 dev->name);
        if (dev->running && (q->ring.in_flight || q->ring.pushed))
            return vmm_error_set(-EBUSY,
                                 "%s holds %u requests of queue %u: a device is saved when it has "
                                 "answered them, or given them back in quiesce",
                                 dev->name, q->ring.in_flight + q->ring.pushed, i);
    }
    return 0;
}

/* A broken device's rings are not looked at before its reset. */
static vmm_queue_state queue_state(const struct vmm_virtqueue *q)
{
    const bool used = q->enabled && !(q->device->status & VMM_STATUS_NEEDS_RESET);
    return (vmm_queue_state){
        .desc = q->ring.desc,
        .driver = q->ring.driver,
        .device = q->ring.device,
        .size = q->ring.size,
        .position = used ? vmm_queue_position(&q->ring) : 0,
        .enabled = q->enabled,
    };
}

int vmm_virtio_save(vmm_virtio *dev, vmm_virtio_state *s)
{
    VMM_VIRTIO_LOCKED(dev);
    if (dev->running && dev->ops->quiesce)
        dev->ops->quiesce(dev->opaque);
    int rc = check_quiet(dev);
    if (rc < 0)
        return rc;
    memset(s, 0, sizeof(*s));
    s->driver_features = dev->driver_features;
    s->n_queues = dev->n_queues;
    s->config_size = dev->config_size;
    s->generation = dev->generation;
    s->status = dev->status;
    memcpy(s->fault, dev->fault, sizeof(s->fault));
    memcpy(s->config, dev->config, dev->config_size);
    for (uint32_t i = 0; i < dev->n_queues; i++)
        s->queues[i] = queue_state(&dev->queues[i]);
    return 0;
}

/* ---- load ---- */

static bool runs(uint8_t status)
{
    return (status & VMM_STATUS_DRIVER_OK) && !(status & (VMM_STATUS_NEEDS_RESET | VMM_STATUS_FAILED));
}

static uint64_t agreed(const vmm_virtio_state *s)
{
    return s->status & VMM_STATUS_FEATURES_OK ? s->driver_features : 0;
}

static void configure(struct vmm_queue *ring, const vmm_queue_state *s)
{
    ring->size = s->size;
    ring->desc = s->desc;
    ring->driver = s->driver;
    ring->device = s->device;
}

static bool has_ring(const vmm_virtio_state *s, const vmm_queue_state *q)
{
    return q->enabled && !(s->status & VMM_STATUS_NEEDS_RESET);
}

static int check_queue(const struct vmm_virtio *dev, const vmm_virtio_state *s, uint32_t i)
{
    const vmm_queue_state *q = &s->queues[i];
    if (!q->size || q->size > dev->queues[i].size_max)
        return vmm_error_set(-EINVAL, "%s: queue %u of size %u, %u is the most", dev->name, i, q->size,
                             dev->queues[i].size_max);
    if (q->enabled > 1 || (q->enabled && !(s->status & VMM_STATUS_FEATURES_OK)))
        return vmm_error_set(-EINVAL, "%s: queue %u enabled before features were agreed", dev->name, i);
    if (!has_ring(s, q))
        return q->position ? vmm_error_set(-EINVAL, "%s: queue %u is not in use, and at position %u",
                                           dev->name, i, q->position)
                           : 0;
    struct vmm_queue ring = {0};
    configure(&ring, q);
    if (vmm_queue_start(&ring, dev->vm, vmm_virtio_ring_features(agreed(s))) < 0 ||
        vmm_queue_seek(&ring, q->position) < 0)
        return vmm_error_set(-EINVAL, "%s: queue %u %s", dev->name, i, ring.fault);
    return 0;
}

/* Words for people, in a terminal or a log. */
static bool is_sentence(const char *text, size_t size)
{
    const size_t n = strnlen(text, size);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] < ' ' || text[i] == 127)
            return false;
    return n < size;
}

static int check(const struct vmm_virtio *dev, const vmm_virtio_state *s)
{
    if (s->n_queues != dev->n_queues || s->config_size != dev->config_size)
        return vmm_error_set(-EINVAL,
                             "%s: a state of %u queues and %u bytes of configuration, it has %u and %u",
                             dev->name, s->n_queues, s->config_size, dev->n_queues, dev->config_size);
    if (s->status & ~STATUS_ALL ||
        ((s->status & VMM_STATUS_DRIVER_OK) && !(s->status & VMM_STATUS_FEATURES_OK)))
        return vmm_error_set(-EINVAL, "%s: status %#x is none a device can have", dev->name, s->status);
    if ((s->status & VMM_STATUS_FEATURES_OK) && !vmm_virtio_acceptable(dev, s->driver_features))
        return vmm_error_set(-EINVAL, "%s: features %#llx agreed, %#llx are offered", dev->name,
                             (unsigned long long)s->driver_features, (unsigned long long)dev->offered);
    if (!is_sentence(s->fault, sizeof(s->fault)) || !s->fault[0] != !(s->status & VMM_STATUS_NEEDS_RESET))
        return vmm_error_set(-EINVAL, "%s: a device needs a reset if there is a reason, and only then",
                             dev->name);
    for (uint32_t i = 0; i < dev->n_queues; i++) {
        if (dev->queues[i].external)
            return vmm_error_set(-EINVAL, "%s: its queues are served by another process", dev->name);
        int rc = check_queue(dev, s, i);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void apply_queue(struct vmm_virtio *dev, const vmm_virtio_state *s, uint32_t i)
{
    struct vmm_virtqueue *q = &dev->queues[i];
    vmm_queue_reset(&q->ring);
    configure(&q->ring, &s->queues[i]);
    q->enabled = s->queues[i].enabled;
    if (!has_ring(s, &s->queues[i]))
        return;
    vmm_queue_start(&q->ring, dev->vm, vmm_virtio_ring_features(dev->agreed)); /* as in check */
    vmm_queue_seek(&q->ring, s->queues[i].position);
}

static void apply(struct vmm_virtio *dev, const vmm_virtio_state *s)
{
    dev->status = s->status;
    dev->driver_features = s->driver_features;
    dev->agreed = agreed(s);
    dev->generation = s->generation;
    memcpy(dev->fault, s->fault, sizeof(dev->fault));
    memcpy(dev->config, s->config, dev->config_size);
    for (uint32_t i = 0; i < dev->n_queues; i++)
        apply_queue(dev, s, i);
}

int vmm_virtio_load(vmm_virtio *dev, const vmm_virtio_state *s)
{
    VMM_VIRTIO_LOCKED(dev);
    int rc = check(dev, s);
    if (rc < 0)
        return rc;
    const bool run = runs(s->status);
    dev->loading = true;
    if (dev->running && run)
        vmm_virtio_halt(dev);
    else
        vmm_virtio_stop(dev);
    apply(dev, s);
    if (run)
        vmm_virtio_start(dev);
    dev->loading = false;
    if (run && !dev->running)
        return vmm_error_set(-EIO, "%s: %s", dev->name, dev->fault);
    /* With the doorbells that start rang; a driver that does not run yet has seen nothing it would have to unlearn. */
    dev->resumes = run && dev->ops->resumed;
    if (!run && dev->ops->resumed)
        dev->ops->resumed(dev->opaque);
    return 0;
}

/* ---- what the device itself remembers ---- */

void vmm_virtio_save_own(vmm_virtio *dev, uint64_t *own)
{
    VMM_VIRTIO_LOCKED(dev);
    memset(own, 0, VMM_VIRTIO_OWN * sizeof(*own));
    if (dev->ops->save)
        dev->ops->save(dev->opaque, own);
}

int vmm_virtio_load_own(vmm_virtio *dev, const uint64_t *own)
{
    VMM_VIRTIO_LOCKED(dev);
    return dev->ops->load ? dev->ops->load(dev->opaque, own) : 0;
}
