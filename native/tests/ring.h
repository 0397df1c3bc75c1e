/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver's side of a virtqueue, split and packed (virtio 1.2, 2.7 and 2.8), for tests of devices: a well-behaved
 * driver, with its rings open to tests that are not.
 *
 *     ring_init(&ring, vm, gpa, 64, VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX);     RING_BYTES at gpa, page-aligned
 *     ring_give(&ring, &queue);                                                  or write it to a transport's registers
 *     int id = ring_offer(&ring, (struct piece[]){OUT(0x5000, 16), IN(0x6000, 512)}, 2);
 *     if (ring_doorbell(&ring)) ... ring the doorbell ...
 *     while (ring_collect(&ring, &id, &written)) ...
 */
#ifndef VMM_TESTS_RING_H
#define VMM_TESTS_RING_H

#include "machine.h"
#include "virtio/queue.h"

#include <string.h>

#define RING_BYTES 0x3000 /* descriptors, driver area, device area: a page each */

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 1 << 7, USED = 1 << 15 };
enum { EVENTS_ON = 0, EVENTS_OFF = 1, EVENTS_AT = 2 }; /* flags of a packed ring's event suppression */

struct split_desc {
    uint64_t address;
    uint32_t size;
    uint16_t flags, next;
};

struct packed_desc {
    uint64_t address;
    uint32_t size;
    uint16_t id, flags;
};

/* Guest memory for the device to read (OUT) or to write (IN). */
struct piece {
    uint64_t gpa;
    uint32_t size;
    bool in;
};
#define OUT(gpa, size)                                                                                       \
    {                                                                                                        \
        gpa, size, false                                                                                     \
    }
#define IN(gpa, size)                                                                                        \
    {                                                                                                        \
        gpa, size, true                                                                                      \
    }

struct ring {
    vmm_vm *vm;
    uint32_t features; /* enum vmm_queue_features */
    uint16_t size;
    uint64_t desc, driver, device; /* guest-physical */
    union {
        struct split_desc *split;
        struct packed_desc *packed;
    };
    uint16_t *driver_area, *device_area;
    uint16_t avail, used; /* split: free-running; packed: slot, with the wrap counter in bit 15 */
    uint16_t offered;     /* slots, since the last ring_doorbell */
    uint16_t n_free;      /* slots */
    uint16_t free;        /* first free descriptor (split) or id (packed), linked by next */
    uint16_t next[VMM_QUEUE_SIZE_MAX], slots[VMM_QUEUE_SIZE_MAX];
};

static inline bool ring_packed(const struct ring *r)
{
    return r->features & VMM_QUEUE_PACKED;
}

static inline void ring_init(struct ring *r, vmm_vm *vm, uint64_t gpa, uint16_t size, uint32_t features)
{
    *r = (struct ring){.vm = vm, .features = features, .size = size, .n_free = size};
    r->desc = gpa;
    r->driver = gpa + 0x1000;
    r->device = gpa + 0x2000;
    r->split = memset(machine_at(vm, gpa, RING_BYTES), 0, RING_BYTES);
    r->driver_area = machine_at(vm, r->driver, 0x1000);
    r->device_area = machine_at(vm, r->device, 0x1000);
    r->avail = r->used = ring_packed(r) ? 0x8000 : 0;
    for (uint16_t i = 0; i < size; i++)
        r->next[i] = i + 1;
}

static inline void ring_give(const struct ring *r, struct vmm_queue *q)
{
    q->size = r->size;
    q->desc = r->desc;
    q->driver = r->driver;
    q->device = r->device;
}

/* Fields that both sides use at once. */
static inline uint16_t ring_load(const uint16_t *field)
{
    return atomic_load_explicit((const _Atomic uint16_t *)field, memory_order_acquire);
}
static inline void ring_store(uint16_t *field, uint16_t value)
{
    atomic_store_explicit((_Atomic uint16_t *)field, value, memory_order_release);
}

