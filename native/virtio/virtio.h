/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A virtio device between its transport and its data path: features, status, configuration, queues, interrupts.
 * One status machine for every transport (virtio 1.2, chapter 2 and 3.1).
 *
 * Threads. dev->lock is held around everything below and around every op, whoever calls: vCPU threads come in
 * through the transport's registers, the I/O thread through doorbells and the device's own sources. It is recursive:
 * a device written in Python calls back. Take it in your own source handlers (VMM_VIRTIO_LOCKED). Order: a
 * device's lock before vm->lock and the bus lock; never two devices' locks at once.
 *
 * A device in C
 *   struct vmm_blk { vmm_virtio virtio; ... };         the base is the first member
 *   vmm_virtio_init(&blk->virtio, vm, &ops, ...)       from its own vmm_blk_create
 *   ops->kick(dev, queue)                              pop, work, push, publish as in queue.h
 * It never learns which transport it is on.
 */
#ifndef VMM_VIRTIO_VIRTIO_H
#define VMM_VIRTIO_VIRTIO_H

#include "core/loop.h"
#include "virtio/queue.h"
#include "vmmvirtio.h"

#define VMM_VIRTIO_QUEUES_MAX 64
#define VMM_VIRTIO_CONFIG_MAX 256 /* the largest device configuration in virtio 1.2 is far smaller */

/* virtio 1.2, 2.1 */
enum vmm_virtio_status {
    VMM_STATUS_ACKNOWLEDGE = 1,
    VMM_STATUS_DRIVER = 2,
    VMM_STATUS_DRIVER_OK = 4,
    VMM_STATUS_FEATURES_OK = 8,
    VMM_STATUS_NEEDS_RESET = 64,
    VMM_STATUS_FAILED = 128,
};

/* virtio 1.2, 6: the bits that belong to no device */
#define VMM_F_INDIRECT_DESC (1ull << 28)
#define VMM_F_EVENT_IDX (1ull << 29)
#define VMM_F_VERSION_1 (1ull << 32)
#define VMM_F_ACCESS_PLATFORM (1ull << 33)
#define VMM_F_RING_PACKED (1ull << 34)
#define VMM_F_IN_ORDER (1ull << 35)
#define VMM_F_RING_RESET (1ull << 40)

/* What a transport does for the device it carries; dev->lock is held. */
struct vmm_virtio_transport {
    void (*queue_interrupt)(void *opaque, unsigned queue); /* used buffers */
    void (*config_interrupt)(void *opaque);                /* configuration changed, or needs reset */
    void (*doorbells)(void *opaque, bool on); /* DRIVER_OK: route doorbells to the eventfds; or not */
    void (*reset)(void *opaque);              /* the device was reset: selectors, vectors to power-on */
};

struct vmm_virtqueue {
    struct vmm_queue ring;
    uint16_t size_max;   /* what the device offers */
    bool enabled;        /* the driver said so */
    bool external;       /* served by another process: the doorbell is not watched here */
    int doorbell;        /* eventfd */
    uint64_t patience;   /* ns: how long vmm_virtqueue_poll looks; what has paid off lately */
    uint64_t idle_since; /* CLOCK_MONOTONIC, ns: when it last looked in vain; 0: a doorbell rang since */
    unsigned index;
    struct vmm_virtio *device;
    struct vmm_source source; /* the doorbell on the I/O thread */
};

struct vmm_virtio {
    struct vmm_vm *vm;
    vmm_loop *loop;
    pthread_mutex_t lock;
    const struct vmm_virtio_ops *ops;
    void *opaque;  /* what ops get */
    char name[32]; /* in messages: "virtio-blk 0" */
    uint32_t tag;  /* in traces */
    uint32_t id;   /* virtio 1.2, 5 */
    uint64_t offered, agreed;
    uint64_t driver_features; /* as written, before FEATURES_OK */
    uint8_t status;
    bool running;    /* DRIVER_OK, neither broken nor failed */
    bool loading;    /* the driver is told of nothing */
    bool resumes;    /* was loaded: ops->resumed comes with the next doorbell, which was rung */
    char fault[160]; /* why it needs a reset; empty: it does not */
    uint8_t config[VMM_VIRTIO_CONFIG_MAX];
    uint32_t config_size, generation;
    uint32_t writable_at, writable_size; /* the part of the configuration the driver may write */
    _Atomic uint32_t isr; /* bit 0: used buffers, bit 1: configuration (virtio 1.2, 4.2.2 and 4.1.4.5) */
    uint32_t n_queues;
    struct vmm_virtqueue *queues;
    const struct vmm_virtio_transport *transport;
    void *transport_opaque;
};

#define VMM_VIRTIO_LOCKED(dev) pthread_mutex_t *locked_ VMM_CLEANUP(vmm_virtio_unlock) = vmm_virtio_lock(dev)
pthread_mutex_t *vmm_virtio_lock(struct vmm_virtio *dev);
void vmm_virtio_unlock(pthread_mutex_t **lock);

/* ---- for devices ---- */

/*
 * Into the caller's storage. `features` are the device's own bits; VERSION_1, INDIRECT_DESC, EVENT_IDX and
 * RING_PACKED and RING_RESET are added. size_max holds n_queues queue sizes, each 1..VMM_QUEUE_SIZE_MAX and a power of two.
 */
