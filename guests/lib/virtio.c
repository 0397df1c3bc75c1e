/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio.h"

#include "pci.h"

enum { /* virtio 1.2, 4.1.4.3: the common configuration structure */
       COMMON_DEVICE_FEATURE_SELECT = 0x00,
       COMMON_DEVICE_FEATURE = 0x04,
       COMMON_DRIVER_FEATURE_SELECT = 0x08,
       COMMON_DRIVER_FEATURE = 0x0c,
       COMMON_STATUS = 0x14,
       COMMON_QUEUE_SELECT = 0x16,
       COMMON_QUEUE_SIZE = 0x18,
       COMMON_QUEUE_VECTOR = 0x1a,
       COMMON_QUEUE_ENABLE = 0x1c,
       COMMON_QUEUE_NOTIFY_OFF = 0x1e,
       COMMON_QUEUE_DESC = 0x20,
       COMMON_QUEUE_DRIVER = 0x28,
       COMMON_QUEUE_DEVICE = 0x30
};

enum { /* 4.2.2 */
       MMIO_MAGIC = 0x00,
       MMIO_VERSION = 0x04,
       MMIO_DEVICE_ID = 0x08,
       MMIO_DEVICE_FEATURES = 0x10,
       MMIO_DEVICE_FEATURES_SELECT = 0x14,
       MMIO_DRIVER_FEATURES = 0x20,
       MMIO_DRIVER_FEATURES_SELECT = 0x24,
       MMIO_QUEUE_SELECT = 0x30,
       MMIO_QUEUE_SIZE_MAX = 0x34,
       MMIO_QUEUE_SIZE = 0x38,
       MMIO_QUEUE_READY = 0x44,
       MMIO_QUEUE_NOTIFY = 0x50,
       MMIO_INTERRUPT_STATUS = 0x60,
       MMIO_INTERRUPT_ACK = 0x64,
       MMIO_STATUS = 0x70,
       MMIO_QUEUE_DESC = 0x80,
       MMIO_QUEUE_DRIVER = 0x90,
       MMIO_QUEUE_DEVICE = 0xa0,
       MMIO_CONFIG = 0x100,
       MMIO_MAGIC_VALUE = 0x74726976
};

enum { CAPABILITY_COMMON = 1, CAPABILITY_NOTIFY, CAPABILITY_ISR, CAPABILITY_DEVICE }; /* 4.1.4 */
enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };                                  /* 2.7.6, 2.7.8 */
enum { PACKED_AVAIL = 1 << 7, PACKED_USED = 1 << 15 };                                /* 2.8.1 */
enum { EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC };                                     /* 2.8.10 */

/* Order among plain stores and loads is the processor's own; a store before a load needs this. */
#define COMPILER_BARRIER() __asm__ volatile("" ::: "memory")
#define FULL_BARRIER() __asm__ volatile("lock; orl $0, (%%rsp)" ::: "memory", "cc")

void *virtio_memory(size_t size, size_t alignment)
{
    extern char image_end[];
    static uintptr_t next;
    if (!next)
        next = (uintptr_t)image_end;
    next = (next + alignment - 1) & ~(alignment - 1);
    next += size;
    return (void *)(next - size);
}

/* ---- where devices are ---- */

