/* SPDX-License-Identifier: Apache-2.0 */
/* Virtqueues by the sections of virtio 1.2, both kinds of ring; then every way to break their rules. */
#include "ring.h"

#include <errno.h>

#define RING 0x10000ull
#define RING2 0x20000ull
#define TABLE 0x30000ull
#define DATA 0x100000ull
#define PACKED VMM_QUEUE_PACKED
#define EVENT VMM_QUEUE_EVENT_IDX
#define ANY VMM_QUEUE_INDIRECT

/* A driver and a device's queue on one ring. */
struct rig {
    vmm_vm *vm;
    struct ring ring;
    struct vmm_queue q;
    struct vmm_chain chain;
};

static void set_up(struct rig *rig, uint16_t size, uint32_t features)
{
    rig->vm = machine_create();
    rig->q = (struct vmm_queue){0};
    ring_init(&rig->ring, rig->vm, RING, size, features);
    ring_give(&rig->ring, &rig->q);
    CHECK_EQUAL(vmm_queue_start(&rig->q, rig->vm, features), 0);
}

static void tear_down(struct rig *rig)
{
    vmm_vm_destroy(rig->vm);
}

/* The queue is broken, says so in these words, and stays so. */
static void check_broken(struct rig *rig, const char *words)
{
    CHECK_EQUAL(vmm_queue_pop(&rig->q, &rig->chain), -EPROTO);
    CHECK(rig->q.fault);
    if (!strstr(rig->q.fault, words)) {
        fprintf(stderr, "the fault is \"%s\", which does not say \"%s\"\n", rig->q.fault, words);
        exit(1);
    }
    CHECK_EQUAL(vmm_queue_pop(&rig->q, &rig->chain), -EPROTO);
    CHECK(!vmm_queue_waiting(&rig->q));
    vmm_queue_push(&rig->q, &rig->chain, 0);
    CHECK(!vmm_queue_publish(&rig->q));
    vmm_queue_suppress(&rig->q);
    CHECK(!vmm_queue_arm(&rig->q));
}

#define CHECK_PIECE(rig, i, gpa, size)                                                                       \
    do {                                                                                                     \
        CHECK((rig)->chain.iov[i].iov_base == vmm_vm_gpa((rig)->vm, gpa, size));                             \
        CHECK_EQUAL((rig)->chain.iov[i].iov_len, size);                                                      \
    } while (0)

/* Offer, pop, push and collect one chain of 16 bytes out and 512 in. */
static void one_request(struct rig *rig)
{
    int got;
    uint32_t written;
    int id = ring_offer(&rig->ring, (struct piece[]){OUT(DATA, 16), IN(DATA + 0x1000, 512)}, 2);
    CHECK(id >= 0);
    CHECK_EQUAL(vmm_queue_pop(&rig->q, &rig->chain), 1);
    CHECK_EQUAL(rig->chain.id, id);
    CHECK_EQUAL(rig->chain.n_out, 1);
    CHECK_EQUAL(rig->chain.n_in, 1);
    CHECK_PIECE(rig, 0, DATA, 16);
    CHECK_PIECE(rig, 1, DATA + 0x1000, 512);
    CHECK_EQUAL(vmm_queue_pop(&rig->q, &rig->chain), 0);
    vmm_queue_push(&rig->q, &rig->chain, 100);
    CHECK(!ring_collect(&rig->ring, &got, &written)); /* not before publish */
    vmm_queue_publish(&rig->q);
    CHECK(ring_collect(&rig->ring, &got, &written));
    CHECK_EQUAL(got, id);
    CHECK_EQUAL(written, 100);
}

/* ---- 2.7, 2.8: requests come and go ---- */

static void a_request_comes_and_goes(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 0);
    CHECK(!vmm_queue_waiting(&rig.q));
    for (int i = 0; i < 70000; i++) /* past every wrap: of the ring, of 16 bits */
        one_request(&rig);
    CHECK_EQUAL(rig.q.requests, 70000);
    CHECK_EQUAL(rig.q.bytes_out, 70000 * 16);
    CHECK_EQUAL(rig.q.bytes_in, 70000 * 100);
    CHECK_EQUAL(rig.q.in_flight, 0);
    CHECK(!rig.q.fault);
    tear_down(&rig);
}

static void every_size_of_ring_wraps(uint32_t features)
{
    for (uint16_t size = 2; size <= VMM_QUEUE_SIZE_MAX; size = features & PACKED ? size + 1 : size * 2) {
        struct rig rig;
        set_up(&rig, size, features);
        for (int i = 0; i < 3 * size; i++)
            one_request(&rig);
        tear_down(&rig);
    }
}

static void requests_are_answered_in_any_order(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 16, features);
    static struct vmm_chain chains[8];
    int ids[8];
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 8; i++) { /* chains of one and of two or three descriptors: packed slots differ */
            struct piece pieces[3] = {OUT(DATA + i * 16, 16), IN(DATA + 0x1000, 512), IN(DATA + 0x2000, 512)};
            ids[i] = ring_offer(&rig.ring, pieces, 1 + i % 3);
            CHECK(ids[i] >= 0);
            CHECK_EQUAL(vmm_queue_pop(&rig.q, &chains[i]), 1);
        }
        CHECK_EQUAL(rig.q.in_flight, 8);
        static const int order[8] = {3, 0, 7, 1, 2, 6, 5, 4};
        for (int i = 0; i < 8; i++)
            vmm_queue_push(&rig.q, &chains[order[i]], order[i] % 3 ? 100 + order[i] : 0);
        CHECK(vmm_queue_publish(&rig.q));
        for (int i = 0; i < 8; i++) {
            int id;
            uint32_t written;
            CHECK(ring_collect(&rig.ring, &id, &written));
            CHECK_EQUAL(id, ids[order[i]]);
            CHECK_EQUAL(written, order[i] % 3 ? 100 + order[i] : 0);
        }
        CHECK_EQUAL(rig.q.in_flight, 0);
    }
    tear_down(&rig);
}

