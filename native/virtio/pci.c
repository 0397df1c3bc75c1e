/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio over PCI, modern only (virtio 1.2, 4.1): the driver's registers in front of the status machine in virtio.h.
 *
 * The function's lock is the device's: it is held in every op of the function and of the transport, and taken by BAR 0.
 */
#include "devices/msix.h"
#include "virtio/virtio.h"

#include "core/eventfd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* BAR 0: a page for each structure, so that one of them could be mapped or trapped alone. */
enum bar_page {
    PAGE_COMMON,
    PAGE_ISR,
    PAGE_DEVICE,
    PAGE_NOTIFY,
    PAGE_MSIX_TABLE,
    PAGE_MSIX_PENDING,
    PAGES = 8, /* a BAR's size is a power of two */
};
#define PAGE_SIZE 0x1000u
#define BAR_SIZE (PAGES * PAGE_SIZE)
#define NOTIFY_MULTIPLIER 4
#define VECTORS_MAX (VMM_VIRTIO_QUEUES_MAX + 1) /* one for configuration changes */

_Static_assert(VMM_VIRTIO_CONFIG_MAX <= PAGE_SIZE && VMM_VIRTIO_QUEUES_MAX * NOTIFY_MULTIPLIER <= PAGE_SIZE &&
                   VECTORS_MAX * VMM_MSIX_ENTRY <= PAGE_SIZE,
               "each structure fits its page");

/* struct virtio_pci_common_cfg (4.1.4.3) */
enum common_register {
    DEVICE_FEATURE_SELECT = 0,
    DEVICE_FEATURE = 4,
    DRIVER_FEATURE_SELECT = 8,
    DRIVER_FEATURE = 12,
    CONFIG_MSIX_VECTOR = 16,
    NUM_QUEUES = 18,
    DEVICE_STATUS = 20,
    CONFIG_GENERATION = 21,
    QUEUE_SELECT = 22,
    QUEUE_SIZE = 24,
    QUEUE_MSIX_VECTOR = 26,
    QUEUE_ENABLE = 28,
    QUEUE_NOTIFY_OFF = 30,
    QUEUE_DESC = 32, /* 64 bits each, accessed by halves */
    QUEUE_DRIVER = 40,
    QUEUE_DEVICE = 48,
    QUEUE_NOTIFY_DATA = 56,
    QUEUE_RESET = 58,
    COMMON_SIZE = 60,
};

/* Vendor-specific capabilities (4.1.4): what each tells of. */
enum capability { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_ISR = 3, CAP_DEVICE = 4, CAP_PCI_CFG = 5 };
enum { CAP_BAR = 4, CAP_OFFSET = 8, CAP_LENGTH = 12, CAP_SIZE = 16, CAP_DATA = 16 };
#define CAP_ID_VENDOR 0x09

enum isr { ISR_QUEUE = 1, ISR_CONFIG = 2 };

struct vmm_virtio_pci {
    struct vmm_pci_function function;
    struct vmm_msix msix;
    struct vmm_virtio *dev;
    uint32_t device_feature_select, driver_feature_select;
    uint16_t queue_select, config_vector, queue_vectors[VMM_VIRTIO_QUEUES_MAX];
    uint32_t window;       /* offset of the PCI configuration access capability */
    pthread_mutex_t wire;  /* around dev->isr, messages and the pin; below the device's lock */
    bool messages;         /* MSI-X is on: the pin is silent */
    bool live;             /* doorbells are wanted on eventfds */
    uint64_t doorbells_at; /* where they are; VMM_PCI_NOWHERE: they exit */
};

/* ---- interrupts: the pin is asserted while the ISR is not zero and MSI-X is off (4.1.4.5.1) ---- */

static uint32_t change_isr(struct vmm_virtio_pci *t, uint32_t set, uint32_t clear)
{
    pthread_mutex_lock(&t->wire);
    uint32_t before = atomic_load(&t->dev->isr), after = (before & ~clear) | set;
    atomic_store(&t->dev->isr, after);
    vmm_pci_interrupt(&t->function, after && !t->messages);
    pthread_mutex_unlock(&t->wire);
    return before;
}

