/* SPDX-License-Identifier: Apache-2.0 */
/* The status machine of a virtio device (virtio 1.2, 2.1 to 2.6 and 3.1). */
#include "virtio/virtio.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define COMMON_FEATURES                                                                                      \
    (VMM_F_INDIRECT_DESC | VMM_F_EVENT_IDX | VMM_F_VERSION_1 | VMM_F_RING_PACKED | VMM_F_RING_RESET)

pthread_mutex_t *vmm_virtio_lock(struct vmm_virtio *dev)
{
    pthread_mutex_lock(&dev->lock);
    return &dev->lock;
}

void vmm_virtio_unlock(pthread_mutex_t **lock)
{
    pthread_mutex_unlock(*lock);
}

/* ---- doorbells ---- */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

bool vmm_virtqueue_poll(struct vmm_virtqueue *q)
{
    const uint64_t start = now_ns();
    for (uint64_t now = start; now - start < q->patience; now = now_ns()) {
        for (int i = 0; i < 16; i++) {
            if (vmm_queue_waiting(&q->ring))
                return true;
            __builtin_ia32_pause();
        }
    }
    q->patience = q->patience < VMM_PATIENCE / 8 ? 0 : q->patience / 2;
    q->idle_since = start;
    return false;
}

/* A doorbell that comes so soon would have been seen by looking. */
static void learn_patience(struct vmm_virtqueue *q)
{
    if (q->idle_since && now_ns() - q->idle_since < VMM_PATIENCE)
        q->patience = VMM_PATIENCE;
    q->idle_since = 0;
}

/* ---- life ---- */

static void doorbell_rang(struct vmm_source *source, uint32_t events)
{
    (void)events;
    struct vmm_virtqueue *q = source->opaque;
    uint64_t count;
    if (read(q->doorbell, &count, sizeof(count)) != sizeof(count))
        return; /* taken already */
    struct vmm_virtio *dev = q->device;
    VMM_VIRTIO_LOCKED(dev);
    bool traced = vmm_trace_on(&dev->vm->io_trace);
    uint64_t since = traced ? __rdtsc() : 0, requests = q->ring.requests;
    if (traced)
        vmm_trace_io(dev->vm, VMM_TRACE_DOORBELL, dev->tag, q->index, 0, 0);
    q->ring.doorbells++;
    learn_patience(q);
    if (unlikely(dev->resumes) && dev->running) {
        dev->resumes = false;
        dev->ops->resumed(dev->opaque);
    }
    if (dev->running && q->enabled && dev->ops->kick)
        dev->ops->kick(dev->opaque, q->index);
    if (traced)
        vmm_trace_io(dev->vm, VMM_TRACE_REQUESTS, dev->tag, q->index, q->ring.requests - requests, since);
}

static int queue_init(struct vmm_virtio *dev, unsigned index, uint16_t size_max)
{
    struct vmm_virtqueue *q = &dev->queues[index];
    q->device = dev;
    q->index = index;
    q->size_max = size_max;
    q->ring.size = size_max;
    q->doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (q->doorbell < 0)
        return vmm_error_errno("eventfd for a doorbell");
    q->source = (struct vmm_source){.fd = q->doorbell, .ready = doorbell_rang, .opaque = q};
    return 0;
}

static void lock_init(pthread_mutex_t *lock)
{
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(lock, &recursive);
    pthread_mutexattr_destroy(&recursive);
}

