/* SPDX-License-Identifier: Apache-2.0 */
/* The status machine and the mmio transport, driven through registers alone (virtio 1.2, 2.1, 3.1, 4.2). */
#include "ring.h"

#include "virtio/virtio.h"
#include "vmmrng.h"

#include <errno.h>
#include <poll.h>
#include <semaphore.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { /* 4.2.2 */
       MAGIC = 0x00,
       DEVICE_ID = 0x08,
       FEATURES = 0x10,
       FEATURES_SEL = 0x14,
       DRIVER_FEATURES = 0x20,
       DRIVER_FEATURES_SEL = 0x24,
       QUEUE_SEL = 0x30,
       QUEUE_NUM_MAX = 0x34,
       QUEUE_NUM = 0x38,
       QUEUE_READY = 0x44,
       NOTIFY = 0x50,
       ISR = 0x60,
       ACK = 0x64,
       STATUS = 0x70,
       DESC = 0x80,
       DRIVER = 0x90,
       DEVICE = 0xa0,
       GENERATION = 0xfc,
       CONFIG = 0x100
};

#define OK (VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER | VMM_STATUS_FEATURES_OK)
#define RUNNING (OK | VMM_STATUS_DRIVER_OK)

struct bench {
    vmm_vm *vm;
    vmm_virtio *dev;
    vmm_virtio_mmio *transport;
    int raised, said, started, stopped, quiesced, forgot;
    _Atomic int kicks;
    int seen; /* eventfd: a kick was handled */
    vmm_line line;
};

static void set_line(void *opaque, uint32_t n, int level)
{
    (void)n;
    ((struct bench *)opaque)->raised = level;
}

static void say(void *opaque, const char *text)
{
    CHECK(text[0]);
    ((struct bench *)opaque)->said++;
}

static void on_start(void *opaque)
{
    ((struct bench *)opaque)->started++;
}
static void on_stop(void *opaque)
{
    ((struct bench *)opaque)->stopped++;
}
static void on_quiesce(void *opaque)
{
    ((struct bench *)opaque)->quiesced++;
}
static void on_forget(void *opaque, uint32_t queue)
{
    CHECK_EQUAL(queue, 0);
    CHECK_EQUAL(((struct bench *)opaque)->quiesced, 1); /* before */
    ((struct bench *)opaque)->forgot++;
}
static void on_kick(void *opaque, uint32_t queue)
{
    struct bench *b = opaque;
    vmm_chain *chain = vmm_chain_create();
    while (vmm_virtio_take(b->dev, queue, chain)) {
        vmm_chain_put(chain, 0, "answer", 6);
        vmm_virtio_answer(b->dev, queue, chain, 6);
    }
    vmm_virtio_flush(b->dev, queue);
    vmm_chain_destroy(chain);
    b->kicks++;
    CHECK(eventfd_write(b->seen, 1) == 0);
}

static uint32_t get(struct bench *b, uint32_t offset)
{
    return (uint32_t)vmm_virtio_mmio_ops()->read(b->transport, offset, 4);
}
static void put(struct bench *b, uint32_t offset, uint32_t value)
{
    vmm_virtio_mmio_ops()->write(b->transport, offset, 4, value);
}

static void setup(struct bench *b)
{
    static const vmm_virtio_ops ops = {
        .start = on_start, .kick = on_kick, .stop = on_stop, .quiesce = on_quiesce, .forget = on_forget};
    static const uint16_t sizes[] = {16, 8};
    memset(b, 0, sizeof(*b));
    b->vm = machine_create();
    vmm_vm_on_message(b->vm, say, b);
    b->seen = eventfd(0, EFD_SEMAPHORE);
    b->line = (vmm_line){set_line, b, 0};
    CHECK_EQUAL(vmm_virtio_create(b->vm, &ops, b, 42, "test", 1ull << 3, 2, sizes, 8, &b->dev), 0);
    CHECK_EQUAL(vmm_virtio_mmio_create(b->dev, 0xc0000000, &b->line, &b->transport), 0);
}