static void find_structures(struct virtio_device *device)
{
    unsigned f = device->function, at = 0;
    pci_write16(f, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    while ((at = pci_capability(f, PCI_CAPABILITY_VENDOR, at))) {
        uint8_t type = pci_read8(f, at + 3);
        uintptr_t *const found[] = {NULL, &device->common, &device->notify, &device->isr, &device->config};
        if (type < CAPABILITY_COMMON || type > CAPABILITY_DEVICE || *found[type])
            continue; /* the first of a type is the one to use */
        *found[type] = pci_bar(f, pci_read8(f, at + 4)) + pci_read32(f, at + 8);
        if (type == CAPABILITY_NOTIFY)
            device->notify_multiplier = pci_read32(f, at + 16);
    }
    REQUIRE(EXIT_DEVICE, device->common && device->notify && device->isr);
}

static bool find_pci(unsigned id, unsigned n, struct virtio_device *device)
{
    int function = pci_find((0x1040 + id) << 16 | 0x1af4, n);
    if (function < 0)
        return false;
    *device = (struct virtio_device){.pci = true, .function = (unsigned)function};
    device->irq = pci_read8(device->function, PCI_INTERRUPT_LINE);
    find_structures(device);
    return true;
}

static bool is_there(uintptr_t base, unsigned id)
{
    return mmio_read32(base + MMIO_MAGIC) == MMIO_MAGIC_VALUE && mmio_read32(base + MMIO_VERSION) == 2 &&
           mmio_read32(base + MMIO_DEVICE_ID) == id;
}

static bool find_mmio(unsigned id, unsigned n, struct virtio_device *device)
{
    static const char name[] = "virtio_mmio.device=";
    for (const char *at = boot_info()->command_line; *at; at += *at != 0) {
        if (*at != *name || memcmp(at, name, sizeof name - 1))
            continue;
        while (*at && *at != '@')
            at++;
        at += *at == '@';
        uintptr_t base = parse_number(&at);
        at += *at == ':';
        unsigned irq = (unsigned)parse_number(&at);
        if (is_there(base, id) && n-- == 0) {
            *device = (struct virtio_device){.common = base, .config = base + MMIO_CONFIG, .irq = irq};
            return true;
        }
    }
    return false;
}

bool virtio_find(unsigned id, unsigned n, struct virtio_device *device)
{
    return find_pci(id, n, device) || find_mmio(id, n, device);
}

/* ---- the device ---- */

uint8_t virtio_status(const struct virtio_device *device)
{
    return device->pci ? mmio_read8(device->common + COMMON_STATUS)
                       : (uint8_t)mmio_read32(device->common + MMIO_STATUS);
}

void virtio_set_status(const struct virtio_device *device, uint8_t bits)
{
    uint8_t status = virtio_status(device) | bits;
    if (device->pci)
        mmio_write8(device->common + COMMON_STATUS, status);
    else
        mmio_write32(device->common + MMIO_STATUS, status);
}

void virtio_reset(struct virtio_device *device)
{
    if (device->pci)
        mmio_write8(device->common + COMMON_STATUS, 0);
    else
        mmio_write32(device->common + MMIO_STATUS, 0);
    while (virtio_status(device)) /* 4.1.4.3.2: done when it reads back as 0 */
        ;
}

uint64_t virtio_offered(const struct virtio_device *device)
{
    uint64_t offered = 0;
    for (unsigned half = 0; half < 2; half++) {
        mmio_write32(device->common +
                         (device->pci ? COMMON_DEVICE_FEATURE_SELECT : MMIO_DEVICE_FEATURES_SELECT),
                     half);
        uint64_t bits =
            mmio_read32(device->common + (device->pci ? COMMON_DEVICE_FEATURE : MMIO_DEVICE_FEATURES));
        offered |= bits << 32 * half;
    }
    return offered;
}

void virtio_negotiate(struct virtio_device *device, uint64_t wanted)
{
    virtio_reset(device);
    virtio_set_status(device, VIRTIO_ACKNOWLEDGE);
    virtio_set_status(device, VIRTIO_DRIVER);
    uint64_t offered = virtio_offered(device);
    REQUIRE(EXIT_DEVICE, offered & VIRTIO_F_VERSION_1);
    device->agreed = offered & (wanted | VIRTIO_F_VERSION_1);
    for (unsigned half = 0; half < 2; half++) {
        mmio_write32(device->common +
                         (device->pci ? COMMON_DRIVER_FEATURE_SELECT : MMIO_DRIVER_FEATURES_SELECT),
                     half);
        mmio_write32(device->common + (device->pci ? COMMON_DRIVER_FEATURE : MMIO_DRIVER_FEATURES),
                     (uint32_t)(device->agreed >> 32 * half));
    }
    virtio_set_status(device, VIRTIO_FEATURES_OK);
    REQUIRE(EXIT_DEVICE, virtio_status(device) & VIRTIO_FEATURES_OK);
}

void virtio_driver_ok(struct virtio_device *device)
{
    virtio_set_status(device, VIRTIO_DRIVER_OK);
    REQUIRE(EXIT_DEVICE, !(virtio_status(device) & VIRTIO_NEEDS_RESET));
}

uint8_t virtio_isr(const struct virtio_device *device)
{
    if (device->pci)
        return mmio_read8(device->isr);
    uint32_t status = mmio_read32(device->common + MMIO_INTERRUPT_STATUS);
    mmio_write32(device->common + MMIO_INTERRUPT_ACK, status);
    return (uint8_t)status;
}

/* ---- queues: set-up ---- */

static void select_queue(const struct virtio_device *device, unsigned index)
{
    if (device->pci)
        mmio_write16(device->common + COMMON_QUEUE_SELECT, (uint16_t)index);
    else
        mmio_write32(device->common + MMIO_QUEUE_SELECT, index);
}

void virtqueue_vector(struct virtio_device *device, unsigned index, uint16_t entry)
{
    select_queue(device, index);
    mmio_write16(device->common + COMMON_QUEUE_VECTOR, entry);
    REQUIRE(EXIT_DEVICE, mmio_read16(device->common + COMMON_QUEUE_VECTOR) == entry);
}

static uint16_t queue_room(const struct virtio_device *device)
{
    return device->pci ? mmio_read16(device->common + COMMON_QUEUE_SIZE)
                       : (uint16_t)mmio_read32(device->common + MMIO_QUEUE_SIZE_MAX);
}

void virtqueue_enable(const struct virtio_device *device, unsigned index, uint16_t size, uint64_t desc,
                      uint64_t driver, uint64_t device_area)
{
    const uint64_t areas[] = {desc, driver, device_area};
    uintptr_t common = device->common, at = common + (device->pci ? COMMON_QUEUE_DESC : MMIO_QUEUE_DESC);
    select_queue(device, index);
    if (device->pci)
        mmio_write16(common + COMMON_QUEUE_SIZE, size);
    else
        mmio_write32(common + MMIO_QUEUE_SIZE, size);
    for (unsigned i = 0; i < 3; i++, at += device->pci ? 8 : 16) {
        mmio_write32(at, (uint32_t)areas[i]);
        mmio_write32(at + 4, (uint32_t)(areas[i] >> 32));
    }
    if (device->pci)
        mmio_write16(common + COMMON_QUEUE_ENABLE, 1);
    else
        mmio_write32(common + MMIO_QUEUE_READY, 1);
}

static void enable(const struct virtqueue *queue, const volatile void *desc, const volatile void *driver,
                   const volatile void *device_area)
{
    virtqueue_enable(queue->device, queue->index, queue->size, (uintptr_t)desc, (uintptr_t)driver,
                     (uintptr_t)device_area);
}

/* What of fresh memory must be zero is written: little, for kernel code may be slow. */
static void start_split(struct virtqueue *queue, bool tables)
{
    queue->desc = virtio_memory(queue->size * sizeof *queue->desc, 16);
    queue->avail = virtio_memory(sizeof *queue->avail, 2);
    queue->used = virtio_memory(sizeof *queue->used, 4);
    if (tables)
        queue->tables = virtio_memory((size_t)queue->requests * queue->chain * sizeof *queue->tables, 16);
    queue->avail->flags = queue->interrupts ? 0 : AVAIL_NO_INTERRUPT;
    queue->avail->index = 0;
    queue->used->flags = queue->used->index = 0;
    queue->avail->ring[queue->size] = queue->interrupts ? 0 : 0x8000;
    queue->used->ring[queue->size].id = 0;
    enable(queue, queue->desc, queue->avail, queue->used);
}

static void start_packed(struct virtqueue *queue, bool tables)
{
    queue->ring = virtio_memory(queue->size * sizeof *queue->ring, 16);
    for (unsigned i = 0; i < queue->size; i++)
        queue->ring[i].flags = 0;
    queue->driver = virtio_memory(sizeof *queue->driver, 4);
    queue->events = virtio_memory(sizeof *queue->events, 4);
    if (tables)
        queue->tables = virtio_memory((size_t)queue->requests * queue->chain * sizeof *queue->tables, 16);
    *queue->driver = (struct virtq_event){.flags = queue->interrupts ? EVENT_ENABLE : EVENT_DISABLE};
    *queue->events = (struct virtq_event){.flags = EVENT_ENABLE};
    queue->next_wrap = queue->taken_wrap = queue->published_wrap = true; /* 2.8.1 */
    enable(queue, queue->ring, queue->driver, queue->events);
}

void virtqueue_start(struct virtio_device *device, unsigned index, unsigned size_max, unsigned chain,
                     bool indirect, bool interrupts, struct virtqueue *queue)
{
    select_queue(device, index);
    uint16_t room = queue_room(device);
    uintptr_t doorbell = device->common + MMIO_QUEUE_NOTIFY;
    if (device->pci)
        doorbell = device->notify +
                   mmio_read16(device->common + COMMON_QUEUE_NOTIFY_OFF) * device->notify_multiplier;
    REQUIRE(EXIT_DEVICE, room && size_max <= VIRTQ_SIZE_MAX);
    *queue = (struct virtqueue){.device = device,
                                .index = index,
                                .size = room < size_max ? room : (uint16_t)size_max,
                                .chain = (uint16_t)chain,
                                .packed = device->agreed & VIRTIO_F_RING_PACKED,
                                .event_idx = device->agreed & VIRTIO_F_EVENT_IDX,
                                .indirect = indirect && device->agreed & VIRTIO_F_INDIRECT_DESC,
                                .interrupts = interrupts,
                                .doorbell = doorbell};
    queue->requests = queue->indirect ? queue->size : queue->size / chain;
    if (queue->packed)
        start_packed(queue, queue->indirect);
    else
        start_split(queue, queue->indirect);
}

/* ---- queues: work ---- */

static uint16_t write_flag(const struct virtq_buffer *buffer)
{
    return buffer->device_writes ? VIRTQ_DESC_WRITE : 0;
}

/* Split: request r has the descriptors from r * chain, or from r with the table of that number. */
static void offer_split(struct virtqueue *queue, unsigned request, const struct virtq_buffer *buffers,
                        unsigned n)
{
    unsigned head = queue->indirect ? request : request * queue->chain;
    struct virtq_desc *table = queue->indirect ? queue->tables + request * queue->chain : queue->desc + head;
    unsigned first = queue->indirect ? 0 : head;
    for (unsigned i = 0; i < n; i++)
        table[i] = (struct virtq_desc){(uintptr_t)buffers[i].address, buffers[i].length,
                                       write_flag(buffers + i) | (i + 1 < n ? VIRTQ_DESC_NEXT : 0),
                                       (uint16_t)(first + i + 1)};
    if (queue->indirect)
        queue->desc[head] =
            (struct virtq_desc){(uintptr_t)table, n * (uint32_t)sizeof *table, VIRTQ_DESC_INDIRECT, 0};
    queue->avail->ring[queue->next++ % queue->size] = (uint16_t)head;
}

static uint16_t fill_packed(struct virtqueue *queue, const struct virtq_packed_desc *from)
{
    uint16_t slot = queue->next;
    uint16_t turn = queue->next_wrap ? PACKED_AVAIL : PACKED_USED;
    queue->ring[slot].address = from->address;
    queue->ring[slot].length = from->length;
    queue->ring[slot].id = from->id;
    if (++queue->next == queue->size) {
        queue->next = 0;
        queue->next_wrap = !queue->next_wrap;
    }
    return from->flags | turn;
}

/* Packed: the flags of the first descriptor hand over all of them, so they are written last (2.8.21). */
static void offer_packed(struct virtqueue *queue, unsigned request, const struct virtq_buffer *buffers,
                         unsigned n)
{
    uint16_t first = queue->next, first_flags = 0;
    if (queue->indirect) {
        struct virtq_packed_desc *table = (void *)(queue->tables + request * queue->chain);
        for (unsigned i = 0; i < n; i++)
            table[i] = (struct virtq_packed_desc){(uintptr_t)buffers[i].address, buffers[i].length, 0,
                                                  write_flag(buffers + i)};
        first_flags =
            fill_packed(queue, &(struct virtq_packed_desc){(uintptr_t)table, n * (uint32_t)sizeof *table,
                                                           (uint16_t)request, VIRTQ_DESC_INDIRECT});
        n = 1;
    } else {
        for (unsigned i = 0; i < n; i++) {
            uint16_t slot = queue->next;
            uint16_t flags =
                fill_packed(queue, &(struct virtq_packed_desc){
                                       (uintptr_t)buffers[i].address, buffers[i].length, (uint16_t)request,
                                       write_flag(buffers + i) | (i + 1 < n ? VIRTQ_DESC_NEXT : 0)});
            if (i == 0)
                first_flags = flags;
            else
                queue->ring[slot].flags = flags;
        }
    }
    queue->slots[request] = (uint8_t)n;
    COMPILER_BARRIER();
    *(volatile uint16_t *)&queue->ring[first].flags = first_flags;
}

void virtqueue_offer(struct virtqueue *queue, unsigned request, const struct virtq_buffer *buffers,
                     unsigned n)
{
    REQUIRE(EXIT_DEVICE, n && n <= queue->chain && request < queue->requests);
    if (queue->packed)
        offer_packed(queue, request, buffers, n);
    else
        offer_split(queue, request, buffers, n);
}

void virtqueue_ring(struct virtqueue *queue)
{
    queue->doorbells++;
    if (queue->device->pci)
        mmio_write16(queue->doorbell, (uint16_t)queue->index);
    else
        mmio_write32(queue->doorbell, queue->index);
}

/* 2.7.10: has `event` been passed on the way from `old` to `new`? */
static bool passed(uint16_t event, uint16_t new, uint16_t old)
{
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

static bool split_wants(struct virtqueue *queue, uint16_t old)
{
    queue->avail->index = queue->next;
    FULL_BARRIER(); /* the device sees the index, or we see that it wants to be told */
    if (queue->event_idx)
        return passed((uint16_t)queue->used->ring[queue->size].id, queue->next, old);
    return !(queue->used->flags & USED_NO_NOTIFY);
}

static bool packed_wants(struct virtqueue *queue, uint16_t old, bool old_wrap)
{
    FULL_BARRIER();
    uint16_t flags = queue->events->flags;
    if (flags != EVENT_DESC)
        return flags == EVENT_ENABLE;
    /* Positions of this turn of the ring; those of the turn before are `size` less. */
    uint16_t position = queue->events->position;
    int event = position & 0x7fff;
    if ((position >> 15) != queue->next_wrap)
        event -= queue->size;
    int from = old_wrap == queue->next_wrap ? old : old - queue->size;
    return event >= from && event < queue->next;
}

void virtqueue_publish(struct virtqueue *queue)
{
    uint16_t old = queue->published;
    bool old_wrap = queue->published_wrap;
    COMPILER_BARRIER();
    queue->published = queue->next;
    queue->published_wrap = queue->next_wrap;
    if (queue->packed ? packed_wants(queue, old, old_wrap) : split_wants(queue, old))
        virtqueue_ring(queue);
}

static int take_split(struct virtqueue *queue, uint32_t *written)
{
    if (queue->used->index == queue->taken)
        return -1;
    COMPILER_BARRIER();
    unsigned slot = queue->taken++ % queue->size;
    uint32_t head = queue->used->ring[slot].id;
    *written = queue->used->ring[slot].length;
    /* An interrupt for the next buffer; or for one that is half the numbers away, and so never. */
    queue->avail->ring[queue->size] = (uint16_t)(queue->interrupts ? queue->taken : queue->taken + 0x8000);
    if (queue->interrupts)
        FULL_BARRIER(); /* the device sees the event index, or the next call here sees the buffer */
    REQUIRE(EXIT_DEVICE, head < queue->size);
    return (int)(queue->indirect ? head : head / queue->chain);
}

static int take_packed(struct virtqueue *queue, uint32_t *written)
{
    uint16_t flags = *(volatile uint16_t *)&queue->ring[queue->taken].flags;
    bool avail = flags & PACKED_AVAIL, used = flags & PACKED_USED;
    if (avail != used || used != queue->taken_wrap)
        return -1;
    COMPILER_BARRIER();
    uint16_t request = queue->ring[queue->taken].id;
    *written = queue->ring[queue->taken].length;
    REQUIRE(EXIT_DEVICE, request < queue->requests);
    queue->taken += queue->slots[request];
    if (queue->taken >= queue->size) {
        queue->taken -= queue->size;
        queue->taken_wrap = !queue->taken_wrap;
    }
    return request;
}

int virtqueue_take(struct virtqueue *queue, uint32_t *written)
{
    return queue->packed ? take_packed(queue, written) : take_split(queue, written);
}