int vmm_virtio_init(struct vmm_virtio *dev, vmm_vm *vm, const struct vmm_virtio_ops *ops, void *opaque,
                    uint32_t id, const char *name, uint64_t features, uint32_t n_queues,
                    const uint16_t *size_max, uint32_t config_size)
{
    memset(dev, 0, sizeof(*dev));
    if (n_queues > VMM_VIRTIO_QUEUES_MAX || config_size > VMM_VIRTIO_CONFIG_MAX)
        return vmm_error_set(-EINVAL, "%s: %u queues, %u bytes of configuration", name, n_queues,
                             config_size);
    for (uint32_t i = 0; i < n_queues; i++)
        if (!size_max[i] || size_max[i] > VMM_QUEUE_SIZE_MAX || (size_max[i] & (size_max[i] - 1)))
            return vmm_error_set(-EINVAL, "%s: queue %u of size %u", name, i, size_max[i]);
    dev->vm = vm;
    dev->loop = vmm_vm_loop(vm);
    dev->ops = ops;
    dev->opaque = opaque;
    dev->id = id;
    snprintf(dev->name, sizeof(dev->name), "%s", name);
    dev->offered = features | COMMON_FEATURES;
    dev->config_size = config_size;
    dev->queues = calloc(n_queues ? n_queues : 1, sizeof(*dev->queues));
    if (!dev->loop) {
        char why[96]; /* a copy: what vmm_error_host writes to is what vmm_error_text returns */
        snprintf(why, sizeof(why), "%s", vmm_error_text());
        free(dev->queues);
        dev->queues = NULL;
        return vmm_error_host(-ENOMEM, "%s: %s", name, why);
    }
    if (!dev->queues)
        return vmm_error_set(-ENOMEM, "%s: queues", name);
    lock_init(&dev->lock);
    for (; dev->n_queues < n_queues; dev->n_queues++) {
        int rc = queue_init(dev, dev->n_queues, size_max[dev->n_queues]);
        if (rc < 0) {
            vmm_virtio_deinit(dev);
            return rc;
        }
    }
    return 0;
}

void vmm_virtio_deinit(struct vmm_virtio *dev)
{
    if (!dev->queues)
        return;
    for (uint32_t i = 0; i < dev->n_queues; i++)
        close(dev->queues[i].doorbell);
    free(dev->queues);
    dev->queues = NULL;
    pthread_mutex_destroy(&dev->lock);
}

int vmm_virtio_create(vmm_vm *vm, const vmm_virtio_ops *ops, void *opaque, uint32_t id, const char *name,
                      uint64_t features, uint32_t n_queues, const uint16_t *size_max, uint32_t config_size,
                      vmm_virtio **out)
{
    struct vmm_virtio *dev = calloc(1, sizeof(*dev));
    if (!dev)
        return vmm_error_set(-ENOMEM, "%s", name);
    int rc = vmm_virtio_init(dev, vm, ops, opaque, id, name, features, n_queues, size_max, config_size);
    if (rc < 0) {
        free(dev);
        return rc;
    }
    *out = dev;
    return 0;
}

void vmm_virtio_destroy(vmm_virtio *dev)
{
    if (!dev)
        return;
    vmm_virtio_deinit(dev);
    free(dev);
}

/* ---- interrupts ---- */

static void interrupt(struct vmm_virtio *dev, unsigned queue)
{
    if (dev->loading)
        return;
    vmm_trace_io(dev->vm, VMM_TRACE_INTERRUPT, dev->tag, queue, 0, 0);
    if (dev->transport)
        dev->transport->queue_interrupt(dev->transport_opaque, queue);
}

void vmm_virtio_config_interrupt(struct vmm_virtio *dev)
{
    if (dev->loading)
        return;
    vmm_trace_io(dev->vm, VMM_TRACE_INTERRUPT, dev->tag, UINT64_MAX, 0, 0);
    if (dev->transport)
        dev->transport->config_interrupt(dev->transport_opaque);
}

void vmm_virtio_set_tag(vmm_virtio *dev, uint32_t tag)
{
    dev->tag = tag;
}

/* ---- running and not ---- */