int vmm_virtio_init(struct vmm_virtio *dev, vmm_vm *vm, const struct vmm_virtio_ops *ops, void *opaque,
                    uint32_t id, const char *name, uint64_t features, uint32_t n_queues,
                    const uint16_t *size_max, uint32_t config_size);
/* After the machine's I/O thread has ended (vmm_vm_destroy). A zeroed one is fine. */
void vmm_virtio_deinit(struct vmm_virtio *dev);

/* Publish, then interrupt the driver where it wants one. */
void vmm_virtio_publish(struct vmm_virtio *dev, unsigned queue);

/* Change bytes of the configuration: new generation, and the interrupt if the driver runs. */
void vmm_virtio_set_config(struct vmm_virtio *dev, uint32_t offset, const void *bytes, uint32_t size);

/* The guest broke the rules: DEVICE_NEEDS_RESET (virtio 1.2, 2.1.1), said once on the machine's log. */
void vmm_virtio_broken(struct vmm_virtio *dev, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The driver is to look at the configuration; without a change of it. */
void vmm_virtio_config_interrupt(struct vmm_virtio *dev);

/* Has feature bit `bit` been agreed? */
static inline bool vmm_virtio_has(const struct vmm_virtio *dev, unsigned bit)
{
    return dev->agreed >> bit & 1;
}

/* Pop; a broken ring breaks the device. 1 or 0. */
int vmm_virtio_pop(struct vmm_virtio *dev, unsigned queue, struct vmm_chain *chain);

/*
 * The loop every simple device's kick is: pop, `serve`, push what it answers (bytes written), publish, until
 * nothing waits. serve answers VMM_SERVE_LATER to stop: the chain is given back, and nothing more is taken.
 * After VMM_SERVE_BUDGET requests the I/O thread's other sources get their turn: the doorbell is rung again.
 */
void vmm_virtio_serve(struct vmm_virtio *dev, unsigned queue,
                      uint32_t (*serve)(void *opaque, unsigned queue, struct vmm_chain *chain));
#define VMM_SERVE_LATER UINT32_MAX
#define VMM_SERVE_BUDGET (4 * VMM_QUEUE_SIZE_MAX)

/* ---- for transports: the driver's view, each with dev->lock held ---- */

void vmm_virtio_write_status(struct vmm_virtio *dev, uint8_t status);
uint32_t vmm_virtio_device_features(const struct vmm_virtio *dev, uint32_t select);
void vmm_virtio_driver_features(struct vmm_virtio *dev, uint32_t select, uint32_t value);
uint64_t vmm_virtio_config_read(struct vmm_virtio *dev, uint64_t offset, uint32_t size);
void vmm_virtio_config_write(struct vmm_virtio *dev, uint64_t offset, uint32_t size, uint64_t value);

/* The queue the guest selected, or NULL: the only way from its number to ours. */
struct vmm_virtqueue *vmm_virtio_queue(struct vmm_virtio *dev, uint32_t number);

/* A queue's configuration; refused (ignored) once it is enabled or the device is past DRIVER_OK. */
enum vmm_queue_area { VMM_AREA_DESC = 0, VMM_AREA_DRIVER = 1, VMM_AREA_DEVICE = 2 };
void vmm_virtqueue_size(struct vmm_virtqueue *q, uint32_t size);
void vmm_virtqueue_area(struct vmm_virtqueue *q, enum vmm_queue_area area, bool high, uint32_t value);
uint32_t vmm_virtqueue_area_read(const struct vmm_virtqueue *q, enum vmm_queue_area area, bool high);
void vmm_virtqueue_enable(struct vmm_virtqueue *q);
void vmm_virtqueue_reset(struct vmm_virtqueue *q); /* RING_RESET, and mmio's QueueReady = 0 */

/*
 * Before asking for doorbells: a driver that answers at once saves its exit, and us the way to sleep and back. Looks
 * for requests as long as that has been paying off (at most VMM_PATIENCE); true: there are some. The guest that is
 * slower, or has no processor to itself, soon makes it look no more.
 */
bool vmm_virtqueue_poll(struct vmm_virtqueue *q);
#define VMM_PATIENCE 30000 /* ns: about what a doorbell costs both sides */

/* The doorbell without an ioeventfd. */
void vmm_virtqueue_ring(struct vmm_virtqueue *q);

/* ---- for state.c ---- */

/* DRIVER_OK: doorbells, unless they are there, go to the I/O thread; what was offered before is looked at. */
void vmm_virtio_start(struct vmm_virtio *dev);
/* Forget what is in flight; doorbells stay, and are not answered. */
void vmm_virtio_halt(struct vmm_virtio *dev);
void vmm_virtio_stop(struct vmm_virtio *dev); /* and doorbells go */
/* virtio 1.2, 3.1.1 step 5: a subset of what was offered, and a driver that knows version 1. */
bool vmm_virtio_acceptable(const struct vmm_virtio *dev, uint64_t features);
/* enum vmm_queue_features */
uint32_t vmm_virtio_ring_features(uint64_t agreed);

#endif
