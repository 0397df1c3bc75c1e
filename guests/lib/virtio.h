/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver's side of virtio 1.2: a device found on either transport, its rings, split or packed. Nothing waits
 * for interrupts unless it asks for them.
 *
 * Where devices are looked for: on PCI, in its modern form; then at "virtio_mmio.device=SIZE@ADDRESS:IRQ" of the
 * command line, as Linux has it.
 *
 *   virtio_find -> virtio_negotiate -> virtqueue_start for each queue -> virtio_driver_ok
 *   -> virtqueue_offer ... virtqueue_publish -> virtqueue_take ...
 */
#ifndef GUEST_VIRTIO_H
#define GUEST_VIRTIO_H

#include "guest.h"

enum { VIRTIO_NET = 1, VIRTIO_BLK = 2, VIRTIO_RNG = 4 }; /* virtio 1.2, 5 */

enum { /* 2.1 */
       VIRTIO_ACKNOWLEDGE = 1,
       VIRTIO_DRIVER = 2,
       VIRTIO_DRIVER_OK = 4,
       VIRTIO_FEATURES_OK = 8,
       VIRTIO_NEEDS_RESET = 64,
       VIRTIO_FAILED = 128
};

/* 6: feature bits of every device. */
#define VIRTIO_F_INDIRECT_DESC (1ull << 28)
#define VIRTIO_F_EVENT_IDX (1ull << 29)
#define VIRTIO_F_VERSION_1 (1ull << 32)
#define VIRTIO_F_RING_PACKED (1ull << 34)

enum { VIRTIO_ISR_QUEUE = 1, VIRTIO_ISR_CONFIG = 2, VIRTIO_NO_VECTOR = 0xffff };

struct virtio_device {
    bool pci;
    unsigned function; /* PCI: device << 3 | function */
    unsigned irq;      /* I/O APIC input: what the interrupt line register or command line says */
    uintptr_t common, isr, notify, config; /* mmio: `common` is the base of all its registers */
    uint32_t notify_multiplier;
    uint64_t agreed;
};

/* The n-th device of this kind (virtio 1.2, 5). */
bool virtio_find(unsigned id, unsigned n, struct virtio_device *device);
/* Reset; agree on VERSION_1 and whatever of `wanted` is offered. The guest fails if the device does not. */
void virtio_negotiate(struct virtio_device *device, uint64_t wanted);
void virtio_driver_ok(struct virtio_device *device);
void virtio_reset(struct virtio_device *device);
void virtio_set_status(const struct virtio_device *device, uint8_t bits); /* in addition to those that are */
uint8_t virtio_status(const struct virtio_device *device);
uint64_t virtio_offered(const struct virtio_device *device);
/* Read, and by that (PCI) or by acknowledging it (mmio) lower the line. */
uint8_t virtio_isr(const struct virtio_device *device);

/* Buffers are given by address: guest-physical is virtual here. */
struct virtq_buffer {
    void *address;
    uint32_t length;
    bool device_writes; /* these come last */
};

enum { VIRTQ_DESC_NEXT = 1, VIRTQ_DESC_WRITE = 2, VIRTQ_DESC_INDIRECT = 4 };

