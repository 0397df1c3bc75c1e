/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rings against a guest that does anything. An input is a configuration and then a schedule: the guest writes
 * somewhere, the device takes a step, by turns. What must hold whatever the guest does: every piece of a chain lies
 * in guest memory, sizes add up, nothing is taken without end, and the device changes no byte of guest memory but
 * those of its own areas.
 */
#include "machine.h"
#include "virtio/queue.h"

#include <string.h>

/* RAM that is small enough to compare: two regions that touch, one apart, one read-only. */
static const struct vmm_region layout[] = {
    {.gpa = 0, .size = 0x6000},
    {.gpa = 0x6000, .size = 0x1000},
    {.gpa = 0x10000, .size = 0x1000},
    {.gpa = 0x11000, .size = 0x1000, .flags = VMM_MEMORY_READONLY},
};
#define REGIONS (sizeof(layout) / sizeof(layout[0]))
#define RAM 0x9000

static vmm_vm *vm;
static uint8_t shadow[RAM]; /* guest memory as the guest alone made it */

struct input {
    const uint8_t *at, *end;
};

static uint64_t take(struct input *in, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && in->at < in->end; i++)
        value |= (uint64_t)*in->at++ << 8 * i;
    return value;
}

/* An address: near something that matters, or anywhere at all. */
static uint64_t take_address(struct input *in)
{
    static const uint64_t places[] = {0,       0x1000,  0x2000,       0x3000,    0x4000,  0x5ff0,
                                      0x6000,  0x6ff8,  0x7000,       0x10000,   0x10ff8, 0x11000,
                                      0x11ff8, 0x12000, ~0ull - 4095, ~0ull - 15};
    uint8_t how = (uint8_t)take(in, 1);
    return how == 0xff ? take(in, 8) : places[how & 15] + (how & 16 ? take(in, 1) : 0);
}

/* The guest writes; what is not RAM is left out. */
static void guest_write(uint64_t gpa, const void *bytes, size_t n)
{
    size_t before = 0;
    for (unsigned i = 0; i < REGIONS; before += layout[i++].size) {
        if (gpa - layout[i].gpa >= layout[i].size)
            continue;
        uint64_t offset = gpa - layout[i].gpa, room = layout[i].size - offset;
        memcpy(vm->regions[i].host + offset, bytes, n < room ? n : room);
        memcpy(shadow + before + offset, bytes, n < room ? n : room);
        return;
    }
}

static bool inside(uint64_t gpa, uint64_t from, uint64_t size)
{
    return gpa - from < size;
}

static bool device_owns(const struct vmm_queue *q, uint64_t gpa)
{
    bool packed = q->features & VMM_QUEUE_PACKED;
    return inside(gpa, q->device, packed ? 4 : 4 + 8 * q->size + 2) ||
           (packed && inside(gpa, q->desc, 16 * q->size));
}

/* Outside what the device owns, guest memory is what the guest wrote. */
static void check_memory(const struct vmm_queue *q)
{
    size_t before = 0;
    for (unsigned i = 0; i < REGIONS; before += layout[i++].size)
        for (uint64_t page = 0; page < layout[i].size; page += 256) {
            const uint8_t *is = vm->regions[i].host + page, *was = shadow + before + page;
            if (memcmp(is, was, 256) != 0)
                for (unsigned n = 0; n < 256; n++)
                    CHECK(is[n] == was[n] || device_owns(q, layout[i].gpa + page + n));
        }
}

static void check_chain(const struct vmm_queue *q, const struct vmm_chain *c)
{
    uint64_t size[2] = {0, 0};
    CHECK(c->n_out + c->n_in <= VMM_CHAIN_PIECES);
    CHECK(c->slots >= 1 && c->slots <= q->size);
    CHECK((q->features & VMM_QUEUE_PACKED) || c->id < q->size);
    for (unsigned i = 0; i < (unsigned)c->n_out + c->n_in; i++) {
        const uint8_t *base = c->iov[i].iov_base;
        bool in = i >= c->n_out, found = false;
        for (unsigned r = 0; r < REGIONS; r++)
            found |= (uint64_t)(base - vm->regions[r].host) < layout[r].size &&
                     c->iov[i].iov_len <= layout[r].size - (uint64_t)(base - vm->regions[r].host) &&
                     !(in && layout[r].flags & VMM_MEMORY_READONLY);
        CHECK(found && c->iov[i].iov_len);
        size[in] += c->iov[i].iov_len;
    }
    CHECK(size[0] == c->out_size && size[1] == c->in_size && size[0] + size[1] <= UINT32_MAX);
}

static void configure(struct vmm_queue *q, struct input *in)
{
    uint8_t how = (uint8_t)take(in, 1);
    uint32_t features = how & 15;
    vmm_queue_reset(q);
    q->size = how & 16 ? (uint16_t)take(in, 2) : (uint16_t)(1u << (how >> 5));
    if (features & VMM_QUEUE_PACKED && how & 32)
        q->size++;
    /* Usually where the schedule's descriptors go. */
    uint8_t odd = (uint8_t)take(in, 1);
    q->desc = odd & 1 ? take_address(in) : 0x1000;
    q->driver = odd & 2 ? take_address(in) : 0x2000;
    q->device = odd & 4 ? take_address(in) : 0x3000;
    vmm_queue_start(q, vm, features);
}

