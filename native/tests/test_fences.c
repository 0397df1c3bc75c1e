/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fences that keep two sides from missing each other: litmus tests of store buffering.
 *
 * Each side stores, then loads what the other stores. Without a fence between the two, the store may still be in its
 * processor's store buffer while the load has been made (Intel SDM 3A, 9.2.3.4; AMD APM 2, 7.2), and so both sides
 * may see nothing of each other:
 *
 *     side        store                       load                          if both load the old value
 *     arm         the wish for a doorbell     the driver's index            a request that no doorbell announces
 *     publish     the used index              the wish for an interrupt     a driver that sleeps for ever
 *     touch       a byte of guest memory      the page's bit in the log     a page that no log calls dirty
 *     access      the epoch of a vCPU         the table of the bus          a device that is used after its detach
 *
 * Two threads on two processors make both halves at once, thousands of times. To widen the window, the tested side's
 * store stands behind stores to lines that the other processor owns. What this host shows is measured: each kind of
 * ring alternates with the same accesses without the fence, until those have failed CONTROLS times. Then the real
 * ones were tried as often under the same conditions, and one failure is too many. A host on which the control
 * never fails (one processor, or an emulator without store buffers) proves nothing, and the test is skipped by name.
 */
#include "fake_kvm.h"
#include "ring.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>

enum {
    SKIPPED = 77,
    CONTROLS = 20, /* misses of the control before the tested side has passed */
    BATCH = 1000,  /* rounds of the one, then of the other */
    LIMIT_S = 3,   /* of processor time, for a control that misses seldom or never */
    PRESSURE = 40, /* stores before the tested side's own: fewer than a store buffer's entries */
    LOOKS = 200,
    LINE = 64,
};
#define RING 0x10000ull
#define BUFFER 0x20000ull

/* ---- two threads, round by round ---- */

struct side {
    _Alignas(LINE) _Atomic uint32_t met; /* how often it came to meet the other */
    _Atomic bool asleep;
    uint32_t random;
    bool saw;
};

struct litmus {
    vmm_vm *vm;
    struct ring ring;
    struct vmm_queue q;
    vmm_dirty *log;
    uint8_t *page;
    struct vmm_vcpu vcpu;
    const struct vmm_bus_table *table; /* the one with the device in it */
    _Atomic bool detached;
    bool used_late;
    uint64_t round;
    _Atomic bool ended;
    struct side tested, rival;
    _Alignas(LINE) volatile uint8_t lines[PRESSURE][LINE];
};

/* A round is three steps, each begun by both sides together: the rival prepares, the tested side prepares, both act. */
struct kind {
    const char *name;
    uint32_t features; /* of a queue */
    void (*create)(struct litmus *l, uint32_t features);
    void (*rival_prepare)(struct litmus *l);
    void (*prepare)(struct litmus *l);
    bool (*act)(struct litmus *l);     /* returns whether it saw the rival's store */
    bool (*control)(struct litmus *l); /* the same without a fence */
    bool (*rival_act)(struct litmus *l);
    bool (*missed)(struct litmus *l); /* after both have acted */
};

static uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

/*
 * Look for a few microseconds, then sleep: a thread that has slept is put on its processor as soon as it is woken, and
 * so the two run at the same time even where others want the processors.
 */
