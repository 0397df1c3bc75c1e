/* SPDX-License-Identifier: Apache-2.0 */
/* The virtio-mmio transport, version 2 (virtio 1.2, 4.2). */
#include "core/eventfd.h"
#include "virtio/virtio.h"

#include <errno.h>
#include <stdlib.h>

/* virtio 1.2, 4.2.2 */
enum {
    MAGIC_VALUE = 0x000,
    VERSION = 0x004,
    DEVICE_ID = 0x008,
    VENDOR_ID = 0x00c,
    DEVICE_FEATURES = 0x010,
    DEVICE_FEATURES_SEL = 0x014,
    DRIVER_FEATURES = 0x020,
    DRIVER_FEATURES_SEL = 0x024,
    QUEUE_SEL = 0x030,
    QUEUE_NUM_MAX = 0x034,
    QUEUE_NUM = 0x038,
    QUEUE_READY = 0x044,
    QUEUE_NOTIFY = 0x050,
    INTERRUPT_STATUS = 0x060,
    INTERRUPT_ACK = 0x064,
    STATUS = 0x070,
    QUEUE_DESC = 0x080,   /* low, high */
    QUEUE_DRIVER = 0x090, /* low, high */
    QUEUE_DEVICE = 0x0a0, /* low, high */
    SHM_LEN = 0x0b0,      /* low, high */
    SHM_BASE = 0x0b8,     /* low, high */
    QUEUE_RESET = 0x0c0,
    CONFIG_GENERATION = 0x0fc,
    CONFIG = 0x100,
};

#define MAGIC 0x74726976u  /* "virt" */
#define VENDOR 0x4d4d5650u /* "PVMM" */
#define ISR_QUEUE 1u
#define ISR_CONFIG 2u

struct vmm_virtio_mmio {
    struct vmm_virtio *dev;
    uint64_t address;
    const vmm_line *line;
    uint32_t device_select, driver_select, queue_select;
    bool doorbells;       /* routed to the eventfds */
    pthread_mutex_t wire; /* around dev->isr and the line's level; innermost */
};

/* ---- interrupts: the line is up while the status register is not zero ---- */

static void change_isr(struct vmm_virtio_mmio *t, uint32_t set, uint32_t clear)
{
    pthread_mutex_lock(&t->wire);
    uint32_t before = atomic_load(&t->dev->isr), after = (before & ~clear) | set;
    atomic_store(&t->dev->isr, after);
    /* An acknowledgement that leaves something makes a new edge: the wire may be taken for edge-triggered. */
    if (clear && before && after)
        vmm_line_set(t->line, 0);
    if (!before != !after || (clear && after))
        vmm_line_set(t->line, after != 0);
    pthread_mutex_unlock(&t->wire);
}

static void queue_interrupt(void *opaque, unsigned queue)
{
    (void)queue;
    change_isr(opaque, ISR_QUEUE, 0);
}

static void config_interrupt(void *opaque)
{
    change_isr(opaque, ISR_CONFIG, 0);
}

static void route_doorbells(void *opaque, bool on)
{
    struct vmm_virtio_mmio *t = opaque;
    if (t->doorbells == on)
        return;
    t->doorbells = on;
    /* Where KVM refuses, the write exits and rings the eventfd from here. */
    for (uint32_t i = 0; i < t->dev->n_queues; i++)
        vmm_vm_ioeventfd(t->dev->vm, VMM_MMIO, t->address + QUEUE_NOTIFY, 4, true, i,
                         t->dev->queues[i].doorbell, on);
}

static void power_on(void *opaque)
{
    struct vmm_virtio_mmio *t = opaque;
    t->device_select = t->driver_select = t->queue_select = 0;
    change_isr(t, 0, UINT32_MAX);
}

static const struct vmm_virtio_transport transport_ops = {
    .queue_interrupt = queue_interrupt,
    .config_interrupt = config_interrupt,
    .doorbells = route_doorbells,
    .reset = power_on,
};

/* ---- registers ---- */

static uint32_t read_queue(struct vmm_virtio_mmio *t, uint64_t offset)
{
    const struct vmm_virtqueue *q = vmm_virtio_queue(t->dev, t->queue_select);
    if (!q)
        return 0;
    switch (offset) {
    case QUEUE_NUM_MAX:
        return q->size_max;
    case QUEUE_READY:
        return q->enabled;
    default: /* the areas are for writing alone; QUEUE_RESET is over when the write returns */
        return 0;
    }
}

static uint32_t read_register(struct vmm_virtio_mmio *t, uint64_t offset)
{
    switch (offset) {
    case MAGIC_VALUE:
        return MAGIC;
    case VERSION:
        return 2;
    case DEVICE_ID:
        return t->dev->id;
    case VENDOR_ID:
        return VENDOR;
    case DEVICE_FEATURES:
        return vmm_virtio_device_features(t->dev, t->device_select);
    case STATUS:
        return t->dev->status;
    case CONFIG_GENERATION:
        return t->dev->generation;
    case SHM_LEN: /* no shared memory region has this id (4.2.2: all ones) */
    case SHM_LEN + 4:
    case SHM_BASE:
    case SHM_BASE + 4:
        return UINT32_MAX;
    default:
        return read_queue(t, offset);
    }
}