static void the_whole_ring_may_be_one_chain(uint32_t features)
{
    struct rig rig;
    set_up(&rig, VMM_QUEUE_SIZE_MAX, features);
    struct piece pieces[VMM_QUEUE_SIZE_MAX];
    for (unsigned i = 0; i < VMM_QUEUE_SIZE_MAX; i++)
        pieces[i] = (struct piece){DATA + i * 4096, 1 + i, i >= 100};
    for (int round = 0; round < 3; round++) {
        int id = ring_offer(&rig.ring, pieces, VMM_QUEUE_SIZE_MAX), got;
        uint32_t written;
        CHECK(id >= 0);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
        CHECK_EQUAL(rig.chain.n_out, 100);
        CHECK_EQUAL(rig.chain.n_in, 156);
        CHECK_EQUAL(rig.chain.out_size, 5050);
        CHECK_EQUAL(rig.chain.in_size, 256 * 257 / 2 - 5050);
        for (unsigned i = 0; i < VMM_QUEUE_SIZE_MAX; i++)
            CHECK_PIECE(&rig, i, DATA + i * 4096, 1 + i);
        vmm_queue_push(&rig.q, &rig.chain, 7);
        CHECK(vmm_queue_publish(&rig.q));
        CHECK(ring_collect(&rig.ring, &got, &written) && got == id && written == 7);
    }
    tear_down(&rig);
}

static void a_zero_length_descriptor_carries_nothing(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    /* Its address means nothing either. */
    struct piece pieces[] = {OUT(~0ull, 0), OUT(DATA, 3), IN(MACHINE_RAM + 5, 0), IN(DATA, 4)};
    CHECK(ring_offer(&rig.ring, pieces, 4) >= 0);
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    CHECK_EQUAL(rig.chain.n_out, 1);
    CHECK_EQUAL(rig.chain.n_in, 1);
    CHECK_PIECE(&rig, 0, DATA, 3);
    CHECK_PIECE(&rig, 1, DATA, 4);
    tear_down(&rig);
}

static void a_buffer_may_cross_into_the_next_region(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    machine_add(rig.vm, MACHINE_RAM, 4096, 0);
    struct piece pieces[] = {OUT(MACHINE_RAM - 10, 30), IN(MACHINE_RAM - 1, 4097)};
    CHECK(ring_offer(&rig.ring, pieces, 2) >= 0);
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    CHECK_EQUAL(rig.chain.n_out, 2);
    CHECK_EQUAL(rig.chain.n_in, 2);
    CHECK_PIECE(&rig, 0, MACHINE_RAM - 10, 10);
    CHECK_PIECE(&rig, 1, MACHINE_RAM, 20);
    CHECK_PIECE(&rig, 2, MACHINE_RAM - 1, 1);
    CHECK_PIECE(&rig, 3, MACHINE_RAM, 4096);
    tear_down(&rig);
}

static void pops_are_undone(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    struct vmm_chain first;
    for (int round = 0; round < 20; round++) {
        int ids[3], id;
        uint32_t written;
        for (int i = 0; i < 3; i++)
            ids[i] = ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 16), IN(DATA, 16)}, 2);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &first), 1);
        struct vmm_queue_mark mark = vmm_queue_mark(&rig.q);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 0);
        vmm_queue_push(&rig.q, &first, 1); /* popped before the mark: allowed meanwhile */
        vmm_queue_rewind(&rig.q, mark);
        CHECK_EQUAL(rig.q.in_flight, 0);
        CHECK_EQUAL(rig.q.held, 0);
        for (int i = 1; i < 3; i++) {
            CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
            CHECK_EQUAL(rig.chain.id, ids[i]);
            vmm_queue_push(&rig.q, &rig.chain, 0);
        }
        vmm_queue_publish(&rig.q);
        for (int i = 0; i < 3; i++)
            CHECK(ring_collect(&rig.ring, &id, &written) && id == ids[i]);
        CHECK_EQUAL(rig.q.requests, 3 * (round + 1));
    }
    tear_down(&rig);
}

static void reset_keeps_only_statistics(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    one_request(&rig);
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1)}, 1) >= 0);
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    vmm_queue_reset(&rig.q);
    CHECK_EQUAL(rig.q.requests, 2);
    CHECK_EQUAL(rig.q.bytes_in, 100);
    CHECK_EQUAL(rig.q.size, 0);
    CHECK_EQUAL(rig.q.in_flight, 0);
    /* An answer that comes after the reset goes nowhere. */
    vmm_queue_push(&rig.q, &rig.chain, 0);
    CHECK(!vmm_queue_publish(&rig.q));
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 0);
    /* Nor does one that finds the queue started again. */
    ring_init(&rig.ring, rig.vm, RING, 8, features);
    ring_give(&rig.ring, &rig.q);
    CHECK_EQUAL(vmm_queue_start(&rig.q, rig.vm, features), 0);
    vmm_queue_push(&rig.q, &rig.chain, 0);
    CHECK(!vmm_queue_publish(&rig.q));
    one_request(&rig);
    tear_down(&rig);
}