static void choose_messages(struct vmm_virtio_pci *t)
{
    pthread_mutex_lock(&t->wire);
    t->messages = t->msix.enabled;
    pthread_mutex_unlock(&t->wire);
    change_isr(t, 0, 0);
}

static void interrupt(struct vmm_virtio_pci *t, uint16_t vector, uint32_t isr)
{
    if (t->msix.enabled)
        vmm_msix_signal(&t->msix, vector);
    else
        change_isr(t, isr, 0);
}

static void queue_interrupt(void *opaque, unsigned queue)
{
    struct vmm_virtio_pci *t = opaque;
    interrupt(t, t->queue_vectors[queue], ISR_QUEUE);
}

static void config_interrupt(void *opaque)
{
    struct vmm_virtio_pci *t = opaque;
    interrupt(t, t->config_vector, ISR_CONFIG);
}

/* A vector that does not exist is not taken, which the driver sees when it reads it back (4.1.5.1.2.1). */
static uint16_t existing_vector(const struct vmm_virtio_pci *t, uint64_t vector)
{
    return vector < t->msix.n ? (uint16_t)vector : VMM_MSIX_NONE;
}

/* ---- doorbells ---- */

static void assign_doorbells(struct vmm_virtio_pci *t, uint64_t bar, bool assign)
{
    for (uint32_t i = 0; i < t->dev->n_queues; i++)
        /* One that KVM refuses exits instead, and rings all the same. */
        vmm_vm_ioeventfd(t->dev->vm, VMM_MMIO, bar + PAGE_NOTIFY * PAGE_SIZE + i * NOTIFY_MULTIPLIER, 0,
                         false, 0, t->dev->queues[i].doorbell, assign);
}

static void route_doorbells(struct vmm_virtio_pci *t)
{
    uint64_t bar = t->live ? vmm_pci_bar_address(&t->function, 0) : VMM_PCI_NOWHERE;
    if (bar == t->doorbells_at)
        return;
    if (t->doorbells_at != VMM_PCI_NOWHERE)
        assign_doorbells(t, t->doorbells_at, false);
    t->doorbells_at = bar;
    if (bar != VMM_PCI_NOWHERE)
        assign_doorbells(t, bar, true);
}

static void doorbells(void *opaque, bool on)
{
    struct vmm_virtio_pci *t = opaque;
    t->live = on;
    route_doorbells(t);
}

static void ring(struct vmm_virtio_pci *t, uint64_t offset)
{
    struct vmm_virtqueue *q = vmm_virtio_queue(t->dev, (uint32_t)(offset / NOTIFY_MULTIPLIER));
    if (q && offset % NOTIFY_MULTIPLIER == 0)
        vmm_virtqueue_ring(q);
}

/* ---- common configuration ---- */

static void reset(void *opaque)
{
    struct vmm_virtio_pci *t = opaque;
    t->device_feature_select = t->driver_feature_select = 0;
    t->queue_select = 0;
    t->config_vector = VMM_MSIX_NONE;
    for (unsigned i = 0; i < VMM_VIRTIO_QUEUES_MAX; i++)
        t->queue_vectors[i] = VMM_MSIX_NONE;
    change_isr(t, 0, UINT32_MAX);
}

/* Width of the register that starts at an offset; 0: none does. */
static uint32_t register_size(uint64_t offset)
{
    static const uint8_t sizes[COMMON_SIZE] = {
        [DEVICE_FEATURE_SELECT] = 4, [DEVICE_FEATURE] = 4,
        [DRIVER_FEATURE_SELECT] = 4, [DRIVER_FEATURE] = 4,
        [CONFIG_MSIX_VECTOR] = 2,    [NUM_QUEUES] = 2,
        [DEVICE_STATUS] = 1,         [CONFIG_GENERATION] = 1,
        [QUEUE_SELECT] = 2,          [QUEUE_SIZE] = 2,
        [QUEUE_MSIX_VECTOR] = 2,     [QUEUE_ENABLE] = 2,
        [QUEUE_NOTIFY_OFF] = 2,      [QUEUE_DESC] = 4,
        [QUEUE_DESC + 4] = 4,        [QUEUE_DRIVER] = 4,
        [QUEUE_DRIVER + 4] = 4,      [QUEUE_DEVICE] = 4,
        [QUEUE_DEVICE + 4] = 4,      [QUEUE_NOTIFY_DATA] = 2,
        [QUEUE_RESET] = 2,
    };
    return offset < COMMON_SIZE ? sizes[offset] : 0;
}