void vmm_virtio_start(struct vmm_virtio *dev)
{
    dev->running = true;
    if (dev->ops->start)
        dev->ops->start(dev->opaque);
    for (uint32_t i = 0; i < dev->n_queues && dev->running; i++) {
        struct vmm_virtqueue *q = &dev->queues[i];
        if (!q->external && !q->source.live && vmm_loop_add(dev->loop, &q->source, EPOLLIN) < 0)
            vmm_virtio_broken(dev, "its doorbell cannot be watched: %s", vmm_error_text());
    }
    if (dev->running && dev->transport)
        dev->transport->doorbells(dev->transport_opaque, true);
    for (uint32_t i = 0; i < dev->n_queues && dev->running; i++)
        if (dev->queues[i].enabled)
            vmm_virtqueue_ring(&dev->queues[i]);
}

void vmm_virtio_halt(struct vmm_virtio *dev)
{
    dev->running = dev->resumes = false;
    if (dev->ops->stop)
        dev->ops->stop(dev->opaque);
}

void vmm_virtio_stop(struct vmm_virtio *dev)
{
    if (!dev->running)
        return;
    dev->running = false;
    if (dev->transport)
        dev->transport->doorbells(dev->transport_opaque, false);
    for (uint32_t i = 0; i < dev->n_queues; i++)
        vmm_loop_remove(dev->loop, &dev->queues[i].source);
    vmm_virtio_halt(dev);
}

static void queue_forget(struct vmm_virtqueue *q)
{
    vmm_queue_reset(&q->ring);
    q->ring.size = q->size_max;
    q->enabled = false;
}

static void reset(struct vmm_virtio *dev)
{
    vmm_virtio_stop(dev);
    for (uint32_t i = 0; i < dev->n_queues; i++)
        queue_forget(&dev->queues[i]);
    dev->status = 0;
    dev->agreed = dev->driver_features = 0;
    dev->fault[0] = 0;
    if (dev->transport)
        dev->transport->reset(dev->transport_opaque);
}

void vmm_virtio_reset(vmm_virtio *dev)
{
    VMM_VIRTIO_LOCKED(dev);
    reset(dev);
}

void vmm_virtio_broken(struct vmm_virtio *dev, const char *format, ...)
{
    if (dev->status & VMM_STATUS_NEEDS_RESET)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(dev->fault, sizeof(dev->fault), format, args);
    va_end(args);
    bool driven = dev->status & VMM_STATUS_DRIVER_OK;
    dev->status |= VMM_STATUS_NEEDS_RESET;
    vmm_virtio_stop(dev);
    vmm_vm_say(dev->vm, "%s needs a reset by its driver: %s", dev->name, dev->fault);
    /* virtio 1.2, 2.1.2: with DRIVER_OK set, the driver is told by a configuration change. */
    if (driven)
        vmm_virtio_config_interrupt(dev);
}

/* ---- status and features ---- */

bool vmm_virtio_acceptable(const struct vmm_virtio *dev, uint64_t features)
{
    return !(features & ~dev->offered) && (features & VMM_F_VERSION_1);
}

void vmm_virtio_write_status(struct vmm_virtio *dev, uint8_t status)
{
    if (!status) {
        reset(dev);
        return;
    }
    /* Bits are set one after another and cleared by reset alone; NEEDS_RESET is the device's (2.1.1, 2.1.2). */
    uint8_t added = status & ~dev->status & ~VMM_STATUS_NEEDS_RESET;
    if (added & VMM_STATUS_FEATURES_OK) {
        if (vmm_virtio_acceptable(dev, dev->driver_features))
            dev->agreed = dev->driver_features;
        else
            added &= ~VMM_STATUS_FEATURES_OK;
    }
    if ((added & VMM_STATUS_DRIVER_OK) && !((dev->status | added) & VMM_STATUS_FEATURES_OK))
        added &= ~VMM_STATUS_DRIVER_OK;
    dev->status |= added;
    if (added & VMM_STATUS_FAILED)
        vmm_virtio_stop(dev);
    else if ((added & VMM_STATUS_DRIVER_OK) && !(dev->status & (VMM_STATUS_NEEDS_RESET | VMM_STATUS_FAILED)))
        vmm_virtio_start(dev);
}

