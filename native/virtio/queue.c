/* SPDX-License-Identifier: Apache-2.0 */
#include "queue.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are little-endian, and read as they are");

/* A descriptor (2.7.5, 2.8.13). The last two fields change places between the kinds of ring. */
struct descriptor {
    uint64_t address;
    uint32_t size;
    union {
        struct {
            uint16_t flags, next;
        } split;
        struct {
            uint16_t id, flags;
        } packed;
    };
};
_Static_assert(sizeof(struct descriptor) == 16, "2.7.5 and 2.8.13");

enum {
    DESC_NEXT = 1,
    DESC_WRITE = 2,
    DESC_INDIRECT = 4,
    PACKED_AVAIL = 1 << 7,
    PACKED_USED = 1 << 15,
};

enum { SPLIT_NO_INTERRUPT = 1, SPLIT_NO_NOTIFY = 1 };         /* 2.7.6, 2.7.8 */
enum { EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2 }; /* 2.8.10 */
enum { AVAIL_FLAGS = 0, AVAIL_IDX = 2, AVAIL_RING = 4 };      /* 2.7.6; used_event follows the ring */
enum {
    USED_FLAGS = 0,
    USED_IDX = 2,
    USED_RING = 4,
    USED_ENTRY = 8
};                   /* 2.7.8; avail_event follows the ring */
#define WRAP 0x8000u /* in a position of a packed ring: the wrap counter, over the slot */

/* ---- guest memory: every field is loaded once, into a value of our own ---- */

static inline uint16_t load16(const uint8_t *at)
{
    return atomic_load_explicit((const _Atomic uint16_t *)at, memory_order_relaxed);
}

static inline uint16_t load16_acquire(const uint8_t *at)
{
    return atomic_load_explicit((const _Atomic uint16_t *)at, memory_order_acquire);
}

static inline uint32_t load32(const uint8_t *at)
{
    return atomic_load_explicit((const _Atomic uint32_t *)at, memory_order_relaxed);
}

static inline void store16(uint8_t *at, uint16_t value)
{
    atomic_store_explicit((_Atomic uint16_t *)at, value, memory_order_relaxed);
}

static inline void store16_release(uint8_t *at, uint16_t value)
{
    atomic_store_explicit((_Atomic uint16_t *)at, value, memory_order_release);
}

static inline void store32(uint8_t *at, uint32_t value)
{
    atomic_store_explicit((_Atomic uint32_t *)at, value, memory_order_relaxed);
}

static inline void store64(uint8_t *at, uint64_t value)
{
    atomic_store_explicit((_Atomic uint64_t *)at, value, memory_order_relaxed);
}

/* A table in guest memory may stand at any address, so no atomics; the barrier keeps the compiler from a second look. */
static inline struct descriptor copy_descriptor(const uint8_t *table, uint32_t i)
{
    struct descriptor d;
    memcpy(&d, table + i * sizeof(d), sizeof(d));
    atomic_signal_fence(memory_order_seq_cst);
    return d;
}

/* ---- broken ---- */

__attribute__((cold, format(printf, 2, 3))) static int broken(struct vmm_queue *q, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(q->fault_text, sizeof(q->fault_text), format, args);
    va_end(args);
    q->fault = q->fault_text;
    q->started = false;
    return -EPROTO;
}

/* ---- a chain as it is read ---- */

struct walk {
    struct vmm_queue *q;
    struct vmm_chain *chain;
    uint32_t left; /* descriptors it may still have */
    bool writing;  /* a device-writable one was seen */
};

static const struct vmm_region *region_of(const struct vmm_vm *vm, uint64_t gpa)
{
    for (uint32_t i = 0; i < vm->n_regions; i++)
        if (gpa - vm->regions[i].gpa < vm->regions[i].size)
            return &vm->regions[i];
    return NULL;
}