static uint32_t queue_read(const struct vmm_virtio_pci *t, const struct vmm_virtqueue *q, uint64_t offset)
{
    switch (offset) {
    case QUEUE_SIZE:
        return q->ring.size;
    case QUEUE_MSIX_VECTOR:
        return t->queue_vectors[q->index];
    case QUEUE_ENABLE:
        return q->enabled;
    case QUEUE_NOTIFY_OFF:
    case QUEUE_NOTIFY_DATA:
        return q->index;
    case QUEUE_RESET: /* over by the time its write is */
        return 0;
    default: /* the three areas */
        return vmm_virtqueue_area_read(q, (enum vmm_queue_area)((offset - QUEUE_DESC) / 8), offset & 4);
    }
}

static uint32_t common_read(struct vmm_virtio_pci *t, uint64_t offset)
{
    struct vmm_virtio *dev = t->dev;
    switch (offset) {
    case DEVICE_FEATURE_SELECT:
        return t->device_feature_select;
    case DEVICE_FEATURE:
        return vmm_virtio_device_features(dev, t->device_feature_select);
    case DRIVER_FEATURE_SELECT:
        return t->driver_feature_select;
    case DRIVER_FEATURE:
        return t->driver_feature_select < 2
                   ? (uint32_t)(dev->driver_features >> (32 * t->driver_feature_select))
                   : 0;
    case CONFIG_MSIX_VECTOR:
        return t->config_vector;
    case NUM_QUEUES:
        return dev->n_queues;
    case DEVICE_STATUS:
        return dev->status;
    case CONFIG_GENERATION:
        return dev->generation & 0xff;
    case QUEUE_SELECT:
        return t->queue_select;
    }
    struct vmm_virtqueue *q = vmm_virtio_queue(dev, t->queue_select);
    return q ? queue_read(t, q, offset) : 0; /* a size of 0 says that there is no such queue */
}

static void queue_write(struct vmm_virtio_pci *t, struct vmm_virtqueue *q, uint64_t offset, uint32_t value)
{
    switch (offset) {
    case QUEUE_SIZE:
        vmm_virtqueue_size(q, value);
        return;
    case QUEUE_MSIX_VECTOR:
        t->queue_vectors[q->index] = existing_vector(t, value);
        return;
    case QUEUE_ENABLE: /* writing 0 is forbidden to the driver (4.1.4.3.2) */
        if (value == 1)
            vmm_virtqueue_enable(q);
        return;
    case QUEUE_RESET:
        if (value == 1 && (t->dev->agreed & VMM_F_RING_RESET)) {
            vmm_virtqueue_reset(q);
            t->queue_vectors[q->index] = VMM_MSIX_NONE;
        }
        return;
    case QUEUE_NOTIFY_OFF:
    case QUEUE_NOTIFY_DATA:
        return;
    default:
        vmm_virtqueue_area(q, (enum vmm_queue_area)((offset - QUEUE_DESC) / 8), offset & 4, value);
    }
}

static void common_write(struct vmm_virtio_pci *t, uint64_t offset, uint32_t value)
{
    switch (offset) {
    case DEVICE_FEATURE_SELECT:
        t->device_feature_select = value;
        return;
    case DRIVER_FEATURE_SELECT:
        t->driver_feature_select = value;
        return;
    case DRIVER_FEATURE:
        vmm_virtio_driver_features(t->dev, t->driver_feature_select, value);
        return;
    case CONFIG_MSIX_VECTOR:
        t->config_vector = existing_vector(t, value);
        return;
    case DEVICE_STATUS:
        vmm_virtio_write_status(t->dev, (uint8_t)value);
        return;
    case QUEUE_SELECT:
        t->queue_select = (uint16_t)value;
        return;
    case DEVICE_FEATURE:
    case NUM_QUEUES:
    case CONFIG_GENERATION:
        return;
    }
    struct vmm_virtqueue *q = vmm_virtio_queue(t->dev, t->queue_select);
    if (q)
        queue_write(t, q, offset, value);
}