uint32_t vmm_virtio_device_features(const struct vmm_virtio *dev, uint32_t select)
{
    return select < 2 ? (uint32_t)(dev->offered >> (32 * select)) : 0;
}

void vmm_virtio_driver_features(struct vmm_virtio *dev, uint32_t select, uint32_t value)
{
    if (select > 1 || (dev->status & VMM_STATUS_FEATURES_OK))
        return;
    dev->driver_features &= ~(0xffffffffull << (32 * select));
    dev->driver_features |= (uint64_t)value << (32 * select);
}

/* ---- configuration space ---- */

static bool in_config(const struct vmm_virtio *dev, uint64_t offset, uint32_t size)
{
    return size <= dev->config_size && offset <= dev->config_size - size;
}

uint64_t vmm_virtio_config_read(struct vmm_virtio *dev, uint64_t offset, uint32_t size)
{
    uint64_t value = 0;
    if (size <= sizeof(value) && in_config(dev, offset, size))
        memcpy(&value, dev->config + offset, size);
    return value;
}

void vmm_virtio_config_write(struct vmm_virtio *dev, uint64_t offset, uint32_t size, uint64_t value)
{
    if (size > sizeof(value) || !in_config(dev, offset, size) || offset < dev->writable_at ||
        offset + size > dev->writable_at + dev->writable_size)
        return;
    memcpy(dev->config + offset, &value, size);
    if (dev->ops->config)
        dev->ops->config(dev->opaque, (uint32_t)offset, size);
}

void vmm_virtio_set_config(struct vmm_virtio *dev, uint32_t offset, const void *bytes, uint32_t size)
{
    if (!in_config(dev, offset, size) || !memcmp(dev->config + offset, bytes, size))
        return;
    memcpy(dev->config + offset, bytes, size);
    dev->generation++;
    if (dev->running)
        vmm_virtio_config_interrupt(dev);
}

int vmm_virtio_config_get(vmm_virtio *dev, uint32_t offset, void *bytes, uint32_t size)
{
    VMM_VIRTIO_LOCKED(dev);
    if (!in_config(dev, offset, size))
        return vmm_error_set(-EINVAL, "%s: configuration has %u bytes", dev->name, dev->config_size);
    memcpy(bytes, dev->config + offset, size);
    return 0;
}

int vmm_virtio_config_set(vmm_virtio *dev, uint32_t offset, const void *bytes, uint32_t size)
{
    VMM_VIRTIO_LOCKED(dev);
    if (!in_config(dev, offset, size))
        return vmm_error_set(-EINVAL, "%s: configuration has %u bytes", dev->name, dev->config_size);
    vmm_virtio_set_config(dev, offset, bytes, size);
    return 0;
}

/* ---- queues, as the driver configures them ---- */

struct vmm_virtqueue *vmm_virtio_queue(struct vmm_virtio *dev, uint32_t number)
{
    return number < dev->n_queues ? &dev->queues[number] : NULL;
}

void vmm_virtqueue_size(struct vmm_virtqueue *q, uint32_t size)
{
    if (q->enabled)
        return;
    if (!size || size > q->size_max)
        vmm_virtio_broken(q->device, "queue %u given size %u, %u is the most", q->index, size, q->size_max);
    else
        q->ring.size = (uint16_t)size;
}

static uint64_t *area(struct vmm_queue *ring, enum vmm_queue_area which)
{
    return which == VMM_AREA_DESC ? &ring->desc : which == VMM_AREA_DRIVER ? &ring->driver : &ring->device;
}

void vmm_virtqueue_area(struct vmm_virtqueue *q, enum vmm_queue_area which, bool high, uint32_t value)
{
    if (q->enabled)
        return;
    uint64_t *address = area(&q->ring, which);
    unsigned shift = high ? 32 : 0;
    *address = (*address & ~(0xffffffffull << shift)) | (uint64_t)value << shift;
}