/* The host's pieces of one descriptor's range, which does not wrap. */
static int walk_pieces(struct walk *w, uint64_t gpa, uint64_t size)
{
    struct vmm_chain *c = w->chain;
    for (uint64_t n; size; gpa += n, size -= n) {
        const struct vmm_region *r = region_of(w->q->vm, gpa);
        if (unlikely(!r))
            return broken(w->q, "offers a buffer at %#llx, where there is no memory",
                          (unsigned long long)gpa);
        if (unlikely(w->writing && r->flags & VMM_MEMORY_READONLY))
            return broken(w->q, "offers read-only memory at %#llx to be written", (unsigned long long)gpa);
        unsigned pieces = c->n_out + c->n_in;
        if (unlikely(pieces == VMM_CHAIN_PIECES))
            return broken(w->q, "offers a chain in more than %d pieces", VMM_CHAIN_PIECES);
        n = r->size - (gpa - r->gpa);
        if (likely(n > size))
            n = size;
        c->iov[pieces] = (struct iovec){.iov_base = r->host + (gpa - r->gpa), .iov_len = n};
        if (w->writing)
            c->n_in++;
        else
            c->n_out++;
    }
    return 0;
}

static int walk_buffer(struct walk *w, uint64_t gpa, uint32_t size, bool write)
{
    struct vmm_chain *c = w->chain;
    if (unlikely(w->left-- == 0))
        return broken(w->q, "offers a chain longer than its queue, or a loop");
    if (unlikely(w->writing && !write)) /* 2.7.4.2, 2.8.21.3 */
        return broken(w->q, "offers a device-readable descriptor after a device-writable one");
    w->writing = write;
    if (unlikely(size == 0)) /* legal, and nothing to carry */
        return 0;
    if (unlikely(gpa + (size - 1) < gpa))
        return broken(w->q, "offers a buffer at %#llx that wraps around the address space",
                      (unsigned long long)gpa);
    uint64_t *total = write ? &c->in_size : &c->out_size;
    *total += size;
    if (unlikely(c->out_size + c->in_size >
                 UINT32_MAX)) /* what a used entry can count; 2.7.5.2 allows one more */
        return broken(w->q, "offers a chain of 4 GiB or more");
    return walk_pieces(w, gpa, size);
}

/* The table an indirect descriptor refers to; *n descriptors of it. Its own WRITE flag is ignored (2.7.5.3.2). */
static const uint8_t *walk_table(struct walk *w, const struct descriptor *d, uint32_t *n)
{
    const uint8_t *table = NULL;
    *n = d->size / sizeof(struct descriptor);
    if (!(w->q->features & VMM_QUEUE_INDIRECT))
        broken(w->q, "uses an indirect descriptor, which was not agreed");
    else if (d->size == 0 || d->size % sizeof(struct descriptor))
        broken(w->q, "offers an indirect table of %u bytes, which is no number of descriptors", d->size);
    else if (*n > VMM_QUEUE_SIZE_MAX)
        broken(w->q, "offers an indirect table of %u descriptors, more than a queue has", *n);
    else if (!(table = vmm_vm_gpa(w->q->vm, d->address, d->size)))
        broken(w->q, "offers an indirect table at %#llx, which is not in memory",
               (unsigned long long)d->address);
    return table;
}

/* ---- split rings (2.7) ---- */