static void meet(struct side *mine, struct side *other)
{
    const uint32_t now = atomic_fetch_add(&mine->met, 1) + 1;
    uint32_t seen;
    if (atomic_load(&other->asleep))
        syscall(SYS_futex, &mine->met, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    for (unsigned looks = 0; looks < LOOKS; looks++) {
        if (atomic_load_explicit(&other->met, memory_order_acquire) >= now)
            return;
        __builtin_ia32_pause();
    }
    atomic_store(&mine->asleep, true);
    while ((seen = atomic_load(&other->met)) < now)
        syscall(SYS_futex, &other->met, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_store(&mine->asleep, false);
}

/* Of the rival: its store is to come while the tested side's waits in the store buffer, for up to a microsecond. */
static void dawdle(struct side *side)
{
    const unsigned bits = next_random(&side->random) % 11;
    for (uint32_t n = next_random(&side->random) & ((1u << bits) - 1); n; n--)
        atomic_signal_fence(memory_order_seq_cst);
}

static bool controls(uint64_t round)
{
    return round / BATCH % 2 == 0;
}

struct tested {
    const struct kind *kind;
    struct litmus *l;
    int cpu;
};

static void pin(int cpu)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK_EQUAL(sched_setaffinity(0, sizeof(one), &one), 0);
}

static void *tested_side(void *opaque)
{
    const struct tested *t = opaque;
    struct litmus *l = t->l;
    pin(t->cpu);
    for (uint64_t round = 0;; round++) {
        meet(&l->tested, &l->rival);
        if (atomic_load(&l->ended))
            return NULL;
        t->kind->prepare(l);
        const unsigned pressure = next_random(&l->tested.random) % PRESSURE;
        meet(&l->tested, &l->rival);
        for (unsigned i = 0; i < pressure; i++)
            l->lines[i][0] = 1;
        l->tested.saw = controls(round) ? t->kind->control(l) : t->kind->act(l);
        meet(&l->tested, &l->rival);
    }
}

static void rival_round(const struct kind *kind, struct litmus *l)
{
    kind->rival_prepare(l);
    for (unsigned i = 0; i < PRESSURE; i++)
        l->lines[i][0] = 0;
    meet(&l->rival, &l->tested);
    meet(&l->rival, &l->tested);
    dawdle(&l->rival);
    l->rival.saw = kind->rival_act(l);
    meet(&l->rival, &l->tested);
}

static time_t seconds_spent(void)
{
    struct timespec spent;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return spent.tv_sec;
}

/* Returns whether the control missed often enough to say something of the tested side. */
static bool rival_side(const struct kind *kind, struct litmus *l)
{
    const time_t limit = seconds_spent() + LIMIT_S;
    uint64_t missed[2] = {0};
    while (missed[true] < CONTROLS && seconds_spent() <= limit) {
        for (unsigned i = 0; i < 2 * BATCH; i++, l->round++) {
            rival_round(kind, l);
            missed[controls(l->round)] += kind->missed(l);
            if (missed[false]) {
                fprintf(stderr, "%s: each side missed the other's store in round %llu\n", kind->name,
                        (unsigned long long)l->round);
                exit(1);
            }
        }
    }
    atomic_store(&l->ended, true);
    meet(&l->rival, &l->tested);
    printf("%-28s %8llu rounds, none missed; of as many without the fence %llu\n", kind->name,
           (unsigned long long)l->round / 2, (unsigned long long)missed[true]);
    return missed[true] >= CONTROLS;
}

/* ---- queues ---- */

static void relaxed16(uint16_t *field, uint16_t value)
{
    atomic_store_explicit((_Atomic uint16_t *)field, value, memory_order_relaxed);
}

static void relaxed32(uint16_t *field, uint32_t value)
{
    atomic_store_explicit((_Atomic uint32_t *)(void *)field, value, memory_order_relaxed);
}

static uint16_t look16(const uint16_t *field)
{
    return atomic_load_explicit((const _Atomic uint16_t *)field, memory_order_relaxed);
}

static uint32_t look32(const uint16_t *field)
{
    return atomic_load_explicit((const _Atomic uint32_t *)(const void *)field, memory_order_relaxed);
}

static bool event_idx(const struct litmus *l)
{
    return l->ring.features & VMM_QUEUE_EVENT_IDX;
}

static void create_queue(struct litmus *l, uint32_t features)
{
    ring_init(&l->ring, l->vm, RING, 16, features);
    ring_give(&l->ring, &l->q);
    CHECK_EQUAL(vmm_queue_start(&l->q, l->vm, features), 0);
}

static void offer(struct litmus *l)
{
    const struct piece piece = IN(BUFFER, 8);
    CHECK(ring_offer(&l->ring, &piece, 1) >= 0);
}

static void collect(struct litmus *l)
{
    int id;
    uint32_t written;
    while (ring_collect(&l->ring, &id, &written))
        ;
}

static void serve(struct litmus *l)
{
    struct vmm_chain chain;
    while (vmm_queue_pop(&l->q, &chain) == 1)
        vmm_queue_push(&l->q, &chain, 0);
    CHECK(!l->q.fault);
}

static bool both_saw_nothing(struct litmus *l)
{
    return !l->tested.saw && !l->rival.saw;
}

/* The device goes to sleep while the driver offers a request. */

static void prepare_arm(struct litmus *l)
{
    serve(l);
    vmm_queue_publish(&l->q);
    vmm_queue_suppress(&l->q);
}

static bool arm(struct litmus *l)
{
    return vmm_queue_arm(&l->q);
}

static bool arm_without_fence(struct litmus *l)
{
    struct ring *r = &l->ring;
    const uint16_t position = vmm_queue_position(&l->q);
    if (ring_packed(r)) {
        relaxed32(r->device_area, event_idx(l) ? position | EVENTS_AT << 16 : EVENTS_ON << 16);
        return (look16(&r->packed[position & 0x7fff].flags) & (AVAIL | USED)) == ring_packed_flags(position);
    }
    relaxed16(event_idx(l) ? ring_avail_event(r) : r->device_area, event_idx(l) ? position : 0);
    return look16(ring_avail_idx(r)) != position;
}

static bool offer_and_look(struct litmus *l)
{
    offer(l);
    return ring_doorbell(&l->ring);
}

/* The driver goes to sleep while the device publishes a used buffer. */

static void prepare_driver(struct litmus *l)
{
    collect(l);
    ring_suppress(&l->ring);
    offer(l);
}

static void prepare_publish(struct litmus *l)
{
    vmm_queue_publish(&l->q); /* what the control of the round before left unpublished in l->q */
    serve(l);
}

static bool publish(struct litmus *l)
{
    return vmm_queue_publish(&l->q);
}

static bool publish_without_fence(struct litmus *l)
{
    struct ring *r = &l->ring;
    const struct vmm_queue *q = &l->q;
    if (ring_packed(r)) {
        ring_store(&r->packed[q->first_slot & 0x7fff].flags, q->first_flags);
        return look32(r->driver_area) >> 16 != EVENTS_OFF;
    }
    ring_store(ring_used_idx(r), q->used + q->pushed);
    return event_idx(l) ? look16(ring_used_event(r)) == q->used : !look16(r->driver_area);
}

static bool sleep_and_look(struct litmus *l)
{
    return ring_arm(&l->ring);
}

/* ---- the dirty log: a page is written again while its mark is being fetched ---- */

/* Only here is a log open: marking a page is a fence for whatever follows. */
static void create_log(struct litmus *l, uint32_t features)
{
    (void)features;
    l->page = machine_at(l->vm, 0, 4096);
    CHECK_EQUAL(vmm_dirty_open(l->vm, &l->log), 0);
}

static void empty_log(struct litmus *l)
{
    uint64_t bitmap[FAKE_RAM / 4096 / 64];
    CHECK(vmm_dirty_take(l->log, 0, bitmap, sizeof(bitmap) / 8) >= 0);
}

static void touch(struct litmus *l, uint8_t value)
{
    atomic_store_explicit((_Atomic uint8_t *)l->page, value, memory_order_relaxed);
    vmm_vm_dirty(l->vm, 0, 1);
}

static void prepare_touch(struct litmus *l)
{
    touch(l, 0);
}

static bool touch_again(struct litmus *l)
{
    touch(l, 1);
    return false;
}

static bool touch_without_fence(struct litmus *l)
{
    atomic_store_explicit((_Atomic uint8_t *)l->page, 1, memory_order_relaxed);
    if (!(atomic_load_explicit(&l->vm->touched[0], memory_order_relaxed) & 1))
        atomic_fetch_or(&l->vm->touched[0], 1);
    return false;
}

static bool fetch_and_copy(struct litmus *l)
{
    (void)atomic_load_explicit((_Atomic uint8_t *)l->page, memory_order_relaxed); /* the line is here, then */
    CHECK(vmm_dirty_collect(l->log) >= 0);
    const bool saw = atomic_load_explicit((_Atomic uint8_t *)l->page, memory_order_relaxed);
    empty_log(l);
    return saw;
}

static bool copied_the_old_and_is_clean(struct litmus *l)
{
    return !l->rival.saw && vmm_dirty_collect(l->log) == 0;
}

/* ---- the bus: a vCPU comes to a device that is being detached ---- */

enum { PORT = 0x10, STAY = 300 };

/* Stay a while: a detach that did not wait for us has returned by then. */
static void use_device(struct litmus *l)
{
    for (int i = 0; i < STAY && !l->used_late; i++)
        l->used_late = atomic_load_explicit(&l->detached, memory_order_relaxed);
}

static uint64_t device_read(void *opaque, uint64_t offset, uint32_t size)
{
    (void)offset;
    (void)size;
    use_device(opaque);
    return 0;
}

static void device_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    (void)opaque;
    (void)offset;
    (void)size;
    (void)value;
}