static uint64_t mmio_read(void *opaque, uint64_t offset, uint32_t size)
{
    struct vmm_virtio_mmio *t = opaque;
    if (offset == INTERRUPT_STATUS && size == 4) /* in every interrupt: not behind the device's work */
        return atomic_load(&t->dev->isr);
    VMM_VIRTIO_LOCKED(t->dev);
    if (offset >= CONFIG)
        return vmm_virtio_config_read(t->dev, offset - CONFIG, size);
    return size == 4 ? read_register(t, offset) : 0; /* 4.2.2.2: registers are 32 bits wide */
}

static void write_queue(struct vmm_virtio_mmio *t, uint64_t offset, uint32_t value)
{
    struct vmm_virtqueue *q = vmm_virtio_queue(t->dev, t->queue_select);
    if (!q)
        return;
    switch (offset) {
    case QUEUE_NUM:
        vmm_virtqueue_size(q, value);
        break;
    case QUEUE_READY:
        if (value & 1)
            vmm_virtqueue_enable(q);
        else
            vmm_virtqueue_reset(q);
        break;
    case QUEUE_RESET:
        if (vmm_virtio_has(t->dev, 40) && (value & 1))
            vmm_virtqueue_reset(q);
        break;
    case QUEUE_DESC:
    case QUEUE_DESC + 4:
        vmm_virtqueue_area(q, VMM_AREA_DESC, offset & 4, value);
        break;
    case QUEUE_DRIVER:
    case QUEUE_DRIVER + 4:
        vmm_virtqueue_area(q, VMM_AREA_DRIVER, offset & 4, value);
        break;
    case QUEUE_DEVICE:
    case QUEUE_DEVICE + 4:
        vmm_virtqueue_area(q, VMM_AREA_DEVICE, offset & 4, value);
        break;
    default:
        break;
    }
}

static void write_register(struct vmm_virtio_mmio *t, uint64_t offset, uint32_t value)
{
    switch (offset) {
    case DEVICE_FEATURES_SEL:
        t->device_select = value;
        break;
    case DRIVER_FEATURES_SEL:
        t->driver_select = value;
        break;
    case DRIVER_FEATURES:
        vmm_virtio_driver_features(t->dev, t->driver_select, value);
        break;
    case QUEUE_SEL:
        t->queue_select = value;
        break;
    case STATUS:
        vmm_virtio_write_status(t->dev, (uint8_t)value);
        break;
    default:
        write_queue(t, offset, value);
    }
}

static void mmio_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    struct vmm_virtio_mmio *t = opaque;
    if (offset == INTERRUPT_ACK && size == 4) {
        change_isr(t, 0, (uint32_t)value);
        return;
    }
    if (offset == QUEUE_NOTIFY && size == 4) {
        struct vmm_virtqueue *q = vmm_virtio_queue(t->dev, (uint32_t)value);
        if (q)
            vmm_virtqueue_ring(q);
        return;
    }
    VMM_VIRTIO_LOCKED(t->dev);
    if (offset >= CONFIG)
        vmm_virtio_config_write(t->dev, offset - CONFIG, size, value);
    else if (size == 4)
        write_register(t, offset, (uint32_t)value);
}

const vmm_device_ops *vmm_virtio_mmio_ops(void)
{
    static const vmm_device_ops ops = {mmio_read, mmio_write};
    return &ops;
}

/* ---- state ---- */

void vmm_virtio_mmio_save(vmm_virtio_mmio *t, vmm_virtio_mmio_state *s)
{
    VMM_VIRTIO_LOCKED(t->dev);
    *s = (vmm_virtio_mmio_state){.device_select = t->device_select,
                                 .driver_select = t->driver_select,
                                 .queue_select = t->queue_select,
                                 .isr = atomic_load(&t->dev->isr)};
}

/* Not change_isr: an edge here would be an interrupt that the saved machine did not have. */
static void set_isr(struct vmm_virtio_mmio *t, uint32_t isr)
{
    pthread_mutex_lock(&t->wire);
    if (!atomic_exchange(&t->dev->isr, isr) != !isr)
        vmm_line_set(t->line, isr != 0);
    pthread_mutex_unlock(&t->wire);
}

int vmm_virtio_mmio_load(vmm_virtio_mmio *t, const vmm_virtio_mmio_state *s)
{
    VMM_VIRTIO_LOCKED(t->dev);
    if (s->isr & ~(ISR_QUEUE | ISR_CONFIG))
        return vmm_error_set(-EINVAL, "%s: interrupt status %#x", t->dev->name, s->isr);
    t->device_select = s->device_select;
    t->driver_select = s->driver_select;
    t->queue_select = s->queue_select;
    set_isr(t, s->isr);
    return 0;
}

/* ---- life ---- */

int vmm_virtio_mmio_create(vmm_virtio *dev, uint64_t address, const vmm_line *line, vmm_virtio_mmio **out)
{
    struct vmm_virtio_mmio *t = calloc(1, sizeof(*t));
    if (!t)
        return vmm_error_set(-ENOMEM, "%s: transport", dev->name);
    t->dev = dev;
    t->address = address;
    t->line = line;
    pthread_mutex_init(&t->wire, NULL);
    dev->transport = &transport_ops;
    dev->transport_opaque = t;
    *out = t;
    return 0;
}

void vmm_virtio_mmio_destroy(vmm_virtio_mmio *t)
{
    if (!t)
        return;
    pthread_mutex_destroy(&t->wire);
    free(t);
}