static int split_walk(struct walk *w)
{
    const uint8_t *table = w->q->host_desc;
    bool in_table = false;
    uint32_t n = w->q->size;
    uint32_t i = load16(w->q->host_driver + AVAIL_RING + 2 * (w->q->avail & (n - 1)));
    w->chain->id = i;
    w->chain->slots = 1;
    for (w->left = n;;) {
        if (unlikely(i >= n))
            return broken(w->q, "names descriptor %u of a table of %u", i, n);
        struct descriptor d = copy_descriptor(table, i);
        if (unlikely(d.split.flags & DESC_INDIRECT)) {
            if (in_table) /* not told by its address: a table may stand in the ring's own */
                return broken(w->q, "offers an indirect descriptor in an indirect table");
            if (d.split.flags & DESC_NEXT)
                return broken(w->q, "offers an indirect descriptor with a next one");
            table = walk_table(w, &d, &n);
            if (!table)
                return -EPROTO;
            /* Descriptors before it count: Linux keeps to VMM_QUEUE_SIZE_MAX in a table whatever the ring's size. */
            w->left = VMM_QUEUE_SIZE_MAX - (w->q->size - w->left);
            in_table = true;
            i = 0;
            continue;
        }
        int rc = walk_buffer(w, d.address, d.size, d.split.flags & DESC_WRITE);
        if (unlikely(rc < 0) || !(d.split.flags & DESC_NEXT))
            return rc;
        i = d.split.next;
    }
}

/* Is there a request? -EPROTO: the driver's index cannot be right. */
static int split_look(struct vmm_queue *q)
{
    if (q->seen != q->avail)
        return 1;
    /* Pairs with the driver's barrier between filling the ring and moving its index (2.7.13.3). */
    uint16_t index = load16_acquire(q->host_driver + AVAIL_IDX);
    if ((uint16_t)(index - q->avail) > q->size)
        return broken(q, "moved the available index from %u to %u, past a ring of %u", q->avail, index,
                      q->size);
    q->seen = index;
    return index != q->avail;
}

static void split_push(struct vmm_queue *q, const struct vmm_chain *chain, uint32_t written)
{
    uint16_t slot = (uint16_t)(q->used + q->pushed) & (q->size - 1);
    uint8_t *entry = q->host_device + USED_RING + USED_ENTRY * slot;
    store32(entry, chain->id);
    store32(entry + 4, written);
    vmm_vm_wrote(q->vm, entry, USED_ENTRY);
    q->pushed++;
}

static bool split_publish(struct vmm_queue *q)
{
    uint16_t before = q->used;
    q->used = (uint16_t)(before + q->pushed);
    store16_release(q->host_device + USED_IDX, q->used); /* after its entries (2.7.14) */
    vmm_vm_wrote(q->vm, q->host_device + USED_IDX, 2);
    /* Our index before their wish; pairs with the driver's barrier between its wish and its look at our index. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!(q->features & VMM_QUEUE_EVENT_IDX))
        return !(load16(q->host_driver + AVAIL_FLAGS) & SPLIT_NO_INTERRUPT);
    uint16_t event = load16(q->host_driver + AVAIL_RING + 2 * q->size);
    return (uint16_t)(event - before) < q->pushed; /* entry `event` is among those just published (2.7.7.1) */
}

/* ---- packed rings (2.8) ---- */

static uint16_t packed_advance(const struct vmm_queue *q, uint16_t position, uint16_t slots)
{
    uint16_t slot = (position & ~WRAP) + slots, wrap = position & WRAP;
    return slot < q->size ? slot | wrap : (uint16_t)(slot - q->size) | (wrap ^ WRAP);
}

/* Slots from one position forward to another: two rounds of the ring, then it starts again. `to` may be nonsense. */
static uint32_t packed_distance(const struct vmm_queue *q, uint16_t from, uint16_t to)
{
    uint32_t round = q->size, here = (from & ~WRAP) + (from & WRAP ? 0 : round),
             there = (to & ~WRAP) + (to & WRAP ? 0 : round);
    return (there + 2 * round - here) % (2 * round);
}

static uint8_t *packed_flags(const struct vmm_queue *q, uint16_t position)
{
    return q->host_desc + sizeof(struct descriptor) * (position & ~WRAP) +
           offsetof(struct descriptor, packed.flags);
}

/* Available: AVAIL is the wrap counter and USED is not (2.8.1). */
static bool packed_available(uint16_t flags, uint16_t position)
{
    bool wrap = position & WRAP;
    return !!(flags & PACKED_AVAIL) == wrap && !!(flags & PACKED_USED) != wrap;
}