static void create_vcpu(struct litmus *l, uint32_t features)
{
    (void)features;
    l->vcpu.vm = l->vm;
    l->vm->vcpus[l->vm->n_vcpus++] = &l->vcpu;
}

static void attach_device(struct litmus *l)
{
    static const vmm_device_ops ops = {device_read, device_write};
    l->detached = l->used_late = false;
    CHECK_EQUAL(vmm_bus_attach(l->vm, VMM_PIO, PORT, 1, &ops, l, 0), 0);
    l->table = atomic_load(&l->vm->bus.table[VMM_PIO]);
}

static void prepare_access(struct litmus *l)
{
    (void)l;
}

static bool access_device(struct litmus *l)
{
    uint64_t value;
    uint32_t tag;
    vmm_bus_access(&l->vcpu, VMM_PIO, PORT, 1, &value, false, &tag);
    return false;
}

static bool access_without_fence(struct litmus *l)
{
    struct vmm_bus *bus = &l->vm->bus;
    atomic_store_explicit(&l->vcpu.epoch, atomic_load_explicit(&bus->epoch, memory_order_relaxed),
                          memory_order_relaxed);
    if (atomic_load_explicit(&bus->table[VMM_PIO], memory_order_relaxed) == l->table)
        use_device(l);
    atomic_store_explicit(&l->vcpu.epoch, 0, memory_order_release);
    return false;
}