/* ---- 2.7.5.3, 2.8.7: indirect descriptors ---- */

static void an_indirect_table_takes_one_slot(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 4, features | VMM_QUEUE_INDIRECT);
    static struct piece pieces[VMM_QUEUE_SIZE_MAX];
    for (unsigned i = 0; i < VMM_QUEUE_SIZE_MAX; i++)
        pieces[i] = (struct piece){DATA + 8 * i, 8, i >= 3};
    for (int i = 0; i < 30; i++) {
        int id, got;
        uint32_t written;
        /* At no alignment in particular. */
        CHECK((id = ring_offer_indirect(&rig.ring, TABLE + i, pieces, i % 2 ? 5 : VMM_QUEUE_SIZE_MAX)) >= 0);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
        CHECK_EQUAL(rig.chain.slots, 1);
        CHECK_EQUAL(rig.chain.n_out, 3);
        CHECK_EQUAL(rig.chain.n_in, i % 2 ? 2 : VMM_QUEUE_SIZE_MAX - 3);
        CHECK_PIECE(&rig, 4, DATA + 32, 8);
        vmm_queue_push(&rig.q, &rig.chain, 9);
        vmm_queue_publish(&rig.q);
        CHECK(ring_collect(&rig.ring, &got, &written) && got == id && written == 9);
    }
    tear_down(&rig);
}

/* 2.7.5.3.2: zero or more normal descriptors, then the indirect one, whose WRITE flag is ignored. */
static void split_a_table_may_end_a_chain(void)
{
    struct rig rig;
    set_up(&rig, 4, VMM_QUEUE_INDIRECT);
    struct split_desc *table = machine_at(rig.vm, TABLE, 64);
    table[0] = (struct split_desc){DATA + 0x1000, 20, NEXT, 3};
    table[3] = (struct split_desc){DATA + 0x2000, 30, NEXT | WRITE, 1};
    table[1] = (struct split_desc){DATA + 0x3000, 40, WRITE, 77};
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 10), OUT(TABLE, 64)}, 2) >= 0);
    rig.ring.split[1].flags = INDIRECT | WRITE;
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    CHECK_EQUAL(rig.chain.n_out, 2);
    CHECK_EQUAL(rig.chain.n_in, 2);
    CHECK_PIECE(&rig, 0, DATA, 10);
    CHECK_PIECE(&rig, 1, DATA + 0x1000, 20);
    CHECK_PIECE(&rig, 2, DATA + 0x2000, 30);
    CHECK_PIECE(&rig, 3, DATA + 0x3000, 40);
    tear_down(&rig);
}

/* Together they are no longer than the longest chain. */
static void split_a_table_that_ends_too_long_a_chain_breaks_it(void)
{
    for (unsigned entries = VMM_QUEUE_SIZE_MAX - 1; entries <= VMM_QUEUE_SIZE_MAX; entries++) {
        struct rig rig;
        set_up(&rig, 4, VMM_QUEUE_INDIRECT);
        struct split_desc *table = machine_at(rig.vm, TABLE, 16 * entries);
        for (unsigned i = 0; i < entries; i++)
            table[i] = (struct split_desc){DATA, 1, i + 1 < entries ? NEXT : 0, i + 1};
        CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1), OUT(TABLE, 16 * entries)}, 2) >= 0);
        rig.ring.split[1].flags = INDIRECT;
        if (entries < VMM_QUEUE_SIZE_MAX)
            CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
        else
            check_broken(&rig, "longer than its queue");
        tear_down(&rig);
    }
}

/* 2.8.7: in a packed ring's table only WRITE is looked at. */
static void packed_a_table_is_read_in_order(void)
{
    struct rig rig;
    set_up(&rig, 4, PACKED | VMM_QUEUE_INDIRECT);
    struct piece pieces[] = {OUT(DATA, 10), IN(DATA + 0x1000, 20), IN(DATA + 0x2000, 30)};
    CHECK(ring_offer_indirect(&rig.ring, TABLE, pieces, 3) >= 0);
    struct packed_desc *table = machine_at(rig.vm, TABLE, 48);
    table[0].flags |= NEXT | INDIRECT;
    table[2].flags |= NEXT | AVAIL | USED;
    table[1].id = 0xffff;
    rig.ring.packed[0].flags |= WRITE;
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    CHECK_EQUAL(rig.chain.n_out, 1);
    CHECK_EQUAL(rig.chain.n_in, 2);
    CHECK_PIECE(&rig, 2, DATA + 0x2000, 30);
    tear_down(&rig);
}

/* ---- 2.7.7, 2.7.10, 2.8.10: notifications ---- */

static void answer(struct rig *rig, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        CHECK(ring_offer(&rig->ring, (struct piece[]){IN(DATA, 64)}, 1) >= 0);
        CHECK_EQUAL(vmm_queue_pop(&rig->q, &rig->chain), 1);
        vmm_queue_push(&rig->q, &rig->chain, 1);
    }
}

static void collect(struct rig *rig, unsigned n)
{
    int id;
    uint32_t written;
    for (unsigned i = 0; i < n; i++)
        CHECK(ring_collect(&rig->ring, &id, &written));
    CHECK(!ring_collect(&rig->ring, &id, &written));
}