/* ---- BAR 0 ---- */

/* A 64-bit field in one access: two halves, as the driver is to do it (4.1.3.1). */
static bool halves(uint64_t offset, uint32_t size)
{
    return size == 8 && offset % 8 == 0 && offset >= QUEUE_DESC && offset < QUEUE_NOTIFY_DATA;
}

static uint64_t bar_read(void *opaque, uint64_t offset, uint32_t size)
{
    struct vmm_virtio_pci *t = opaque;
    if (offset == PAGE_ISR * PAGE_SIZE) /* in every interrupt on the pin: not behind the device's work */
        return change_isr(t, 0, UINT32_MAX);
    VMM_VIRTIO_LOCKED(t->dev);
    uint64_t at = offset % PAGE_SIZE;
    switch (offset / PAGE_SIZE) {
    case PAGE_COMMON:
        if (halves(at, size))
            return common_read(t, at) | (uint64_t)common_read(t, at + 4) << 32;
        return register_size(at) == size ? common_read(t, at) : 0;
    case PAGE_DEVICE:
        return vmm_virtio_config_read(t->dev, at, size);
    case PAGE_MSIX_TABLE:
        return vmm_msix_table_read(&t->msix, at, size);
    case PAGE_MSIX_PENDING:
        return vmm_msix_pending_read(&t->msix, at, size);
    default:
        return UINT64_MAX;
    }
}

static void bar_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    struct vmm_virtio_pci *t = opaque;
    uint64_t at = offset % PAGE_SIZE;
    if (offset / PAGE_SIZE == PAGE_NOTIFY) {
        ring(t, at);
        return;
    }
    VMM_VIRTIO_LOCKED(t->dev);
    switch (offset / PAGE_SIZE) {
    case PAGE_COMMON:
        if (halves(at, size)) {
            common_write(t, at, (uint32_t)value);
            common_write(t, at + 4, (uint32_t)(value >> 32));
        } else if (register_size(at) == size) {
            common_write(t, at, (uint32_t)value);
        }
        return;
    case PAGE_DEVICE:
        vmm_virtio_config_write(t->dev, at, size, value);
        return;
    case PAGE_MSIX_TABLE:
        vmm_msix_table_write(&t->msix, at, size, value);
        return;
    }
}

const vmm_device_ops *vmm_virtio_pci_ops(void)
{
    static const vmm_device_ops ops = {bar_read, bar_write};
    return &ops;
}

/* ---- configuration space ---- */

/* The access that the driver has described in the PCI configuration access capability (4.1.4.9); false: none. */
static bool windowed(const struct vmm_virtio_pci *t, uint32_t *offset, uint32_t *length)
{
    const uint8_t *cap = t->function.config + t->window;
    *offset = vmm_pci_get(cap + CAP_OFFSET, 4);
    *length = vmm_pci_get(cap + CAP_LENGTH, 4);
    return cap[CAP_BAR] == 0 && (*length == 1 || *length == 2 || *length == 4) && *offset % *length == 0 &&
           *offset <= BAR_SIZE - *length;
}

static bool touches_data(const struct vmm_virtio_pci *t, uint32_t offset, uint32_t size)
{
    uint32_t data = t->window + CAP_DATA;
    return offset < data + 4 && data < offset + size;
}

static void config_read(void *opaque, uint32_t offset, uint32_t size)
{
    struct vmm_virtio_pci *t = opaque;
    uint32_t at, length;
    if (touches_data(t, offset, size) && windowed(t, &at, &length))
        vmm_pci_put(t->function.config + t->window + CAP_DATA, (uint32_t)bar_read(t, at, length), length);
}