struct virtq_desc { /* 2.7.5 */
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct virtq_packed_desc { /* 2.8.13 */
    uint64_t address;
    uint32_t length;
    uint16_t id, flags;
};
_Static_assert(sizeof(struct virtq_desc) == 16 && sizeof(struct virtq_packed_desc) == 16,
               "virtio 1.2, 2.7 and 2.8");

enum { VIRTQ_SIZE_MAX = 256 };

/* 2.7.6, 2.7.8: behind entry size - 1 comes the event index of the other side. */
struct virtq_avail {
    volatile uint16_t flags, index, ring[VIRTQ_SIZE_MAX + 1];
};
struct virtq_used {
    volatile uint16_t flags, index;
    struct {
        volatile uint32_t id, length;
    } ring[VIRTQ_SIZE_MAX + 1];
};
struct virtq_event { /* 2.8.14 */
    volatile uint16_t position, flags;
};

struct virtqueue {
    struct virtio_device *device;
    unsigned index;
    uint16_t size, chain; /* descriptors; of them as many for a request, at most */
    bool packed, event_idx, indirect, interrupts;
    uint32_t requests;                /* as many may be on the ring: their numbers are below it */
    uintptr_t doorbell;               /* and the value that goes there is `index` */
    struct virtq_desc *desc, *tables; /* split; `tables`: indirect, one for each request */
    struct virtq_avail *avail;
    struct virtq_used *used;
    struct virtq_packed_desc *ring; /* packed */
    struct virtq_event *driver, *events;
    uint16_t next, published, taken; /* split: free running; packed: slots, 0..size - 1 */
    bool next_wrap, taken_wrap, published_wrap;
    uint8_t slots[VIRTQ_SIZE_MAX]; /* packed: how many each request took */
    uint64_t doorbells;
};

/*
 * Bring a queue up, no larger than size_max, for requests of at most `chain` buffers: `requests` says for how many it
 * has room. Memory is taken for good. `indirect`: each request is one descriptor that names a table, where the
 * device agreed to that. `interrupts`: the device is to interrupt for each batch.
 */
void virtqueue_start(struct virtio_device *device, unsigned index, unsigned size_max, unsigned chain,
                     bool indirect, bool interrupts, struct virtqueue *queue);
/* Only what the registers take: for guests that lie. */
void virtqueue_enable(const struct virtio_device *device, unsigned index, uint16_t size, uint64_t desc,
                      uint64_t driver, uint64_t device_area);
/* Which MSI-X entry a queue interrupts through; PCI only, before virtqueue_start. */
void virtqueue_vector(struct virtio_device *device, unsigned index, uint16_t entry);

/* Put a request on the ring under a number that is free. The device sees it after publish. */
void virtqueue_offer(struct virtqueue *queue, unsigned request, const struct virtq_buffer *buffers,
                     unsigned n);
/* Ring the doorbell if the device wants it rung. */
void virtqueue_publish(struct virtqueue *queue);
/* The number of a request that is done and the bytes the device says it wrote; -1: none is. */
int virtqueue_take(struct virtqueue *queue, uint32_t *written);

/* The doorbell, unconditionally. */
void virtqueue_ring(struct virtqueue *queue);

/* ---- requests ---- */

enum { BLK_IN = 0, BLK_OUT = 1, BLK_FLUSH = 4, BLK_GET_ID = 8, BLK_DISCARD = 11, BLK_WRITE_ZEROES = 13 };
enum { BLK_OK = 0, BLK_IOERR = 1, BLK_UNSUPP = 2, BLK_SECTOR = 512, BLK_ID_BYTES = 20 };
#define BLK_F_RO (1ull << 5)
#define BLK_F_FLUSH (1ull << 9)

struct blk_header { /* 5.2.6 */
    uint32_t type, reserved;
    uint64_t sector;
};

enum { NET_RECEIVE = 0, NET_TRANSMIT = 1 }; /* queues */
enum { NET_NEEDS_CSUM = 1, NET_GSO_TCPV4 = 1 };
#define NET_F_CSUM (1ull << 0)
#define NET_F_GUEST_CSUM (1ull << 1)
#define NET_F_GUEST_TSO4 (1ull << 7)
#define NET_F_HOST_TSO4 (1ull << 11)
#define NET_F_MRG_RXBUF (1ull << 15)

struct net_header { /* 5.1.6 */
    uint8_t flags, gso_type;
    uint16_t header_length, gso_size, csum_start, csum_offset, buffers;
};
_Static_assert(sizeof(struct blk_header) == 16 && sizeof(struct net_header) == 12,
               "virtio 1.2, 5.1.6 and 5.2.6");

/* Memory behind the guest's image, for good; zeros only where nobody wrote before. */
void *virtio_memory(size_t size, size_t alignment);

#endif