static void nothing_published_asks_for_no_interrupt(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    CHECK(!vmm_queue_publish(&rig.q));
    answer(&rig, 1);
    CHECK(vmm_queue_publish(&rig.q));
    CHECK(!vmm_queue_publish(&rig.q));
    CHECK_EQUAL(rig.q.interrupts, 1);
    tear_down(&rig);
}

static void flags_suppress_interrupts(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    for (int i = 0; i < 40; i++) {
        ring_suppress(&rig.ring);
        answer(&rig, 3);
        CHECK(!vmm_queue_publish(&rig.q));
        CHECK(ring_arm(&rig.ring)); /* they came before we asked: no interrupt will tell of them */
        collect(&rig, 3);
        CHECK(!ring_arm(&rig.ring));
        answer(&rig, 2);
        CHECK(vmm_queue_publish(&rig.q));
        collect(&rig, 2);
    }
    tear_down(&rig);
}

static void the_event_index_asks_for_one_interrupt(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 16, features | EVENT);
    for (int round = 0; round < 10000; round++) {
        CHECK(!ring_arm(&rig.ring));
        answer(&rig, 1 + round % 7);
        CHECK(vmm_queue_publish(&rig.q));
        answer(&rig, 3); /* not armed again: passed already */
        CHECK(!vmm_queue_publish(&rig.q));
        collect(&rig, 1 + round % 7 + 3);
    }
    tear_down(&rig);
}

static void the_event_index_asks_for_a_later_entry(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 16, features | EVENT);
    for (int round = 0; round < 1000; round++) {
        /* Wake me at the fifth. */
        uint16_t at = ring_advance(&rig.ring, rig.ring.used, 4);
        if (features & PACKED)
            atomic_store((_Atomic uint32_t *)rig.ring.driver_area, at | EVENTS_AT << 16);
        else
            ring_store(ring_used_event(&rig.ring), at);
        answer(&rig, 1);
        CHECK(!vmm_queue_publish(&rig.q));
        answer(&rig, 3);
        CHECK(!vmm_queue_publish(&rig.q));
        answer(&rig, 1 + round % 3);
        CHECK(vmm_queue_publish(&rig.q));
        answer(&rig, 1);
        CHECK(!vmm_queue_publish(&rig.q));
        collect(&rig, 6 + round % 3);
    }
    tear_down(&rig);
}

/* A chain of several slots contains the slot that was asked for. */
static void packed_the_event_may_lie_inside_a_list(void)
{
    struct rig rig;
    set_up(&rig, 7, PACKED | EVENT);
    for (int round = 0; round < 100; round++) {
        atomic_store((_Atomic uint32_t *)rig.ring.driver_area,
                     ring_advance(&rig.ring, rig.ring.used, 2) | EVENTS_AT << 16);
        CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1), OUT(DATA, 1), OUT(DATA, 1)}, 3) >= 0);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
        vmm_queue_push(&rig.q, &rig.chain, 0);
        CHECK(vmm_queue_publish(&rig.q));
        collect(&rig, 1);
    }
    tear_down(&rig);
}

static void nonsense_in_the_event_area_costs_only_interrupts(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 5 & (features & PACKED ? 5 : 4), features | EVENT);
    for (uint32_t wish = 0; wish < 0x40000; wish += 61) {
        if (features & PACKED)
            atomic_store((_Atomic uint32_t *)rig.ring.driver_area, wish);
        else
            ring_store(ring_used_event(&rig.ring), (uint16_t)wish);
        answer(&rig, 2);
        vmm_queue_publish(&rig.q);
        collect(&rig, 2);
    }
    CHECK(!rig.q.fault);
    tear_down(&rig);
}

/* DESC mode without the feature is no mode (2.8.10): better an interrupt too many. */
static void packed_the_event_mode_needs_its_feature(void)
{
    struct rig rig;
    set_up(&rig, 8, PACKED);
    atomic_store((_Atomic uint32_t *)rig.ring.driver_area, 7 | 0x8000 | EVENTS_AT << 16);
    answer(&rig, 1);
    CHECK(vmm_queue_publish(&rig.q));
    tear_down(&rig);
}

static bool offer_and_ask(struct rig *rig, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        CHECK(ring_offer(&rig->ring, (struct piece[]){OUT(DATA, 1)}, 1) >= 0);
    return ring_doorbell(&rig->ring);
}

static void serve_all(struct rig *rig)
{
    while (vmm_queue_pop(&rig->q, &rig->chain) == 1)
        vmm_queue_push(&rig->q, &rig->chain, 0);
    vmm_queue_publish(&rig->q);
    int id;
    uint32_t written;
    while (ring_collect(&rig->ring, &id, &written))
        ;
}

static void doorbells_are_asked_for(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    CHECK(offer_and_ask(&rig, 1)); /* a ring begins with doorbells on */
    for (int round = 0; round < 10000; round++) {
        vmm_queue_suppress(&rig.q);
        CHECK(!offer_and_ask(&rig, 2));
        CHECK(vmm_queue_arm(&rig.q)); /* requests wait */
        vmm_queue_suppress(&rig.q);
        serve_all(&rig);
        CHECK(!vmm_queue_arm(&rig.q));
        CHECK(offer_and_ask(&rig, 1 + round % 3));
        if (features & EVENT)
            CHECK(!offer_and_ask(&rig, 1)); /* one doorbell a wish */
    }
    tear_down(&rig);
}