static void teardown(struct bench *b)
{
    vmm_virtio_reset(b->dev);
    vmm_vm_destroy(b->vm);
    vmm_virtio_mmio_destroy(b->transport);
    vmm_virtio_destroy(b->dev);
    close(b->seen);
}

static void agree(struct bench *b, uint64_t features)
{
    put(b, STATUS, VMM_STATUS_ACKNOWLEDGE);
    put(b, STATUS, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER);
    for (uint32_t half = 0; half < 2; half++) {
        put(b, DRIVER_FEATURES_SEL, half);
        put(b, DRIVER_FEATURES, (uint32_t)(features >> (32 * half)));
    }
    put(b, STATUS, OK);
}

static void place(struct bench *b, uint32_t queue, const struct ring *ring)
{
    put(b, QUEUE_SEL, queue);
    put(b, QUEUE_NUM, ring->size);
    const uint64_t areas[] = {ring->desc, ring->driver, ring->device};
    for (uint32_t i = 0; i < 3; i++) {
        put(b, DESC + 0x10 * i, (uint32_t)areas[i]);
        put(b, DESC + 0x10 * i + 4, (uint32_t)(areas[i] >> 32));
    }
    put(b, QUEUE_READY, 1);
}

static void drive(struct bench *b, struct ring *ring, uint64_t features)
{
    agree(b, features | VMM_F_VERSION_1);
    CHECK_EQUAL(get(b, STATUS), OK);
    ring_init(ring, b->vm, MACHINE_HIGH + 0x1000, 16, features & VMM_F_RING_PACKED ? VMM_QUEUE_PACKED : 0);
    place(b, 0, ring);
    CHECK_EQUAL(get(b, QUEUE_READY), 1);
    put(b, STATUS, RUNNING);
    CHECK_EQUAL(get(b, STATUS), RUNNING);
}

static void wait_kick(struct bench *b)
{
    struct pollfd p = {.fd = b->seen, .events = POLLIN};
    CHECK(poll(&p, 1, PATIENCE_MS) == 1);
    eventfd_t one;
    CHECK(eventfd_read(b->seen, &one) == 0);
    VMM_VIRTIO_LOCKED(b->dev); /* the handler has left */
}

/* 4.2.2: what a driver finds first */
static void test_identity(void)
{
    struct bench b;
    setup(&b);
    CHECK_EQUAL(get(&b, MAGIC), 0x74726976);
    CHECK_EQUAL(get(&b, 4), 2);
    CHECK_EQUAL(get(&b, DEVICE_ID), 42);
    CHECK_EQUAL(get(&b, STATUS), 0);
    put(&b, FEATURES_SEL, 1);
    CHECK(get(&b, FEATURES) & (uint32_t)(VMM_F_VERSION_1 >> 32));
    put(&b, FEATURES_SEL, 2);
    CHECK_EQUAL(get(&b, FEATURES), 0);
    CHECK_EQUAL(get(&b, QUEUE_NUM_MAX), 16);
    put(&b, QUEUE_SEL, 1);
    CHECK_EQUAL(get(&b, QUEUE_NUM_MAX), 8);
    put(&b, QUEUE_SEL, 2);
    CHECK_EQUAL(get(&b, QUEUE_NUM_MAX), 0);
    CHECK_EQUAL(get(&b, 0xb0), UINT32_MAX); /* no shared memory */
    teardown(&b);
}