/* One thing the guest does. Descriptors and indices come as such: a fuzzer would look for them for long. */
static void guest_step(const struct vmm_queue *q, struct input *in, uint8_t op)
{
    uint8_t bytes[256];
    uint16_t slot;
    switch (op & 3) {
    case 0: /* a descriptor, in the ring or in a table at 0x4000 */
        slot = (uint16_t)take(in, 1);
        uint64_t address = take_address(in);
        uint32_t size = (uint32_t)take(in, op & 16 ? 4 : 1);
        uint16_t low = (uint16_t)take(in, op & 32 ? 2 : 1), high = (uint16_t)take(in, op & 32 ? 2 : 1);
        if (op & 64 && q->features & VMM_QUEUE_PACKED) /* available, in either round */
            high = (high & 7) | (op & 128 ? 1 << 7 : 1 << 15);
        memcpy(bytes, &address, 8);
        memcpy(bytes + 8, &size, 4);
        memcpy(bytes + 12, &low, 2);
        memcpy(bytes + 14, &high, 2);
        guest_write((op & 8 ? 0x4000 : q->desc) + 16 * slot, bytes, 16);
        break;
    case 1: /* the index, or what stands in the driver's area */
        slot = (uint16_t)take(in, op & 16 ? 2 : 1);
        guest_write(q->driver + (op & 8 ? 2 * take(in, 1) : 2), &slot, 2);
        break;
    case 2: /* the next few entries, in order */
        for (unsigned i = 0; i < 8; i++) {
            slot = (uint16_t)((q->avail + i) & (op >> 4));
            guest_write(q->driver + 4 + 2 * ((q->avail + i) & (q->size - 1)), &slot, 2);
        }
        slot = (uint16_t)(q->avail + 1 + (op >> 2 & 3));
        guest_write(q->driver + 2, &slot, 2);
        break;
    case 3: { /* anything, anywhere */
        uint64_t gpa = take_address(in);
        size_t n = take(in, 1);
        for (size_t i = 0; i < n; i++)
            bytes[i] = (uint8_t)take(in, 1);
        guest_write(gpa, bytes, n);
        break;
    }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct vmm_chain held[VMM_QUEUE_SIZE_MAX + 1];
    if (!vm) {
        vm = machine_create();
        vm->n_regions = 0; /* its own, in place of the two there are */
        for (unsigned i = 0; i < REGIONS; i++)
            machine_add(vm, layout[i].gpa, layout[i].size, layout[i].flags);
    }
    struct input in = {data, data + size};
    struct vmm_queue q = {0};
    for (unsigned i = 0; i < REGIONS; i++)
        memset(vm->regions[i].host, 0, layout[i].size);
    memset(shadow, 0, sizeof(shadow));
    configure(&q, &in);

    unsigned n = 0, marked = 0;
    uint64_t pushed_at = 0, pushed = 0;
    struct vmm_queue_mark mark = vmm_queue_mark(&q);
    while (in.at < in.end) {
        uint8_t op = (uint8_t)take(&in, 1);
        switch (op & 7) {
        case 4: { /* take what there is, or one */
            unsigned before = n;
            while (n <= VMM_QUEUE_SIZE_MAX && vmm_queue_pop(&q, &held[n]) == 1) {
                check_chain(&q, &held[n++]);
                CHECK(n <= q.size && q.in_flight == n && q.held >= n && q.held <= q.size);
                if (op & 8)
                    break;
            }
            CHECK(n >= before && !q.fault == q.started);
            break;
        }
        case 5: /* answer one, not always the first */
            if (n) {
                unsigned i = (op >> 3) % n;
                uint32_t written = (uint32_t)(held[i].in_size < take(&in, 1) ? held[i].in_size : 0);
                vmm_queue_push(&q, &held[i], written);
                held[i] = held[--n];
                pushed++;
            }
            if (op & 128)
                vmm_queue_publish(&q);
            break;
        case 6:
            vmm_queue_publish(&q);
            if (op & 8)
                vmm_queue_suppress(&q);
            if (op & 16 && vmm_queue_arm(&q))
                CHECK(vmm_queue_waiting(&q) || q.fault);
            if (op & 32) {
                mark = vmm_queue_mark(&q);
                marked = n;
                pushed_at = pushed;
            }
            break;
        case 7: /* take back, if none of those was answered; or begin again */
            if (op & 8 && n >= marked && pushed == pushed_at) {
                vmm_queue_rewind(&q, mark);
                n = marked;
                CHECK(!q.started || q.in_flight == n);
            } else if (op & 16) {
                check_memory(&q);
                configure(&q, &in);
                memset(shadow, 0, sizeof(shadow));
                for (unsigned i = 0; i < REGIONS; i++)
                    memset(vm->regions[i].host, 0, layout[i].size);
                for (unsigned i = 0; i < n; i++) /* what comes too late goes nowhere */
                    vmm_queue_push(&q, &held[i], 0);
                CHECK(!q.pushed);
                n = marked = 0;
                pushed_at = pushed;
                mark = vmm_queue_mark(&q);
            }
            break;
        default:
            guest_step(&q, &in, op);
        }
    }
    vmm_queue_publish(&q);
    check_memory(&q);
    return 0;
}