/* ---- what a driver may configure: 2.7, 2.8.10.1 ---- */

static void check_refused(struct vmm_queue q, vmm_vm *vm, uint32_t features, const char *words)
{
    struct vmm_chain chain;
    CHECK_EQUAL(vmm_queue_start(&q, vm, features), -EINVAL);
    CHECK(q.fault && strstr(q.fault, words));
    CHECK_EQUAL(vmm_queue_pop(&q, &chain), -EPROTO);
}

static void configurations_are_checked(uint32_t features)
{
    vmm_vm *vm = machine_create();
    const uint64_t rom = MACHINE_HIGH - 0x10000;
    machine_add(vm, rom, 4096, VMM_MEMORY_READONLY);
    const bool packed = features & PACKED;
    const struct vmm_queue good = {.size = 8, .desc = RING, .driver = RING + 0x1000, .device = RING + 0x2000};
    struct vmm_queue q = good;
    CHECK_EQUAL(vmm_queue_start(&q, vm, features), 0);
    const uint16_t sizes[] = {0, 257, 512, 0x8000, 0xffff, 6};
    for (unsigned i = 0; i < (packed ? 5 : 6); i++) {
        q = good;
        q.size = sizes[i];
        check_refused(q, vm, features, packed ? "packed ring of" : "split ring of");
    }
    const struct {
        uint64_t size;
        unsigned alignment;
    } areas[3] = {{8 * 16, 16}, {packed ? 4 : 6 + 2 * 8, packed ? 4 : 2}, {packed ? 4 : 6 + 8 * 8, 4}};
    for (int i = 0; i < 3; i++) {
        uint64_t end = MACHINE_RAM - areas[i].size;
        const uint64_t bad[] = {MACHINE_RAM, ~0ull - 0xf, rom - 16, MACHINE_RAM - areas[i].alignment};
        q = good;
        uint64_t *at = i == 0 ? &q.desc : i == 1 ? &q.driver : &q.device;
        *at = end & -(uint64_t)areas[i].alignment; /* just fits */
        CHECK_EQUAL(vmm_queue_start(&q, vm, features), 0);
        for (unsigned k = 0; k < 3 + (areas[i].size > areas[i].alignment); k++) {
            *at = bad[k];
            check_refused(q, vm, features, "not in memory");
        }
        *at = RING + areas[i].alignment / 2;
        check_refused(q, vm, features, "not a multiple");
        *at = rom;
        check_refused(q, vm, features, "read-only");
    }
    vmm_vm_destroy(vm);
}

/* ---- broken rules ---- */

/* Offer pieces that break a rule, straight and, with the same outcome, through a table. */
static void breaks(uint32_t features, const struct piece *pieces, unsigned n, const char *words)
{
    for (int indirect = 0; indirect < 2; indirect++) {
        struct rig rig;
        set_up(&rig, 8, features | VMM_QUEUE_INDIRECT);
        machine_add(rig.vm, MACHINE_HIGH - 4096, 4096, VMM_MEMORY_READONLY);
        one_request(&rig);
        if (indirect)
            CHECK(ring_offer_indirect(&rig.ring, TABLE, pieces, n) >= 0);
        else
            CHECK(ring_offer(&rig.ring, pieces, n) >= 0);
        check_broken(&rig, words);
        CHECK_EQUAL(rig.q.requests, 1);
        tear_down(&rig);
    }
}

#define BREAKS(features, words, ...)                                                                         \
    breaks(features, (struct piece[]){__VA_ARGS__},                                                          \
           sizeof((struct piece[]){__VA_ARGS__}) / sizeof(struct piece), words)

static void buffers_outside_memory_break_it(uint32_t features)
{
    BREAKS(features, "where there is no memory", OUT(MACHINE_RAM, 1));
    BREAKS(features, "where there is no memory", IN(MACHINE_RAM - 1, 2));
    BREAKS(features, "where there is no memory", OUT(DATA, 1), IN(MACHINE_HIGH + MACHINE_RAM - 4096, 4097));
    BREAKS(features, "where there is no memory", IN(0, 0xffffffff));
    BREAKS(features, "where there is no memory", OUT(~0ull, 1));
    BREAKS(features, "wraps around", OUT(~0ull, 2));
    BREAKS(features, "wraps around", IN(~0ull - 0xfff, 0x2000));
    BREAKS(features, "read-only memory", IN(MACHINE_HIGH - 4096, 1));
    BREAKS(features, "read-only memory", IN(MACHINE_HIGH - 1, 2));
}

static void readonly_memory_may_be_read(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    machine_add(rig.vm, MACHINE_HIGH - 4096, 4096, VMM_MEMORY_READONLY);
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(MACHINE_HIGH - 4096, 4097)}, 1) >= 0);
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    CHECK_EQUAL(rig.chain.n_out, 2);
    tear_down(&rig);
}

static void readable_after_writable_breaks_it(uint32_t features)
{
    BREAKS(features, "device-readable descriptor after", IN(DATA, 1), OUT(DATA, 1));
    BREAKS(features, "device-readable descriptor after", OUT(DATA, 1), IN(DATA, 0), OUT(DATA, 0));
}