/* 3.1.1: the way to DRIVER_OK, one request, the way back */
static void test_a_request_goes_through(uint64_t ring_kind)
{
    struct bench b;
    struct ring ring;
    setup(&b);
    drive(&b, &ring, ring_kind);
    CHECK_EQUAL(b.started, 1);
    wait_kick(&b); /* DRIVER_OK looks at every queue once */
    struct piece piece = IN(0x8000, 64);
    int id;
    uint32_t written;
    CHECK(ring_offer(&ring, &piece, 1) >= 0);
    CHECK(ring_doorbell(&ring));
    put(&b, NOTIFY, 0); /* no ioeventfd without KVM: the write itself rings */
    wait_kick(&b);
    CHECK(ring_collect(&ring, &id, &written));
    CHECK_EQUAL(written, 6);
    CHECK(!memcmp(machine_at(b.vm, 0x8000, 6), "answer", 6));
    CHECK_EQUAL(b.raised, 1);
    CHECK_EQUAL(get(&b, ISR), 1);
    put(&b, ACK, 1);
    CHECK_EQUAL(b.raised, 0);
    vmm_queue_stats stats;
    CHECK_EQUAL(vmm_virtio_queue_stats(b.dev, 0, &stats), 0);
    CHECK_EQUAL(stats.requests, 1);
    CHECK_EQUAL(stats.interrupts, 1);
    put(&b, STATUS, 0);
    CHECK_EQUAL(get(&b, STATUS), 0);
    CHECK_EQUAL(b.stopped, 1);
    CHECK_EQUAL(get(&b, QUEUE_READY), 0);
    teardown(&b);
    CHECK_EQUAL(b.stopped, 1);
}

/* 2.2.2, 3.1.1 step 5 */
static void test_features_that_were_not_offered_are_refused(void)
{
    struct bench b;
    setup(&b);
    agree(&b, VMM_F_VERSION_1 | 1);
    CHECK(!(get(&b, STATUS) & VMM_STATUS_FEATURES_OK));
    agree(&b, 0); /* a driver of before version 1 */
    CHECK(!(get(&b, STATUS) & VMM_STATUS_FEATURES_OK));
    put(&b, STATUS, RUNNING); /* asks for both at once, with the wrong features */
    CHECK(!(get(&b, STATUS) & VMM_STATUS_DRIVER_OK));
    CHECK_EQUAL(b.started, 0);
    agree(&b, VMM_F_VERSION_1 | 1 << 3);
    CHECK_EQUAL(get(&b, STATUS), OK);
    put(&b, DRIVER_FEATURES_SEL, 0);
    put(&b, DRIVER_FEATURES, 0); /* too late */
    vmm_virtio_info info;
    vmm_virtio_get_info(b.dev, &info);
    CHECK_EQUAL(info.agreed, VMM_F_VERSION_1 | 1 << 3);
    teardown(&b);
}