/* Split: avail is flags, idx, ring[], used_event; used is flags, idx, {id, written}[], avail_event (2.7.6, 2.7.8). */
static inline uint16_t *ring_avail_idx(const struct ring *r)
{
    return r->driver_area + 1;
}
static inline uint16_t *ring_used_event(const struct ring *r)
{
    return r->driver_area + 2 + r->size;
}
static inline uint16_t *ring_used_idx(const struct ring *r)
{
    return r->device_area + 1;
}
static inline uint32_t *ring_used_entry(const struct ring *r, uint16_t i)
{
    return (uint32_t *)(r->device_area + 2) + 2 * (i % r->size);
}
static inline uint16_t *ring_avail_event(const struct ring *r)
{
    return r->device_area + 2 + 4 * r->size;
}

/* ---- offer ---- */

static inline uint16_t ring_advance(const struct ring *r, uint16_t position, uint16_t slots)
{
    if (!ring_packed(r))
        return position + slots;
    uint16_t slot = (position & 0x7fff) + slots;
    return slot < r->size ? slot | (position & 0x8000) : (slot - r->size) | (~position & 0x8000);
}

/* Flags of a packed descriptor that is available (2.8.1) at a position. */
static inline uint16_t ring_packed_flags(uint16_t position)
{
    return position & 0x8000 ? AVAIL : USED;
}

static inline int ring_offer_split(struct ring *r, const struct piece *pieces, unsigned n, uint16_t more)
{
    uint16_t head = r->free, i = head;
    for (unsigned k = 0; k < n; k++, i = r->next[i])
        r->split[i] =
            (struct split_desc){pieces[k].gpa, pieces[k].size,
                                (pieces[k].in ? WRITE : 0) | (k + 1 < n ? NEXT : 0) | more, r->next[i]};
    r->free = i;
    r->slots[head] = n;
    r->n_free -= n;
    ((_Atomic uint16_t *)r->driver_area)[2 + r->avail % r->size] = head;
    ring_store(ring_avail_idx(r), ++r->avail); /* after the entry and its descriptors */
    r->offered++;
    return head;
}

static inline int ring_offer_packed(struct ring *r, const struct piece *pieces, unsigned n, uint16_t more)
{
    uint16_t id = r->free, position = r->avail, first = 0;
    for (unsigned k = 0; k < n; k++, position = ring_advance(r, position, 1)) {
        struct packed_desc *d = &r->packed[position & 0x7fff];
        uint16_t flags =
            ring_packed_flags(position) | (pieces[k].in ? WRITE : 0) | (k + 1 < n ? NEXT : 0) | more;
        d->address = pieces[k].gpa;
        d->size = pieces[k].size;
        d->id = id;
        if (k == 0)
            first = flags;
        else
            ring_store(&d->flags, flags);
    }
    ring_store(&r->packed[r->avail & 0x7fff].flags, first); /* after all the others */
    r->avail = position;
    r->free = r->next[id];
    r->slots[id] = n;
    r->n_free -= n;
    r->offered += n;
    return id;
}

/* Offer a chain. Answers its id, or -1: there is no room. */
static inline int ring_offer(struct ring *r, const struct piece *pieces, unsigned n)
{
    if (n > r->n_free)
        return -1;
    return ring_packed(r) ? ring_offer_packed(r, pieces, n, 0) : ring_offer_split(r, pieces, n, 0);
}

/* The same through a table at `table`, 16 bytes a piece: one slot of the ring. */
static inline int ring_offer_indirect(struct ring *r, uint64_t table, const struct piece *pieces, unsigned n)
{
    if (!r->n_free)
        return -1;
    uint8_t *at = machine_at(r->vm, table, n * 16);
    for (unsigned k = 0; k < n; k++) {
        uint16_t write = pieces[k].in ? WRITE : 0;
        struct split_desc split = {pieces[k].gpa, pieces[k].size, write | (k + 1 < n ? NEXT : 0), k + 1};
        struct packed_desc packed = {pieces[k].gpa, pieces[k].size, 0, write};
        memcpy(at + k * 16, ring_packed(r) ? (void *)&packed : (void *)&split, 16);
    }
    struct piece piece = OUT(table, n * 16);
    return ring_packed(r) ? ring_offer_packed(r, &piece, 1, INDIRECT)
                          : ring_offer_split(r, &piece, 1, INDIRECT);
}