static void four_gigabytes_break_it(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    /* Address space, no memory behind it. */
    rig.vm->regions[1].size = 5ull << 30;
    rig.vm->regions[1].host =
        mmap(NULL, 5ull << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(rig.vm->regions[1].host != MAP_FAILED);
    struct piece pieces[] = {OUT(MACHINE_HIGH, 0x80000000), IN(MACHINE_HIGH, 0x7fffffff),
                             IN(MACHINE_HIGH, 1)};
    CHECK(ring_offer(&rig.ring, pieces, 2) >= 0);
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    CHECK_EQUAL(rig.chain.out_size + rig.chain.in_size, UINT32_MAX);
    CHECK(ring_offer(&rig.ring, pieces, 3) >= 0);
    check_broken(&rig, "4 GiB or more");
    tear_down(&rig);
}

static void a_chain_in_too_many_pieces_breaks_it(uint32_t features)
{
    struct rig rig;
    set_up(&rig, VMM_QUEUE_SIZE_MAX, features);
    machine_add(rig.vm, MACHINE_RAM, 4096, 0);
    struct piece pieces[VMM_QUEUE_SIZE_MAX]; /* each across the border of two regions */
    for (unsigned i = 0; i < VMM_QUEUE_SIZE_MAX; i++)
        pieces[i] = (struct piece)OUT(MACHINE_RAM - 1, 2);
    CHECK(ring_offer(&rig.ring, pieces, VMM_CHAIN_PIECES / 2) >= 0);
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    CHECK_EQUAL(rig.chain.n_out, VMM_CHAIN_PIECES);
    vmm_queue_push(&rig.q, &rig.chain, 0);
    vmm_queue_publish(&rig.q);
    collect(&rig, 1);
    CHECK(ring_offer(&rig.ring, pieces, VMM_CHAIN_PIECES / 2 + 1) >= 0);
    check_broken(&rig, "pieces");
    tear_down(&rig);
}

static void bad_tables_break_it(uint32_t features)
{
    static const struct {
        uint64_t gpa;
        uint32_t size;
        const char *words;
    } tables[] = {
        {TABLE, 0, "no number of descriptors"},
        {TABLE, 15, "no number of descriptors"},
        {TABLE, 40, "no number of descriptors"},
        {TABLE, 16 * (VMM_QUEUE_SIZE_MAX + 1), "more than a queue has"},
        {TABLE, 0xfffffff0, "more than a queue has"},
        {MACHINE_RAM - 16, 32, "not in memory"},
        {~0ull - 15, 16, "not in memory"},
        {~0ull - 15, 32, "not in memory"},
    };
    for (unsigned i = 0; i < sizeof(tables) / sizeof(tables[0]); i++) {
        struct rig rig;
        set_up(&rig, 8, features | VMM_QUEUE_INDIRECT);
        CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(tables[i].gpa, tables[i].size)}, 1) >= 0);
        *(features & PACKED ? &rig.ring.packed[0].flags : &rig.ring.split[0].flags) |= INDIRECT;
        check_broken(&rig, tables[i].words);
        tear_down(&rig);
    }
}

static void a_table_that_was_not_agreed_breaks_it(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    CHECK(ring_offer_indirect(&rig.ring, TABLE, (struct piece[]){OUT(DATA, 1)}, 1) >= 0);
    check_broken(&rig, "not agreed");
    tear_down(&rig);
}

/* One split chain, damaged. */
static void split_breaks(struct split_desc d0, struct split_desc d1, struct split_desc t0, const char *words)
{
    struct rig rig;
    set_up(&rig, 8, VMM_QUEUE_INDIRECT);
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1)}, 1) >= 0);
    rig.ring.split[0] = d0;
    rig.ring.split[1] = d1;
    *(struct split_desc *)machine_at(rig.vm, TABLE, 16) = t0;
    check_broken(&rig, words);
    tear_down(&rig);
}

static void split_bad_chains_break_it(void)
{
    const struct split_desc none = {0}, byte = {DATA, 1, NEXT, 1}, table = {TABLE, 16, INDIRECT, 0};
    split_breaks((struct split_desc){DATA, 1, NEXT, 0}, none, none, "or a loop");
    split_breaks(byte, (struct split_desc){DATA, 1, NEXT, 0}, none, "or a loop");
    split_breaks((struct split_desc){0, 0, NEXT, 0}, none, none, "or a loop"); /* of nothing */
    split_breaks((struct split_desc){DATA, 1, NEXT, 8}, none, none, "descriptor 8 of a table of 8");
    split_breaks((struct split_desc){DATA, 1, NEXT, 0xffff}, none, none, "descriptor 65535");
    split_breaks((struct split_desc){TABLE, 16, INDIRECT | NEXT, 1}, none, none, "with a next one");
    split_breaks(table, none, (struct split_desc){TABLE, 16, INDIRECT, 0}, "in an indirect table");
    split_breaks((struct split_desc){RING, 128, INDIRECT, 0}, none, none, "in an indirect table");
    split_breaks(table, none, (struct split_desc){DATA, 1, NEXT, 1}, "descriptor 1 of a table of 1");
    split_breaks(table, none, (struct split_desc){DATA, 1, NEXT, 0}, "or a loop");
    split_breaks(byte, table, (struct split_desc){DATA, 1, NEXT, 0}, "or a loop");
}

static void split_bad_heads_break_it(void)
{
    for (uint32_t head = 8; head < 0x10000; head += head < 16 ? 1 : 4095) {
        struct rig rig;
        set_up(&rig, 8, 0);
        CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1)}, 1) >= 0);
        rig.ring.driver_area[2] = (uint16_t)head;
        check_broken(&rig, "of a table of 8");
        tear_down(&rig);
    }
}