/* 2.1.1: the driver clears bits by reset alone; NEEDS_RESET is not his to set */
static void test_status_bits_stay_until_reset(void)
{
    struct bench b;
    setup(&b);
    agree(&b, VMM_F_VERSION_1);
    put(&b, STATUS, VMM_STATUS_DRIVER | VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(get(&b, STATUS), OK);
    put(&b, STATUS, 0);
    CHECK_EQUAL(get(&b, STATUS), 0);
    teardown(&b);
}

static void expect_broken(struct bench *b)
{
    CHECK(get(b, STATUS) & VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(b->said, 1);
    put(b, STATUS, 0);
    CHECK_EQUAL(get(b, STATUS), 0);
}

/* 2.1.2, and every configuration of a queue that cannot be */
static void test_a_queue_that_cannot_be_breaks_the_device_until_reset(void)
{
    static const struct {
        uint16_t size;
        uint64_t desc, driver, device;
    } bad[] = {
        {0, 0x1000, 0x2000, 0x3000},           {32, 0x1000, 0x2000, 0x3000},
        {3, 0x1000, 0x2000, 0x3000},           {16, 0x1001, 0x2000, 0x3000},
        {16, MACHINE_RAM, 0x2000, 0x3000},     {16, 0x1000, MACHINE_RAM - 16, 0x3000},
        {16, 0x1000, 0x2000, UINT64_MAX - 15},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct bench b;
        setup(&b);
        agree(&b, VMM_F_VERSION_1);
        struct ring ring = {
            .size = bad[i].size, .desc = bad[i].desc, .driver = bad[i].driver, .device = bad[i].device};
        place(&b, 0, &ring);
        CHECK_EQUAL(get(&b, QUEUE_READY), 0);
        expect_broken(&b);
        teardown(&b);
    }
}

static void test_a_queue_before_features_breaks_the_device(void)
{
    struct bench b;
    setup(&b);
    struct ring ring = {.size = 16, .desc = 0x1000, .driver = 0x2000, .device = 0x3000};
    place(&b, 0, &ring);
    expect_broken(&b);
    teardown(&b);
}

/* 2.1.2: a ring bug while running: NEEDS_RESET, told by a configuration interrupt, and nothing more is touched */
static void test_a_bad_ring_sets_needs_reset_and_interrupts(void)
{
    struct bench b;
    struct ring ring;
    setup(&b);
    drive(&b, &ring, 0);
    wait_kick(&b);
    struct piece piece = IN(MACHINE_RAM, 64); /* outside RAM */
    ring_offer(&ring, &piece, 1);
    put(&b, NOTIFY, 0);
    wait_kick(&b);
    CHECK_EQUAL(get(&b, STATUS), RUNNING | VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(get(&b, ISR), 2);
    CHECK_EQUAL(b.raised, 1);
    CHECK_EQUAL(b.stopped, 1);
    int kicks = b.kicks;
    put(&b, NOTIFY, 0);
    vmm_loop_sync(vmm_vm_loop(b.vm));
    CHECK_EQUAL(b.kicks, kicks);
    expect_broken(&b);
    drive(&b, &ring, 0); /* and it works again */
    wait_kick(&b);
    teardown(&b);
}

/* 2.6.1: a queue that is taken back: what is in flight is finished, the other queue goes on */
static void test_queue_ready_zero_quiesces(void)
{
    struct bench b;
    struct ring ring;
    setup(&b);
    drive(&b, &ring, 0);
    wait_kick(&b);
    put(&b, QUEUE_SEL, 0);
    put(&b, QUEUE_READY, 0);
    CHECK_EQUAL(b.quiesced, 1);
    CHECK_EQUAL(b.forgot, 1);
    CHECK_EQUAL(get(&b, QUEUE_READY), 0);
    CHECK_EQUAL(get(&b, STATUS), RUNNING);
    put(&b, NOTIFY, 0);
    vmm_loop_sync(vmm_vm_loop(b.vm));
    CHECK_EQUAL(b.kicks, 1);
    teardown(&b);
}

/* 2.5: bytes, bounds, generation */
static void test_configuration_space(void)
{
    struct bench b;
    struct ring ring;
    const vmm_device_ops *ops = vmm_virtio_mmio_ops();
    setup(&b);
    CHECK_EQUAL(vmm_virtio_config_set(b.dev, 0, "\1\2\3\4\5\6\7\10", 8), 0);
    CHECK_EQUAL(ops->read(b.transport, CONFIG, 8), 0x0807060504030201);
    CHECK_EQUAL(ops->read(b.transport, CONFIG + 3, 2), 0x0504);
    CHECK_EQUAL(ops->read(b.transport, CONFIG + 6, 4), 0); /* reaches past the end */
    CHECK_EQUAL(ops->read(b.transport, 0xfff, 1), 0);
    ops->write(b.transport, CONFIG, 4, 0xffffffff); /* nothing in it is the driver's to write */
    CHECK_EQUAL(ops->read(b.transport, CONFIG, 1), 1);
    CHECK_EQUAL(vmm_virtio_config_set(b.dev, 7, "ab", 2), -EINVAL);
    drive(&b, &ring, 0);
    wait_kick(&b);
    uint32_t generation = get(&b, GENERATION);
    CHECK_EQUAL(vmm_virtio_config_set(b.dev, 7, "x", 1), 0);
    CHECK(get(&b, GENERATION) != generation);
    CHECK_EQUAL(get(&b, ISR), 2);
    teardown(&b);
}

/* An acknowledgement of one cause leaves the other: a new edge, whatever the trigger mode */
static void test_two_causes_of_one_line(void)
{
    struct bench b;
    struct ring ring;
    setup(&b);
    drive(&b, &ring, 0);
    wait_kick(&b);
    struct piece piece = IN(0x8000, 64);
    ring_offer(&ring, &piece, 1);
    put(&b, NOTIFY, 0);
    wait_kick(&b);
    vmm_virtio_config_set(b.dev, 0, "y", 1);
    CHECK_EQUAL(get(&b, ISR), 3);
    put(&b, ACK, 1);
    CHECK_EQUAL(get(&b, ISR), 2);
    CHECK_EQUAL(b.raised, 1);
    put(&b, ACK, 2);
    CHECK_EQUAL(b.raised, 0);
    teardown(&b);
}

/* Registers are 32 bits wide (4.2.2.2); anything else is no access at all */
static void test_odd_accesses_do_nothing(void)
{
    struct bench b;
    const vmm_device_ops *ops = vmm_virtio_mmio_ops();
    setup(&b);
    ops->write(b.transport, STATUS, 1, 1);
    ops->write(b.transport, STATUS + 1, 4, 1);
    CHECK_EQUAL(get(&b, STATUS), 0);
    for (uint64_t offset = 0; offset < 0x1000; offset++)
        for (uint32_t size = 1; size <= 8; size *= 2) {
            ops->write(b.transport, offset, size, UINT64_MAX);
            ops->read(b.transport, offset, size);
        }
    teardown(&b);
}

/* The real thing: a pause between two batches, and the fds of a device that runs */
static void test_pause_holds_the_io_thread(void)
{
    struct bench b;
    struct ring ring;
    setup(&b);
    drive(&b, &ring, 0);
    wait_kick(&b);
    vmm_loop *loop = vmm_vm_loop(b.vm);
    vmm_loop_pause(loop);
    vmm_loop_pause(loop);
    put(&b, NOTIFY, 0);
    vmm_loop_resume(loop);
    vmm_loop_sync(loop); /* if it ran, this would see two turns of it, and the second has the doorbell */
    vmm_loop_sync(loop);
    CHECK_EQUAL(b.kicks, 1);
    vmm_loop_resume(loop);
    wait_kick(&b);
    CHECK_EQUAL(b.kicks, 2);
    teardown(&b);
}

struct held_source {
    struct vmm_source source;
    sem_t entered, leave;
};

static void stay_in_it(struct vmm_source *source, uint32_t events)
{
    struct held_source *held = source->opaque;
    uint64_t count;
    (void)events;
    CHECK_EQUAL(read(source->fd, &count, sizeof(count)), sizeof(count));
    sem_post(&held->entered);
    while (sem_wait(&held->leave) != 0)
        ;
}

static void test_a_pause_that_a_handler_holds_up_is_waited_for_in_turns(void)
{
    struct bench b;
    setup(&b);
    vmm_loop *loop = vmm_vm_loop(b.vm);
    struct held_source held = {
        .source = {.fd = eventfd(0, EFD_NONBLOCK), .ready = stay_in_it, .opaque = &held}};
    CHECK(sem_init(&held.entered, 0, 0) == 0 && sem_init(&held.leave, 0, 0) == 0);
    CHECK_EQUAL(vmm_loop_add(loop, &held.source, EPOLLIN), 0);
    CHECK_EQUAL(vmm_vm_await_pause(b.vm, 0), -EBUSY);
    CHECK_EQUAL(write(held.source.fd, &(uint64_t){1}, sizeof(uint64_t)), sizeof(uint64_t));
    while (sem_wait(&held.entered) != 0)
        ;
    CHECK_EQUAL(vmm_vm_request_pause(b.vm), 0);
    CHECK_EQUAL(vmm_vm_await_pause(b.vm, 0), 0);
    CHECK_EQUAL(vmm_vm_await_pause(b.vm, 10), 0);
    CHECK_EQUAL(vmm_vm_resume(b.vm), 0); /* given up */
    CHECK_EQUAL(vmm_vm_request_pause(b.vm), 0);
    CHECK_EQUAL(vmm_vm_await_pause(b.vm, 1), 0);
    sem_post(&held.leave);
    CHECK_EQUAL(vmm_vm_await_pause(b.vm, -1), 1);
    CHECK_EQUAL(vmm_vm_pause(b.vm), 0); /* nests */
    CHECK_EQUAL(vmm_vm_resume(b.vm), 0);
    CHECK_EQUAL(vmm_vm_await_pause(b.vm, 0), 1);
    CHECK_EQUAL(vmm_vm_resume(b.vm), 0);
    CHECK_EQUAL(vmm_vm_resume(b.vm), -EBUSY);
    vmm_loop_remove(loop, &held.source);
    vmm_loop_sync(loop);
    close(held.source.fd);
    teardown(&b);
}

/* Beside the bench's own device, whose place the driver's functions give up to it. */
struct rng_bench {
    struct bench b;
    struct ring ring;
    vmm_rng *rng;
    vmm_virtio_mmio *other;
};

static void setup_rng(struct rng_bench *r)
{
    setup(&r->b);
    r->other = r->b.transport;
    CHECK_EQUAL(vmm_rng_create(r->b.vm, "rng", &r->rng), 0);
    CHECK_EQUAL(vmm_virtio_mmio_create(vmm_rng_virtio(r->rng), 0xc0001000, &r->b.line, &r->b.transport), 0);
    drive(&r->b, &r->ring, 0);
}

static void teardown_rng(struct rng_bench *r)
{
    vmm_virtio_reset(vmm_rng_virtio(r->rng));
    vmm_virtio_reset(r->b.dev);
    vmm_vm_destroy(r->b.vm);
    vmm_virtio_mmio_destroy(r->b.transport);
    vmm_virtio_mmio_destroy(r->other);
    vmm_rng_destroy(r->rng);
    vmm_virtio_destroy(r->b.dev);
    close(r->b.seen);
}

static uint32_t collect_rng(struct rng_bench *r)
{
    int id;
    uint32_t written;
    while (!ring_collect(&r->ring, &id, &written))
        vmm_loop_sync(vmm_vm_loop(r->b.vm));
    return written;
}

static void test_rng_fills_every_piece(void)
{
    struct rng_bench r;
    setup_rng(&r);
    struct piece pieces[] = {IN(0x8000, 100), IN(0x9000, 4096)};
    ring_offer(&r.ring, pieces, 2);
    put(&r.b, NOTIFY, 0);
    CHECK_EQUAL(collect_rng(&r), 4196);
    const uint8_t *bytes = machine_at(r.b.vm, 0x9000, 4096);
    unsigned ones = 0;
    for (int i = 0; i < 4096; i++)
        ones += __builtin_popcount(bytes[i]);
    CHECK(ones > 15000 && ones < 17800); /* 16384 expected, 90 is one standard deviation */
    teardown_rng(&r);
}

static void test_rng_asked_for_much_leaves_others_their_turn(void)
{
    struct rng_bench r;
    setup_rng(&r);
    struct piece all = IN(0x100000, 1 << 20), nothing = OUT(0x8000, 64);
    for (int i = 0; i < 12; i++)
        ring_offer(&r.ring, &all, 1);
    ring_offer(&r.ring, &nothing, 1);
    put(&r.b, NOTIFY, 0);
    for (int i = 0; i < 12; i++)
        CHECK_EQUAL(collect_rng(&r), 65536);
    CHECK_EQUAL(collect_rng(&r), 0);
    vmm_queue_stats stats;
    CHECK_EQUAL(vmm_virtio_queue_stats(vmm_rng_virtio(r.rng), 0, &stats), 0);
    CHECK(stats.doorbells >= 3); /* four requests a turn, and it rang for the next itself */
    CHECK_EQUAL(stats.requests, 13);
    teardown_rng(&r);
}

int main(void)
{
    test_identity();
    test_a_request_goes_through(0);
    test_a_request_goes_through(VMM_F_RING_PACKED);
    test_features_that_were_not_offered_are_refused();
    test_status_bits_stay_until_reset();
    test_a_queue_that_cannot_be_breaks_the_device_until_reset();
    test_a_queue_before_features_breaks_the_device();
    test_a_bad_ring_sets_needs_reset_and_interrupts();
    test_queue_ready_zero_quiesces();
    test_configuration_space();
    test_two_causes_of_one_line();
    test_odd_accesses_do_nothing();
    test_pause_holds_the_io_thread();
    test_a_pause_that_a_handler_holds_up_is_waited_for_in_turns();
    test_rng_fills_every_piece();
    test_rng_asked_for_much_leaves_others_their_turn();
    return 0;
}