/* ---- notifications ---- */

/* Slots from one position forward to another. */
static inline uint16_t ring_distance(const struct ring *r, uint16_t from, uint16_t to)
{
    if (!ring_packed(r))
        return to - from;
    int distance = (to & 0x7fff) - (from & 0x7fff) + ((from ^ to) & 0x8000 ? r->size : 0);
    return distance < 0 ? distance + 2 * r->size : distance;
}

/* Does the device want a doorbell for what was offered since the last call? */
static inline bool ring_doorbell(struct ring *r)
{
    atomic_thread_fence(memory_order_seq_cst); /* our index before their wish */
    uint16_t offered = r->offered, before = r->avail - offered;
    r->offered = 0;
    if (!offered)
        return false;
    if (!ring_packed(r)) {
        if (!(r->features & VMM_QUEUE_EVENT_IDX))
            return !(ring_load(r->device_area) & 1);
        return (uint16_t)(ring_load(ring_avail_event(r)) - before) < offered;
    }
    uint32_t wish = atomic_load((_Atomic uint32_t *)r->device_area);
    if (wish >> 16 != EVENTS_AT)
        return wish >> 16 == EVENTS_ON;
    CHECK(r->features & VMM_QUEUE_EVENT_IDX && (wish & 0x7fff) < r->size);
    uint16_t ahead =
        ring_distance(r, (uint16_t)wish, r->avail); /* slots from the one waited for to the next free */
    return ahead > 0 && ahead <= offered;
}

/* Ask for no interrupts. */
static inline void ring_suppress(struct ring *r)
{
    if (ring_packed(r))
        atomic_store((_Atomic uint32_t *)r->driver_area, EVENTS_OFF << 16);
    else if (!(r->features & VMM_QUEUE_EVENT_IDX))
        ring_store(r->driver_area, 1);
}

static inline bool ring_waiting(const struct ring *r)
{
    if (!ring_packed(r))
        return ring_load(ring_used_idx(r)) != r->used;
    uint16_t flags = ring_load(&r->packed[r->used & 0x7fff].flags);
    return !(flags & AVAIL) == !(flags & USED) && !(flags & USED) == !(r->used & 0x8000);
}

/* Ask for an interrupt with the next used buffer; true: one is there already. */
static inline bool ring_arm(struct ring *r)
{
    bool event_idx = r->features & VMM_QUEUE_EVENT_IDX;
    if (ring_packed(r))
        atomic_store((_Atomic uint32_t *)r->driver_area,
                     event_idx ? r->used | EVENTS_AT << 16 : EVENTS_ON << 16);
    else if (event_idx)
        ring_store(ring_used_event(r), r->used);
    else
        ring_store(r->driver_area, 0);
    atomic_thread_fence(memory_order_seq_cst); /* our wish before their index */
    return ring_waiting(r);
}

/* ---- collect ---- */

/* Take the next used buffer back. What the device wrote into the ring must make sense. */
static inline bool ring_collect(struct ring *r, int *id, uint32_t *written)
{
    if (!ring_waiting(r))
        return false;
    if (ring_packed(r)) {
        *id = r->packed[r->used & 0x7fff].id;
        *written = r->packed[r->used & 0x7fff].size;
    } else {
        *id = (int)ring_used_entry(r, r->used)[0];
        *written = ring_used_entry(r, r->used)[1];
    }
    CHECK(*id < r->size && r->slots[*id]);
    uint16_t slots = r->slots[*id], last = *id;
    if (!ring_packed(r))
        for (unsigned k = 1; k < slots; k++)
            last = r->next[last];
    r->used = ring_advance(r, r->used, ring_packed(r) ? slots : 1);
    r->next[last] = r->free;
    r->free = *id;
    r->slots[*id] = 0;
    r->n_free += slots;
    return true;
}

#endif