/* 2.7.13.3: the index moves forward, and never by more than the ring holds. */
static void split_a_leaping_index_breaks_it(void)
{
    static const uint16_t leaps[] = {9, 0x7fff, 0x8000, 0xffff};
    for (unsigned i = 0; i < sizeof(leaps) / sizeof(leaps[0]); i++) {
        struct rig rig;
        set_up(&rig, 8, 0);
        one_request(&rig);
        ring_store(ring_avail_idx(&rig.ring), 1 + leaps[i]);
        CHECK(vmm_queue_arm(&rig.q)); /* there is something to find out */
        check_broken(&rig, "available index");
        tear_down(&rig);
    }
}

static void a_buffer_offered_twice_breaks_it(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1)}, 1) >= 0);
    for (uint16_t i = 0; i < 8; i++) {
        if (features & PACKED)
            rig.ring.packed[i] = rig.ring.packed[0];
        else
            ring_store(ring_avail_idx(&rig.ring), i + 1);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    }
    if (features & PACKED)
        rig.ring.packed[0].flags ^= AVAIL | USED;
    else
        ring_store(ring_avail_idx(&rig.ring), 9);
    check_broken(&rig, "has not got back");
    tear_down(&rig);
}

static void packed_an_endless_list_breaks_it(void)
{
    struct rig rig;
    set_up(&rig, 8, PACKED);
    struct piece pieces[8];
    for (int i = 0; i < 8; i++)
        pieces[i] = (struct piece)OUT(DATA, 1);
    CHECK(ring_offer(&rig.ring, pieces, 8) >= 0);
    rig.ring.packed[7].flags |= NEXT; /* and slot 0 is not available in the next round */
    check_broken(&rig, "slot 0 is not available");
    tear_down(&rig);
}

static void packed_a_half_available_list_breaks_it(void)
{
    struct rig rig;
    set_up(&rig, 8, PACKED);
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1), OUT(DATA, 1)}, 2) >= 0);
    rig.ring.packed[1].flags ^= AVAIL;
    check_broken(&rig, "slot 1 is not available");
    tear_down(&rig);
}

static void packed_a_table_in_a_list_breaks_it(void)
{
    for (int i = 0; i < 2; i++) {
        struct rig rig;
        set_up(&rig, 8, PACKED | VMM_QUEUE_INDIRECT);
        CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(TABLE, 16), OUT(TABLE, 16)}, 2) >= 0);
        rig.ring.packed[i].flags |= INDIRECT;
        check_broken(&rig, "indirect descriptor in a list");
        tear_down(&rig);
    }
}

/* 2.8.5: a used descriptor says whether the device wrote. */
static void packed_used_flags_say_whether_something_was_written(void)
{
    struct rig rig;
    set_up(&rig, 2, PACKED);
    for (unsigned i = 0; i < 8; i++) {
        CHECK(ring_offer(&rig.ring, (struct piece[]){IN(DATA, 8)}, 1) >= 0);
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
        vmm_queue_push(&rig.q, &rig.chain, i & 1);
        vmm_queue_publish(&rig.q);
        CHECK_EQUAL(rig.ring.packed[i & 1].flags, (i & 1 ? WRITE : 0) | (i & 2 ? 0 : AVAIL | USED));
        collect(&rig, 1);
    }
    tear_down(&rig);
}

/* 2.8.1: flags that do not fit the wrap counter are no offer. */
static void packed_other_flags_are_no_offer(void)
{
    struct rig rig;
    set_up(&rig, 8, PACKED);
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(DATA, 1)}, 1) >= 0);
    static const uint16_t others[] = {0, USED, AVAIL | USED};
    for (int i = 0; i < 3; i++) {
        rig.ring.packed[0].flags = others[i];
        CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 0);
    }
    rig.ring.packed[0].flags = AVAIL;
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    tear_down(&rig);
}

/* The chain is a copy: what the guest writes after the pop changes nothing. */
static void a_chain_is_a_copy(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    struct piece pieces[] = {OUT(DATA, 16), IN(DATA + 0x1000, 512)};
    int id = ring_offer_indirect(&rig.ring, TABLE, pieces, 2), got;
    uint32_t written;
    rig.q.features |= VMM_QUEUE_INDIRECT;
    CHECK_EQUAL(vmm_queue_pop(&rig.q, &rig.chain), 1);
    memset(machine_at(rig.vm, TABLE, 32), 0xff, 32);
    memset(machine_at(rig.vm, RING, 128), 0xff, 128);
    CHECK_PIECE(&rig, 0, DATA, 16);
    CHECK_PIECE(&rig, 1, DATA + 0x1000, 512);
    vmm_queue_push(&rig.q, &rig.chain, 5);
    vmm_queue_publish(&rig.q);
    CHECK(ring_collect(&rig.ring, &got, &written) && got == id && written == 5);
    tear_down(&rig);
}

static void a_broken_queue_starts_again(uint32_t features)
{
    struct rig rig;
    set_up(&rig, 8, features);
    CHECK(ring_offer(&rig.ring, (struct piece[]){OUT(~0ull, 1)}, 1) >= 0);
    check_broken(&rig, "where there is no memory");
    vmm_queue_reset(&rig.q);
    CHECK(!rig.q.fault);
    ring_init(&rig.ring, rig.vm, RING2, 4, features);
    ring_give(&rig.ring, &rig.q);
    CHECK_EQUAL(vmm_queue_start(&rig.q, rig.vm, features), 0);
    one_request(&rig);
    tear_down(&rig);
}