static void config_written(void *opaque, uint32_t offset, uint32_t size)
{
    struct vmm_virtio_pci *t = opaque;
    vmm_msix_config_written(&t->msix);
    choose_messages(t);
    uint32_t at, length;
    if (touches_data(t, offset, size) && windowed(t, &at, &length))
        bar_write(t, at, length, vmm_pci_get(t->function.config + t->window + CAP_DATA, length));
}

static void decoded(void *opaque)
{
    route_doorbells(opaque);
}

static void function_reset(void *opaque)
{
    struct vmm_virtio_pci *t = opaque;
    vmm_msix_reset(&t->msix);
    choose_messages(t);
}

/* ---- state ---- */

_Static_assert(sizeof((vmm_virtio_pci_state *)0)->msix / sizeof(vmm_msix_entry_state) == VECTORS_MAX &&
                   sizeof((vmm_virtio_pci_state *)0)->queue_vectors ==
                       sizeof((struct vmm_virtio_pci *)0)->queue_vectors,
               "a state holds the largest device");

void vmm_virtio_pci_save(vmm_virtio_pci *t, vmm_virtio_pci_state *s)
{
    VMM_VIRTIO_LOCKED(t->dev);
    memset(s, 0, sizeof(*s));
    s->device_feature_select = t->device_feature_select;
    s->driver_feature_select = t->driver_feature_select;
    s->isr = atomic_load(&t->dev->isr);
    s->queue_select = t->queue_select;
    s->config_vector = t->config_vector;
    s->n_vectors = t->msix.n;
    memcpy(s->queue_vectors, t->queue_vectors, sizeof(s->queue_vectors));
    vmm_msix_save(&t->msix, s->msix);
}

static int check_vectors(const struct vmm_virtio_pci *t, const vmm_virtio_pci_state *s)
{
    if (s->n_vectors != t->msix.n)
        return vmm_error_set(-EINVAL, "%s: %u interrupt vectors, it has %u", t->dev->name, s->n_vectors,
                             t->msix.n);
    for (unsigned i = 0; i < VMM_VIRTIO_QUEUES_MAX; i++)
        if (s->queue_vectors[i] != existing_vector(t, s->queue_vectors[i]))
            return vmm_error_set(-EINVAL, "%s: queue %u has interrupt vector %u", t->dev->name, i,
                                 s->queue_vectors[i]);
    if (s->config_vector != existing_vector(t, s->config_vector))
        return vmm_error_set(-EINVAL, "%s: configuration has interrupt vector %u", t->dev->name,
                             s->config_vector);
    return s->isr & ~(uint32_t)(ISR_QUEUE | ISR_CONFIG)
               ? vmm_error_set(-EINVAL, "%s: interrupt status %#x", t->dev->name, s->isr)
               : 0;
}

int vmm_virtio_pci_load(vmm_virtio_pci *t, const vmm_virtio_pci_state *s)
{
    VMM_VIRTIO_LOCKED(t->dev);
    int rc = check_vectors(t, s);
    if (rc == 0)
        rc = vmm_msix_load(&t->msix, s->msix);
    if (rc < 0)
        return rc;
    t->device_feature_select = s->device_feature_select;
    t->driver_feature_select = s->driver_feature_select;
    t->queue_select = s->queue_select;
    t->config_vector = s->config_vector;
    memcpy(t->queue_vectors, s->queue_vectors, sizeof(t->queue_vectors));
    pthread_mutex_lock(&t->wire);
    t->messages = t->msix.enabled;
    atomic_store(&t->dev->isr, s->isr);
    vmm_pci_interrupt(&t->function, s->isr && !t->messages);
    pthread_mutex_unlock(&t->wire);
    return 0;
}

/* ---- create, destroy ---- */

static uint32_t add_capability(struct vmm_virtio_pci *t, enum capability type, uint32_t page, uint32_t length,
                               uint32_t extra)
{
    struct vmm_pci_function *f = &t->function;
    uint32_t at = vmm_pci_add_capability(f, CAP_ID_VENDOR, CAP_SIZE + extra);
    f->config[at + 2] = (uint8_t)(CAP_SIZE + extra);
    f->config[at + 3] = (uint8_t)type;
    vmm_pci_put(f->config + at + CAP_OFFSET, page * PAGE_SIZE, 4);
    vmm_pci_put(f->config + at + CAP_LENGTH, length, 4);
    return at;
}