static int packed_look(const struct vmm_queue *q)
{
    /* Pairs with the driver's barrier between the rest of a list and its first flags (2.8.16). */
    return packed_available(load16_acquire(packed_flags(q, q->avail)), q->avail);
}

/* One list in the ring: contiguous, the buffer id in its last descriptor. */
static int packed_walk(struct walk *w)
{
    struct vmm_queue *q = w->q;
    uint16_t position = q->avail, slots = 0;
    for (w->left = q->size;;) {
        struct descriptor d = copy_descriptor(q->host_desc, position & ~WRAP);
        if (unlikely(!packed_available(d.packed.flags,
                                       position))) /* 2.8.6, 2.8.21.3: all of them, before the first */
            return broken(q, "offers a list whose descriptor in slot %u is not available", position & ~WRAP);
        position = packed_advance(q, position, 1);
        w->chain->id = d.packed.id;
        w->chain->slots = ++slots;
        if (unlikely(d.packed.flags & DESC_INDIRECT)) {
            if (slots > 1 || d.packed.flags & DESC_NEXT) /* 2.8.21.4 */
                return broken(q, "offers an indirect descriptor in a list");
            uint32_t n;
            const uint8_t *table = walk_table(w, &d, &n);
            if (!table)
                return -EPROTO;
            w->left = VMM_QUEUE_SIZE_MAX;
            for (uint32_t i = 0; i < n; i++) { /* in order; of flags only WRITE counts (2.8.7) */
                struct descriptor e = copy_descriptor(table, i);
                int rc = walk_buffer(w, e.address, e.size, e.packed.flags & DESC_WRITE);
                if (rc < 0)
                    return rc;
            }
            return 0;
        }
        int rc = walk_buffer(w, d.address, d.size, d.packed.flags & DESC_WRITE);
        if (unlikely(rc < 0) || !(d.packed.flags & DESC_NEXT))
            return rc;
    }
}

/* Used: both bits are the wrap counter (2.8.1). The first flags of a batch are written last: the driver stops there. */
static void packed_push(struct vmm_queue *q, const struct vmm_chain *chain, uint32_t written)
{
    uint16_t flags = (q->used & WRAP ? PACKED_AVAIL | PACKED_USED : 0) | (written ? DESC_WRITE : 0);
    uint8_t *entry = packed_flags(q, q->used) - offsetof(struct descriptor, packed.flags);
    if (q->pushed == 0) {
        q->first_slot = q->used;
        q->first_flags = flags;
        store32(entry + offsetof(struct descriptor, size), written);
        store16(entry + offsetof(struct descriptor, packed.id), chain->id);
    } else {
        store64(entry + offsetof(struct descriptor, size),
                written | (uint64_t)chain->id << 32 | (uint64_t)flags << 48);
    }
    vmm_vm_wrote(q->vm, entry, sizeof(struct descriptor));
    q->used = packed_advance(q, q->used, chain->slots);
    q->pushed += chain->slots;
}

static bool packed_publish(struct vmm_queue *q)
{
    store16_release(packed_flags(q, q->first_slot),
                    q->first_flags); /* after everything else of the batch (2.8.19) */
    vmm_vm_wrote(q->vm, packed_flags(q, q->first_slot), 2);
    /* Our flags before their wish; pairs with the driver's barrier between its wish and its look at our flags. */
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t wish =
        load32(q->host_driver); /* both halves at once: offset and wrap below, flags above (2.8.14) */
    switch (wish >> 16 & 3) {
    case EVENT_DISABLE:
        return false;
    case EVENT_DESC:
        if (q->features & VMM_QUEUE_EVENT_IDX)
            return packed_distance(q, q->first_slot, (uint16_t)wish) < q->pushed;
    }
    return true;
}