uint32_t vmm_virtqueue_area_read(const struct vmm_virtqueue *q, enum vmm_queue_area which, bool high)
{
    struct vmm_queue ring = {.desc = q->ring.desc, .driver = q->ring.driver, .device = q->ring.device};
    return (uint32_t)(*area(&ring, which) >> (high ? 32 : 0));
}

uint32_t vmm_virtio_ring_features(uint64_t agreed)
{
    return (agreed & VMM_F_INDIRECT_DESC ? VMM_QUEUE_INDIRECT : 0) |
           (agreed & VMM_F_EVENT_IDX ? VMM_QUEUE_EVENT_IDX : 0) |
           (agreed & VMM_F_RING_PACKED ? VMM_QUEUE_PACKED : 0) |
           (agreed & VMM_F_IN_ORDER ? VMM_QUEUE_IN_ORDER : 0);
}

void vmm_virtqueue_enable(struct vmm_virtqueue *q)
{
    struct vmm_virtio *dev = q->device;
    if (q->enabled || (dev->status & VMM_STATUS_NEEDS_RESET))
        return;
    if (!(dev->status & VMM_STATUS_FEATURES_OK))
        vmm_virtio_broken(dev, "queue %u enabled before features were agreed", q->index);
    else if (vmm_queue_start(&q->ring, dev->vm, vmm_virtio_ring_features(dev->agreed)) < 0)
        vmm_virtio_broken(dev, "queue %u: %s", q->index, q->ring.fault);
    else
        q->enabled = true;
    if (!q->enabled || !dev->running)
        return;
    if (dev->ops->renew)
        dev->ops->renew(dev->opaque, q->index);
    vmm_virtqueue_ring(q);
}

void vmm_virtqueue_reset(struct vmm_virtqueue *q)
{
    /* Other queues go on: what is in flight is finished or taken back, not forgotten. */
    const struct vmm_virtio *dev = q->device;
    if (dev->running && q->enabled && dev->ops->quiesce)
        dev->ops->quiesce(dev->opaque);
    if (dev->running && q->enabled && dev->ops->forget)
        dev->ops->forget(dev->opaque, q->index);
    queue_forget(q);
}

void vmm_virtqueue_ring(struct vmm_virtqueue *q)
{
    uint64_t one = 1;
    ssize_t n = write(q->doorbell, &one, sizeof(one)); /* full: it is readable anyway */
    (void)n;
}

/* ---- requests ---- */

int vmm_virtio_pop(struct vmm_virtio *dev, unsigned queue, struct vmm_chain *chain)
{
    if (queue >= dev->n_queues || !dev->running || !dev->queues[queue].enabled)
        return 0;
    struct vmm_queue *ring = &dev->queues[queue].ring;
    int rc = vmm_queue_pop(ring, chain);
    if (rc < 0)
        vmm_virtio_broken(dev, "queue %u: %s", queue, ring->fault);
    return rc > 0;
}

void vmm_virtio_publish(struct vmm_virtio *dev, unsigned queue)
{
    struct vmm_virtqueue *q = &dev->queues[queue];
    if (q->enabled && vmm_queue_publish(&q->ring))
        interrupt(dev, queue);
}

void vmm_virtio_serve(struct vmm_virtio *dev, unsigned queue,
                      uint32_t (*serve)(void *opaque, unsigned queue, struct vmm_chain *chain))
{
    struct vmm_virtqueue *q = vmm_virtio_queue(dev, queue);
    struct vmm_chain chain;
    bool later = false;
    unsigned budget = VMM_SERVE_BUDGET;
    do {
        if (!q || !q->enabled || !dev->running)
            return;
        vmm_queue_suppress(&q->ring);
        for (; budget; budget--) {
            struct vmm_queue_mark mark = vmm_queue_mark(&q->ring);
            if (!vmm_virtio_pop(dev, queue, &chain))
                break;
            uint32_t written = serve(dev->opaque, queue, &chain);
            if (written == VMM_SERVE_LATER) {
                vmm_queue_rewind(&q->ring, mark);
                later = true;
                break;
            }
            vmm_queue_push(&q->ring, &chain, written);
        }
        if (!dev->running) /* broken on the way: the rings are not ours any more */
            return;
        vmm_virtio_publish(dev, queue);
    } while (!later && vmm_queue_arm(&q->ring) && budget);
    if (!budget)
        vmm_virtqueue_ring(q);
}