static void add_capabilities(struct vmm_virtio_pci *t)
{
    struct vmm_pci_function *f = &t->function;
    add_capability(t, CAP_COMMON, PAGE_COMMON, COMMON_SIZE, 0);
    uint32_t notify = add_capability(t, CAP_NOTIFY, PAGE_NOTIFY, t->dev->n_queues * NOTIFY_MULTIPLIER, 4);
    vmm_pci_put(f->config + notify + CAP_SIZE, NOTIFY_MULTIPLIER, 4);
    add_capability(t, CAP_ISR, PAGE_ISR, 1, 0);
    if (t->dev->config_size)
        add_capability(t, CAP_DEVICE, PAGE_DEVICE, t->dev->config_size, 0);
    t->window = add_capability(t, CAP_PCI_CFG, 0, 0, 4);
    f->writable[t->window + CAP_BAR] = 0xff;
    for (unsigned i = CAP_OFFSET; i < CAP_DATA + 4; i++)
        f->writable[t->window + i] = 0xff;
}

/* PCI's class for a virtio device type (PCI Code and ID Assignment 1.11; virtio itself leaves it open). */
static uint32_t class_of(uint32_t id)
{
    switch (id) {
    case 1:
        return 0x020000; /* net: Ethernet controller */
    case 2:
    case 9:
    case 26:
        return 0x018000; /* blk, 9P, file system: other mass storage */
    case 3:
    case 19:
        return 0x078000; /* console, vsock: other communication device */
    default:
        return 0xff0000; /* fits no defined class: rng, balloon, ... */
    }
}

static int create(struct vmm_virtio_pci *t, vmm_pci_host *host, int slot)
{
    struct vmm_virtio *dev = t->dev;
    static const struct vmm_pci_function_ops ops = {.config_read = config_read,
                                                    .config_written = config_written,
                                                    .decoded = decoded,
                                                    .reset = function_reset};
    const struct vmm_pci_identity identity = {
        .vendor = 0x1af4, /* 4.1.2 */
        .device = (uint16_t)(0x1040 + dev->id),
        .revision = 1,
        .subsystem_vendor = 0x1af4,
        .subsystem = (uint16_t)(0x40 + dev->id),
        .class_code = class_of(dev->id),
    };
    vmm_pci_function_init(&t->function, &identity, true, &dev->lock, &ops, t);
    vmm_pci_add_bar(&t->function, 0, BAR_SIZE, vmm_virtio_pci_ops(), t);
    int rc = vmm_msix_init(&t->msix, &t->function, vmm_pci_msi(host), dev->n_queues + 1, 0,
                           PAGE_MSIX_TABLE * PAGE_SIZE, PAGE_MSIX_PENDING * PAGE_SIZE);
    if (rc < 0)
        return rc;
    add_capabilities(t);
    return vmm_pci_insert(host, &t->function, slot);
}

int vmm_virtio_pci_create(vmm_virtio *dev, vmm_pci_host *host, int slot, vmm_virtio_pci **out)
{
    static const struct vmm_virtio_transport transport = {queue_interrupt, config_interrupt, doorbells,
                                                          reset};
    *out = NULL;
    struct vmm_virtio_pci *t = calloc(1, sizeof(*t));
    if (!t)
        return vmm_error_set(-ENOMEM, "virtio-pci");
    t->dev = dev;
    t->doorbells_at = VMM_PCI_NOWHERE;
    pthread_mutex_init(&t->wire, NULL);
    slot = create(t, host, slot);
    if (slot < 0) {
        vmm_virtio_pci_destroy(t);
        return slot;
    }
    reset(t);
    dev->transport = &transport;
    dev->transport_opaque = t;
    *out = t;
    return slot;
}

void vmm_virtio_pci_destroy(vmm_virtio_pci *t)
{
    if (!t)
        return;
    vmm_pci_remove(&t->function);
    vmm_msix_deinit(&t->msix);
    pthread_mutex_destroy(&t->wire);
    free(t);
}