/* ---- the driver's configuration ---- */

static uint8_t *area(struct vmm_queue *q, const char *name, uint64_t gpa, uint64_t size, unsigned alignment)
{
    uint8_t *host = vmm_vm_gpa(q->vm, gpa, size);
    if (!host)
        broken(q, "put its %s at %#llx, which is not in memory", name, (unsigned long long)gpa);
    else if (gpa % alignment)
        broken(q, "put its %s at %#llx, which is not a multiple of %u", name, (unsigned long long)gpa,
               alignment);
    else if (region_of(q->vm, gpa)->flags & VMM_MEMORY_READONLY)
        broken(q, "put its %s at %#llx, which is read-only", name, (unsigned long long)gpa);
    return q->fault ? NULL : host;
}

int vmm_queue_start(struct vmm_queue *q, struct vmm_vm *vm, uint32_t features)
{
    const bool packed = features & VMM_QUEUE_PACKED;
    q->vm = vm;
    q->features = features;
    q->started = false;
    q->fault = NULL;
    q->avail = q->used = packed ? WRAP : 0; /* wrap counters begin at 1 (2.8.1) */
    q->seen = q->held = q->in_flight = q->pushed = 0;
    q->era++;
    if (q->size == 0 || q->size > VMM_QUEUE_SIZE_MAX || (!packed && q->size & (q->size - 1))) {
        broken(q, "asks for a %s ring of %u", packed ? "packed" : "split", q->size);
        return -EINVAL;
    }
    const unsigned driver_size = packed ? 4 : AVAIL_RING + 2 * q->size + 2;
    const unsigned device_size = packed ? 4 : USED_RING + USED_ENTRY * q->size + 2;
    if (!(q->host_desc = area(q, "descriptors", q->desc, q->size * sizeof(struct descriptor), 16)) ||
        !(q->host_driver = area(q, "driver area", q->driver, driver_size, packed ? 4 : 2)) ||
        !(q->host_device = area(q, "device area", q->device, device_size, 4)))
        return -EINVAL;
    q->started = true;
    return 0;
}

uint16_t vmm_queue_position(const struct vmm_queue *q)
{
    return q->avail;
}

int vmm_queue_seek(struct vmm_queue *q, uint16_t position)
{
    if (q->features & VMM_QUEUE_PACKED && (position & ~WRAP) >= q->size) {
        broken(q, "stands at slot %u of %u", position & ~WRAP, q->size);
        return -EINVAL;
    }
    q->avail = q->used = q->seen = position;
    return 0;
}

void vmm_queue_reset(struct vmm_queue *q)
{
    *q = (struct vmm_queue){
        .era = q->era,
        .requests = q->requests,
        .bytes_out = q->bytes_out,
        .bytes_in = q->bytes_in,
        .doorbells = q->doorbells,
        .interrupts = q->interrupts,
    };
}

/* ---- requests ---- */

static bool is_packed(const struct vmm_queue *q)
{
    return q->features & VMM_QUEUE_PACKED;
}

int vmm_queue_pop(struct vmm_queue *q, struct vmm_chain *chain)
{
    if (unlikely(!q->started))
        return q->fault ? -EPROTO : 0;
    int rc = is_packed(q) ? packed_look(q) : split_look(q);
    if (rc <= 0)
        return rc;
    chain->era = q->era;
    chain->vm = q->vm;
    chain->n_out = chain->n_in = 0;
    chain->out_size = chain->in_size = 0;
    struct walk w = {.q = q, .chain = chain};
    rc = is_packed(q) ? packed_walk(&w) : split_walk(&w);
    if (unlikely(rc < 0))
        return rc;
    if (unlikely(q->held + chain->slots > q->size))
        return broken(q, "offers a buffer again that it has not got back");
    q->avail = is_packed(q) ? packed_advance(q, q->avail, chain->slots) : (uint16_t)(q->avail + 1);
    q->held += chain->slots;
    q->in_flight++;
    q->requests++;
    return 1;
}