static bool detach_device(struct litmus *l)
{
    CHECK_EQUAL(vmm_bus_detach(l->vm, VMM_PIO, PORT), 0);
    atomic_store_explicit(&l->detached, true, memory_order_relaxed);
    return false;
}

static bool was_used_late(struct litmus *l)
{
    return l->used_late;
}

/* ---- all of them ---- */

#define ARM(text, bits)                                                                                      \
    {                                                                                                        \
        "vmm_queue_arm, " text, bits, create_queue, collect, prepare_arm, arm, arm_without_fence,            \
            offer_and_look, both_saw_nothing                                                                 \
    }
#define PUBLISH(text, bits)                                                                                  \
    {                                                                                                        \
        "vmm_queue_publish, " text, bits, create_queue, prepare_driver, prepare_publish, publish,            \
            publish_without_fence, sleep_and_look, both_saw_nothing                                          \
    }

static const struct kind kinds[] = {
    ARM("split", 0),
    ARM("split, event idx", VMM_QUEUE_EVENT_IDX),
    ARM("packed", VMM_QUEUE_PACKED),
    ARM("packed, event idx", VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX),
    PUBLISH("split", 0),
    PUBLISH("split, event idx", VMM_QUEUE_EVENT_IDX),
    PUBLISH("packed", VMM_QUEUE_PACKED),
    PUBLISH("packed, event idx", VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX),
    {"vmm_vm_dirty", 0, create_log, empty_log, prepare_touch, touch_again, touch_without_fence,
     fetch_and_copy, copied_the_old_and_is_clean},
    {"vmm_bus_access", 0, create_vcpu, attach_device, prepare_access, access_device, access_without_fence,
     detach_device, was_used_late},
};

static struct litmus *litmus_create(const struct kind *kind)
{
    struct litmus *l = aligned_alloc(LINE, sizeof(*l));
    CHECK(l);
    memset(l, 0, sizeof(*l));
    l->vm = fake_machine(0);
    l->tested.random = 0x12345679;
    l->rival.random = 0x87654321;
    kind->create(l, kind->features);
    return l;
}

static void litmus_destroy(struct litmus *l)
{
    vmm_dirty_close(l->log);
    l->vm->n_vcpus = 0; /* ours */
    fake_destroy(l->vm);
    free(l);
}

static bool holds(const struct kind *kind, const int cpus[2])
{
    struct litmus *l = litmus_create(kind);
    struct tested tested = {.kind = kind, .l = l, .cpu = cpus[0]};
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, tested_side, &tested), 0);
    pin(cpus[1]);
    const bool proven = rival_side(kind, l);
    CHECK_EQUAL(pthread_join(thread, NULL), 0);
    litmus_destroy(l);
    return proven;
}

/* The first and the last processor that this process may use: seldom two threads of one core. */
static bool two_cpus(int cpus[2])
{
    cpu_set_t allowed;
    CHECK_EQUAL(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
    cpus[0] = cpus[1] = -1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed)) {
            cpus[0] = cpus[0] < 0 ? cpu : cpus[0];
            cpus[1] = cpu;
        }
    return cpus[0] != cpus[1];
}

/*
 *     test_fences [name]          the kinds whose name begins so; all without it
 */
int main(int argc, char **argv)
{
    int cpus[2];
    bool proven = true;
    fake_spins = true;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!two_cpus(cpus)) {
        printf("store buffering needs two processors\n");
        return SKIPPED;
    }
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        if (argc < 2 || !strncmp(kinds[i].name, argv[1], strlen(argv[1])))
            proven &= holds(&kinds[i], cpus);
    if (!proven)
        printf("this host shows too little store buffering: nothing is proven where the control missed less "
               "than "
               "%d times\n",
               CONTROLS);
    return proven ? 0 : SKIPPED;
}