/* ---- bytes of a chain ---- */

static void bytes_are_read_and_written_across_pieces(void)
{
    uint8_t memory[64], copy[64];
    for (int i = 0; i < 64; i++)
        memory[i] = (uint8_t)i;
    struct vmm_vm vm = {0}; /* nobody asks which pages change */
    struct vmm_chain c = {.vm = &vm, .n_out = 3, .n_in = 2, .out_size = 12, .in_size = 9};
    c.iov[0] = (struct iovec){memory, 3};
    c.iov[1] = (struct iovec){memory + 10, 1};
    c.iov[2] = (struct iovec){memory + 20, 8};
    c.iov[3] = (struct iovec){memory + 40, 4};
    c.iov[4] = (struct iovec){memory + 50, 5};
    static const uint8_t out[12] = {0, 1, 2, 10, 20, 21, 22, 23, 24, 25, 26, 27};
    for (size_t at = 0; at <= 13; at++)
        for (size_t n = 0; n <= 14; n++) {
            size_t want = at >= 12 ? 0 : n < 12 - at ? n : 12 - at;
            struct iovec iov[VMM_CHAIN_PIECES];
            memset(copy, 0xee, sizeof(copy));
            CHECK_EQUAL(vmm_chain_read(&c, at, copy, n), want);
            CHECK(!want || memcmp(copy, out + at, want) == 0);
            CHECK_EQUAL(copy[want], 0xee);
            size_t sliced = 0;
            for (unsigned i = 0, pieces = vmm_chain_slice(&c, false, at, n, iov); i < pieces; i++) {
                CHECK(iov[i].iov_len && memcmp(iov[i].iov_base, out + at + sliced, iov[i].iov_len) == 0);
                sliced += iov[i].iov_len;
            }
            CHECK_EQUAL(sliced, want);
        }
    CHECK_EQUAL(vmm_chain_write(&c, 2, "abcdefghijk", 11), 7);
    CHECK(memcmp(memory + 40,
                 "\x28\x29"
                 "ab",
                 4) == 0);
    CHECK(memcmp(memory + 50, "cdefg", 5) == 0);
    CHECK_EQUAL(memory[44], 44);
    CHECK_EQUAL(memory[55], 55);
    CHECK_EQUAL(vmm_chain_write(&c, 9, "x", 1), 0);
    CHECK_EQUAL(vmm_chain_write(&c, UINT64_MAX, "x", 1), 0);
    struct iovec iov[VMM_CHAIN_PIECES];
    CHECK_EQUAL(vmm_chain_slice(&c, true, 1, UINT64_MAX, iov), 2);
    CHECK(iov[0].iov_base == memory + 41 && iov[0].iov_len == 3 && iov[1].iov_len == 5);
    CHECK_EQUAL(vmm_chain_slice(&c, true, 0, 4, iov), 1);
}

int main(void)
{
    static void (*const both[])(uint32_t) = {
        a_request_comes_and_goes,
        every_size_of_ring_wraps,
        requests_are_answered_in_any_order,
        the_whole_ring_may_be_one_chain,
        a_zero_length_descriptor_carries_nothing,
        a_buffer_may_cross_into_the_next_region,
        pops_are_undone,
        reset_keeps_only_statistics,
        an_indirect_table_takes_one_slot,
        nothing_published_asks_for_no_interrupt,
        flags_suppress_interrupts,
        the_event_index_asks_for_one_interrupt,
        the_event_index_asks_for_a_later_entry,
        nonsense_in_the_event_area_costs_only_interrupts,
        doorbells_are_asked_for,
        configurations_are_checked,
        buffers_outside_memory_break_it,
        readonly_memory_may_be_read,
        readable_after_writable_breaks_it,
        four_gigabytes_break_it,
        a_chain_in_too_many_pieces_breaks_it,
        bad_tables_break_it,
        a_table_that_was_not_agreed_breaks_it,
        a_buffer_offered_twice_breaks_it,
        a_chain_is_a_copy,
        a_broken_queue_starts_again,
    };
    for (unsigned i = 0; i < sizeof(both) / sizeof(both[0]); i++) {
        both[i](0);
        both[i](PACKED);
    }
    a_request_comes_and_goes(VMM_QUEUE_IN_ORDER | EVENT);
    a_request_comes_and_goes(VMM_QUEUE_IN_ORDER | EVENT | PACKED);
    doorbells_are_asked_for(EVENT);
    doorbells_are_asked_for(PACKED | EVENT);
    split_a_table_may_end_a_chain();
    split_a_table_that_ends_too_long_a_chain_breaks_it();
    split_bad_chains_break_it();
    split_bad_heads_break_it();
    split_a_leaping_index_breaks_it();
    packed_a_table_is_read_in_order();
    packed_the_event_may_lie_inside_a_list();
    packed_the_event_mode_needs_its_feature();
    packed_an_endless_list_breaks_it();
    packed_a_half_available_list_breaks_it();
    packed_a_table_in_a_list_breaks_it();
    packed_other_flags_are_no_offer();
    packed_used_flags_say_whether_something_was_written();
    bytes_are_read_and_written_across_pieces();
    return 0;
}