bool vmm_queue_waiting(struct vmm_queue *q)
{
    if (unlikely(!q->started))
        return false;
    return (is_packed(q) ? packed_look(q) : split_look(q)) != 0; /* broken: pop is to find out */
}

struct vmm_queue_mark vmm_queue_mark(const struct vmm_queue *q)
{
    return (struct vmm_queue_mark){.avail = q->avail, .requests = q->requests};
}

void vmm_queue_rewind(struct vmm_queue *q, struct vmm_queue_mark mark)
{
    if (unlikely(!q->started))
        return;
    uint32_t slots =
        is_packed(q) ? packed_distance(q, mark.avail, q->avail) : (uint16_t)(q->avail - mark.avail);
    q->held -= slots;
    q->in_flight -= q->requests - mark.requests;
    q->requests = mark.requests;
    q->avail = mark.avail;
}

static void wrote(const struct vmm_queue *q, const struct vmm_chain *chain, uint32_t written)
{
    const struct iovec *piece = chain->iov + chain->n_out;
    for (uint32_t n; written; written -= n, piece++) {
        n = piece->iov_len < written ? (uint32_t)piece->iov_len : written;
        vmm_vm_wrote(q->vm, piece->iov_base, n);
    }
}

void vmm_queue_push(struct vmm_queue *q, const struct vmm_chain *chain, uint32_t written)
{
    if (unlikely(!q->started || chain->era != q->era))
        return;
    if (unlikely(q->vm->tracked))
        wrote(q, chain, written);
    assert(written <= chain->in_size && q->held >= chain->slots && q->in_flight);
    if (is_packed(q))
        packed_push(q, chain, written);
    else
        split_push(q, chain, written);
    q->held -= chain->slots;
    q->in_flight--;
    q->bytes_out += chain->out_size;
    q->bytes_in += written;
}

bool vmm_queue_publish(struct vmm_queue *q)
{
    if (unlikely(!q->started) || !q->pushed)
        return false;
    bool interrupt = is_packed(q) ? packed_publish(q) : split_publish(q);
    q->pushed = 0;
    q->interrupts += interrupt;
    return interrupt;
}

/* ---- doorbells ---- */

static void wish16(struct vmm_queue *q, uint8_t *at, uint16_t value)
{
    store16(at, value);
    vmm_vm_wrote(q->vm, at, sizeof(value));
}

static void wish32(struct vmm_queue *q, uint8_t *at, uint32_t value)
{
    store32(at, value);
    vmm_vm_wrote(q->vm, at, sizeof(value));
}

void vmm_queue_suppress(struct vmm_queue *q)
{
    if (unlikely(!q->started))
        return;
    if (is_packed(q))
        wish32(q, q->host_device, EVENT_DISABLE << 16);
    else if (!(q->features & VMM_QUEUE_EVENT_IDX))
        wish16(q, q->host_device + USED_FLAGS, SPLIT_NO_NOTIFY);
    /* else: avail_event stays behind, and the driver does not pass it for 65535 requests (2.7.10.1) */
}

bool vmm_queue_arm(struct vmm_queue *q)
{
    if (unlikely(!q->started))
        return false;
    const bool event_idx = q->features & VMM_QUEUE_EVENT_IDX;
    if (is_packed(q))
        wish32(q, q->host_device, event_idx ? q->avail | EVENT_DESC << 16 : EVENT_ENABLE << 16);
    else if (event_idx)
        wish16(q, q->host_device + USED_RING + USED_ENTRY * q->size, q->avail);
    else
        wish16(q, q->host_device + USED_FLAGS, 0);
    /* Our wish before their index; pairs with the driver's barrier between its index and its look at our wish. */
    atomic_thread_fence(memory_order_seq_cst);
    return vmm_queue_waiting(q);
}