/* ---- for devices written elsewhere ---- */

void vmm_virtio_get_info(vmm_virtio *dev, vmm_virtio_info *info)
{
    VMM_VIRTIO_LOCKED(dev);
    *info = (vmm_virtio_info){
        .id = dev->id,
        .n_queues = dev->n_queues,
        .config_size = dev->config_size,
        .generation = dev->generation,
        .offered = dev->offered,
        .agreed = dev->agreed,
        .status = dev->status,
        .name = dev->name,
        .fault = dev->fault,
    };
}

int vmm_virtio_queue_stats(vmm_virtio *dev, uint32_t queue, vmm_queue_stats *stats)
{
    VMM_VIRTIO_LOCKED(dev);
    const struct vmm_virtqueue *q = vmm_virtio_queue(dev, queue);
    if (!q)
        return vmm_error_set(-EINVAL, "%s has %u queues", dev->name, dev->n_queues);
    *stats = (vmm_queue_stats){
        .requests = q->ring.requests,
        .bytes_out = q->ring.bytes_out,
        .bytes_in = q->ring.bytes_in,
        .doorbells = q->ring.doorbells,
        .interrupts = q->ring.interrupts,
        .size = q->ring.size,
        .in_flight = q->ring.in_flight,
        .enabled = q->enabled,
    };
    return 0;
}

vmm_chain *vmm_chain_create(void)
{
    return calloc(1, sizeof(vmm_chain));
}

void vmm_chain_destroy(vmm_chain *chain)
{
    free(chain);
}

int vmm_virtio_take(vmm_virtio *dev, uint32_t queue, vmm_chain *chain)
{
    VMM_VIRTIO_LOCKED(dev);
    return vmm_virtio_pop(dev, queue, chain);
}

uint64_t vmm_chain_size(const vmm_chain *chain, int in)
{
    return in ? chain->in_size : chain->out_size;
}

size_t vmm_chain_get(const vmm_chain *chain, uint64_t at, void *to, size_t n)
{
    return vmm_chain_read(chain, at, to, n);
}

size_t vmm_chain_put(const vmm_chain *chain, uint64_t at, const void *from, size_t n)
{
    return vmm_chain_write(chain, at, from, n);
}

void vmm_virtio_answer(vmm_virtio *dev, uint32_t queue, const vmm_chain *chain, uint32_t written)
{
    VMM_VIRTIO_LOCKED(dev);
    if (queue < dev->n_queues && dev->running && dev->queues[queue].enabled)
        vmm_queue_push(&dev->queues[queue].ring, chain,
                       written < chain->in_size ? written : (uint32_t)chain->in_size);
}

int vmm_virtio_flush(vmm_virtio *dev, uint32_t queue)
{
    VMM_VIRTIO_LOCKED(dev);
    if (queue >= dev->n_queues || !dev->running || !dev->queues[queue].enabled)
        return 0;
    vmm_virtio_publish(dev, queue);
    return vmm_queue_arm(&dev->queues[queue].ring);
}

void vmm_virtio_ring(vmm_virtio *dev, uint32_t queue)
{
    if (queue < dev->n_queues)
        vmm_virtqueue_ring(&dev->queues[queue]);
}

void vmm_virtio_hold(vmm_virtio *dev)
{
    pthread_mutex_lock(&dev->lock);
}

void vmm_virtio_release(vmm_virtio *dev)
{
    pthread_mutex_unlock(&dev->lock);
}
