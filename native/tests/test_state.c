/* SPDX-License-Identifier: Apache-2.0 */
/* A device's state as a value: what is saved is taken up again, by this device or by another, whatever it was doing. */
#include "driver.h"

#include "vmmvirtio.h"

#include <errno.h>
#include <string.h>

enum { QUEUES = 2, SIZE = 16, REQUESTS = 4000, BUFFERS = 0x400000, BUFFER = 0x100 };

/* Answers each request with its number, and remembers how often it saw it. May keep some before it answers. */
struct echo {
    struct vmm_virtio virtio;
    unsigned started, stopped, quiesced, resumed;
    unsigned keep; /* requests held back */
    bool lets_go;  /* in quiesce */
    unsigned n_held;
    struct vmm_chain held[SIZE];
    uint64_t own;
    uint8_t *seen; /* shared: times a number was answered */
};

static uint32_t echo_answer(struct echo *e, const struct vmm_chain *chain)
{
    uint32_t number = 0;
    CHECK_EQUAL(vmm_chain_read(chain, 0, &number, sizeof(number)), sizeof(number));
    CHECK(number < REQUESTS && !e->seen[number]); /* nothing is done twice */
    e->seen[number] = 1;
    return (uint32_t)vmm_chain_write(chain, 0, &number, sizeof(number));
}

static void echo_kick(void *opaque, uint32_t queue)
{
    struct echo *e = opaque;
    struct vmm_queue *ring = &e->virtio.queues[queue].ring;
    struct vmm_chain *chain = &e->held[e->n_held];
    do {
        vmm_queue_suppress(ring);
        while (e->n_held < SIZE && vmm_virtio_pop(&e->virtio, queue, chain)) {
            if (e->n_held < e->keep) {
                chain = &e->held[++e->n_held];
                continue;
            }
            vmm_queue_push(ring, chain, echo_answer(e, chain));
        }
        vmm_virtio_publish(&e->virtio, queue);
    } while (vmm_queue_arm(ring));
}

static void echo_start(void *opaque)
{
    ((struct echo *)opaque)->started++;
}

static void echo_stop(void *opaque)
{
    struct echo *e = opaque;
    e->stopped++;
    e->n_held = 0;
    e->own = 0;
}

static void echo_quiesce(void *opaque)
{
    struct echo *e = opaque;
    e->quiesced++;
    if (!e->lets_go)
        return;
    for (unsigned i = 0; i < e->n_held; i++)
        vmm_queue_push(&e->virtio.queues[0].ring, &e->held[i], echo_answer(e, &e->held[i]));
    e->n_held = 0;
    vmm_virtio_publish(&e->virtio, 0);
}

static void echo_save(void *opaque, uint64_t *own)
{
    own[0] = ((struct echo *)opaque)->own;
}

static int echo_load(void *opaque, const uint64_t *own)
{
    ((struct echo *)opaque)->own = own[0];
    return own[0] == 13 ? -EINVAL : 0;
}

static void echo_resumed(void *opaque)
{
    ((struct echo *)opaque)->resumed++;
}

static const struct vmm_virtio_ops echo_ops = {.start = echo_start,
                                               .kick = echo_kick,
                                               .stop = echo_stop,
                                               .quiesce = echo_quiesce,
                                               .save = echo_save,
                                               .load = echo_load,
                                               .resumed = echo_resumed};

struct bench {
    vmm_vm *vm;
    struct echo one, two;
    struct driver driver;
    uint8_t seen[REQUESTS];
    bool routes;     /* of the transport, to the doorbells */
    unsigned routed; /* times they changed */
};

/* opaque is the bench's driver */
static void count_route(void *opaque, bool on)
{
    struct bench *b = (void *)((uint8_t *)opaque - offsetof(struct bench, driver));
    b->routed += b->routes != on;
    b->routes = on;
}

static const struct vmm_virtio_transport counting = {driver_queue_interrupt, driver_config_interrupt,
                                                     count_route, driver_reset};

static void create(struct bench *b, struct echo *e)
{
    static const uint16_t sizes[QUEUES] = {SIZE, SIZE};
    CHECK_EQUAL(
        vmm_virtio_init(&e->virtio, b->vm, &echo_ops, e, 42, "virtio-echo 0", 1 << 3, QUEUES, sizes, 8), 0);
    e->seen = b->seen;
    e->lets_go = true;
}

static struct bench *set_up(uint32_t flavour)
{
    struct bench *b = calloc(1, sizeof(*b));
    CHECK(b);
    b->vm = machine_create();
    create(b, &b->one);
    create(b, &b->two);
    driver_start(&b->driver, b->vm, &b->one.virtio, 1 << 3, flavour);
    b->routes = true;
    b->one.virtio.transport = b->two.virtio.transport = &counting;
    b->two.virtio.transport_opaque = &b->driver;
    return b;
}

static void tear_down(struct bench *b)
{
    vmm_virtio_reset(&b->one.virtio);
    vmm_virtio_reset(&b->two.virtio);
    vmm_vm_destroy(b->vm);
    vmm_virtio_deinit(&b->one.virtio);
    vmm_virtio_deinit(&b->two.virtio);
    free(b);
}

/* Field by field: a structure has padding. */
static bool same(const vmm_virtio_state *a, const vmm_virtio_state *b)
{
    bool same = a->driver_features == b->driver_features && a->n_queues == b->n_queues &&
                a->config_size == b->config_size && a->generation == b->generation &&
                a->status == b->status && !strcmp(a->fault, b->fault) &&
                !memcmp(a->config, b->config, sizeof(a->config));
    for (unsigned i = 0; i < a->n_queues; i++) {
        const vmm_queue_state *q = &a->queues[i], *p = &b->queues[i];
        same &= q->desc == p->desc && q->driver == p->driver && q->device == p->device &&
                q->size == p->size && q->position == p->position && q->enabled == p->enabled;
    }
    return same;
}

static vmm_virtio_state saved(struct echo *e)
{
    vmm_virtio_state s;
    CHECK_EQUAL(vmm_virtio_save(&e->virtio, &s), 0);
    return s;
}

static void offer(struct bench *b, uint32_t number, unsigned extra)
{
    const uint64_t at = BUFFERS + (number % 64) * BUFFER;
    memcpy(machine_at(b->vm, at, 4), &number, 4);
    const struct piece pieces[] = {OUT(at, 4), IN(at + 16, 4), IN(at + 32, 8), IN(at + 64, 8)};
    driver_offer(&b->driver, 0, pieces, 2 + extra);
}

static uint32_t random32(uint32_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    return *seed ^= *seed << 5;
}

static const uint32_t flavours[] = {0, VMM_QUEUE_EVENT_IDX, VMM_QUEUE_PACKED,
                                    VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX};

/* Traffic all along, and a move to the other device, or of one to itself, at any moment of it. */
static void requests_survive_a_move_at_any_moment(uint32_t flavour)
{
    struct bench *b = set_up(flavour);
    struct echo *here = &b->one, *there = &b->two;
    uint32_t seed = 2463534242u + flavour, offered = 0, collected = 0, moves = 0, written;
    while (collected < REQUESTS) {
        switch (random32(&seed) % 6) {
        case 0:
        case 1:
            for (unsigned n = random32(&seed) % 4; n && offered < REQUESTS && b->driver.ring[0].n_free >= 4;
                 n--)
                offer(b, offered++, random32(&seed) % 3);
            break;
        case 2:
            here->keep = offered < REQUESTS ? random32(&seed) % 4 : 0;
            driver_turn(&b->driver);
            break;
        case 3:
            while (driver_collect(&b->driver, 0, &written)) {
                CHECK_EQUAL(written, 4);
                collected++;
            }
            break;
        default: {
            const vmm_virtio_state state = saved(here);
            const bool other = random32(&seed) % 2;
            if (other) {
                struct echo *gone = here;
                here = there;
                there = gone;
            }
            CHECK_EQUAL(vmm_virtio_load(&here->virtio, &state), 0);
            b->driver.dev = &here->virtio;
            const vmm_virtio_state again = saved(here);
            CHECK(same(&state, &again));
            if (other)
                vmm_virtio_reset(&there->virtio);
            moves++;
        }
        }
    }
    for (unsigned i = 0; i < REQUESTS; i++)
        CHECK_EQUAL(b->seen[i], 1);
    CHECK(moves > 500);
    tear_down(b);
}

static void a_running_device_keeps_its_doorbells(void)
{
    struct bench *b = set_up(VMM_QUEUE_EVENT_IDX);
    struct echo *e = &b->one;
    e->keep = 2;
    e->lets_go = true;
    offer(b, 0, 0);
    driver_turn(&b->driver);
    CHECK_EQUAL(e->n_held, 1);
    const vmm_virtio_state state = saved(e); /* number 0 is answered */
    offer(b, 1, 0);
    driver_turn(&b->driver);
    CHECK_EQUAL(e->n_held, 1);
    const struct vmm_chain late = e->held[0];
    const unsigned interrupts = b->driver.interrupts[0];
    vmm_virtqueue_ring(&e->virtio.queues[0]); /* one that is not handled yet */

    CHECK_EQUAL(vmm_virtio_load(&e->virtio, &state), 0);
    CHECK_EQUAL(b->routed, 0);
    CHECK(e->virtio.running && e->virtio.queues[0].source.live);
    CHECK_EQUAL(e->stopped, 1);
    CHECK_EQUAL(e->started, 2);
    CHECK_EQUAL(e->n_held, 0);
    vmm_queue_push(&e->virtio.queues[0].ring, &late, 4); /* of the time that was given up */
    CHECK_EQUAL(e->virtio.queues[0].ring.in_flight, 0);
    CHECK(!vmm_queue_publish(&e->virtio.queues[0].ring));
    CHECK_EQUAL(b->driver.interrupts[0], interrupts);

    /* Memory was not put back here, so that number 1 waits in the ring, and nothing rings for it but the load. */
    e->keep = 0;
    driver_turn(&b->driver);
    uint32_t written;
    CHECK(driver_collect(&b->driver, 0, &written) && driver_collect(&b->driver, 0, &written));
    CHECK(b->seen[0] == 1 && b->seen[1] == 1);
    CHECK(!driver_collect(&b->driver, 0, &written));
    tear_down(b);
}

static void a_request_that_is_held_makes_save_say_so(void)
{
    struct bench *b = set_up(0);
    struct echo *e = &b->one;
    e->keep = 3;
    e->lets_go = false;
    offer(b, 0, 0);
    offer(b, 1, 0);
    driver_turn(&b->driver);
    vmm_virtio_state state;
    CHECK_EQUAL(vmm_virtio_save(&e->virtio, &state), -EBUSY);
    CHECK(strstr(vmm_error_text(), "virtio-echo 0 holds 2 requests of queue 0"));
    e->lets_go = true;
    CHECK_EQUAL(vmm_virtio_save(&e->virtio, &state), 0);
    CHECK_EQUAL(state.queues[0].position, 2);
    e->virtio.queues[1].external = true;
    CHECK_EQUAL(vmm_virtio_save(&e->virtio, &state), -EBUSY);
    CHECK_EQUAL(vmm_virtio_load(&e->virtio, &state), -EINVAL);
    e->virtio.queues[1].external = false;
    tear_down(b);
}

/* ---- states that nobody saved ---- */

typedef void corruption(vmm_virtio_state *s);
static void more_queues(vmm_virtio_state *s)
{
    s->n_queues = 64;
}
static void no_queues(vmm_virtio_state *s)
{
    s->n_queues = 0;
}
static void other_config(vmm_virtio_state *s)
{
    s->config_size = 256;
}
static void unknown_status(vmm_virtio_state *s)
{
    s->status |= 16;
}
static void no_features_ok(vmm_virtio_state *s)
{
    s->status &= (uint8_t)~VMM_STATUS_FEATURES_OK;
}
static void queue_before_features(vmm_virtio_state *s)
{
    s->status = VMM_STATUS_DRIVER;
}
static void feature_not_offered(vmm_virtio_state *s)
{
    s->driver_features |= 1ull << 63;
}
static void no_version_1(vmm_virtio_state *s)
{
    s->driver_features &= ~VMM_F_VERSION_1;
}
static void fault_without_need(vmm_virtio_state *s)
{
    s->fault[0] = 'x';
}
static void need_without_fault(vmm_virtio_state *s)
{
    s->status |= VMM_STATUS_NEEDS_RESET;
}
static void endless_fault(vmm_virtio_state *s)
{
    s->status |= VMM_STATUS_NEEDS_RESET;
    memset(s->fault, 'x', sizeof(s->fault));
}
static void fault_for_terminals(vmm_virtio_state *s)
{
    s->status |= VMM_STATUS_NEEDS_RESET;
    strcpy(s->fault, "\033[2J");
}
static void enabled_twice(vmm_virtio_state *s)
{
    s->queues[1].enabled = 2;
}
static void no_size(vmm_virtio_state *s)
{
    s->queues[0].size = 0;
}
static void large_size(vmm_virtio_state *s)
{
    s->queues[0].size = 2 * SIZE;
}
static void odd_size(vmm_virtio_state *s)
{
    s->queues[1].size = 3;
}
static void unaligned(vmm_virtio_state *s)
{
    s->queues[0].desc += 1;
}
static void no_memory(vmm_virtio_state *s)
{
    s->queues[0].driver = 0xfee00000;
}
static void past_memory(vmm_virtio_state *s)
{
    s->queues[0].desc = MACHINE_RAM - 16;
}
static void wrapping(vmm_virtio_state *s)
{
    s->queues[0].desc = UINT64_MAX - 15;
}
static void position_of_no_queue(vmm_virtio_state *s)
{
    s->queues[1].enabled = 0;
    s->queues[1].position = 1;
}
static void slot_beyond(vmm_virtio_state *s)
{
    s->queues[0].position = SIZE;
}
static void slot_far_beyond(vmm_virtio_state *s)
{
    s->queues[0].position = 0xffff;
}

static void refused(struct bench *b, corruption *corrupt)
{
    struct echo *e = &b->one;
    const vmm_virtio_state before = saved(e);
    const unsigned stopped = e->stopped;
    vmm_virtio_state wrong = before;
    corrupt(&wrong);
    CHECK(!same(&wrong, &before));
    CHECK_EQUAL(vmm_virtio_load(&e->virtio, &wrong), -EINVAL);
    CHECK(strstr(vmm_error_text(), "virtio-echo 0"));
    const vmm_virtio_state after = saved(e);
    CHECK(same(&before, &after));
    CHECK(e->virtio.running && e->stopped == stopped);
}

static void what_no_driver_can_have_done_is_refused_and_changes_nothing(void)
{
    corruption *const any[] = {more_queues,
                               no_queues,
                               other_config,
                               unknown_status,
                               no_features_ok,
                               queue_before_features,
                               feature_not_offered,
                               no_version_1,
                               fault_without_need,
                               need_without_fault,
                               endless_fault,
                               fault_for_terminals,
                               enabled_twice,
                               no_size,
                               large_size,
                               unaligned,
                               no_memory,
                               past_memory,
                               wrapping,
                               position_of_no_queue};
    struct bench *b = set_up(VMM_QUEUE_EVENT_IDX);
    for (unsigned i = 0; i < sizeof(any) / sizeof(any[0]); i++)
        refused(b, any[i]);
    refused(b, odd_size);
    tear_down(b);
    b = set_up(VMM_QUEUE_PACKED);
    for (unsigned i = 0; i < sizeof(any) / sizeof(any[0]); i++)
        refused(b, any[i]);
    refused(b, slot_beyond);
    refused(b, slot_far_beyond);
    tear_down(b);
}

/* Positions of a split ring are all possible; one that memory contradicts is what a driver's index would be. */
static void a_position_that_memory_contradicts_breaks_the_device(void)
{
    struct bench *b = set_up(0);
    vmm_virtio_state state = saved(&b->one);
    state.queues[0].position = 1000;
    CHECK_EQUAL(vmm_virtio_load(&b->one.virtio, &state), 0);
    driver_turn(&b->driver);
    CHECK(b->one.virtio.status & VMM_STATUS_NEEDS_RESET);
    tear_down(b);
}

/* ---- devices that do not run ---- */

static void moved(struct bench *b)
{
    const vmm_virtio_state state = saved(&b->one);
    CHECK_EQUAL(vmm_virtio_load(&b->two.virtio, &state), 0);
    const vmm_virtio_state again = saved(&b->two);
    CHECK(same(&state, &again));
    CHECK_EQUAL(b->two.virtio.running, b->one.virtio.running);
}

static void every_stage_of_a_driver_is_saved(void)
{
    struct bench *b = set_up(0);
    struct vmm_virtio *dev = &b->one.virtio;
    moved(b); /* DRIVER_OK */
    CHECK_EQUAL(b->two.started, 1);
    vmm_virtio_write_status(dev, 0);
    moved(b); /* from one that runs to one that was reset */
    CHECK(!b->two.virtio.running && b->two.stopped == 1);
    CHECK_EQUAL(b->two.resumed, 1); /* nobody drives it: at once */
    vmm_virtio_write_status(dev, VMM_STATUS_ACKNOWLEDGE);
    vmm_virtio_driver_features(dev, 0, UINT32_MAX); /* more than offered: that is found at FEATURES_OK */
    moved(b);
    vmm_virtio_driver_features(dev, 0, 1 << 3);
    vmm_virtio_driver_features(dev, 1, 1);
    vmm_virtio_write_status(dev, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER | VMM_STATUS_FEATURES_OK);
    vmm_virtqueue_size(&dev->queues[1], 4);
    vmm_virtqueue_area(&dev->queues[1], VMM_AREA_DESC, true, 77); /* not enabled: anything */
    vmm_virtqueue_area(&dev->queues[0], VMM_AREA_DESC, false, 0x5000);
    vmm_virtqueue_area(&dev->queues[0], VMM_AREA_DRIVER, false, 0x6000);
    vmm_virtqueue_area(&dev->queues[0], VMM_AREA_DEVICE, false, 0x7000);
    vmm_virtqueue_enable(&dev->queues[0]);
    moved(b);
    CHECK(b->two.virtio.queues[0].enabled && b->two.virtio.queues[0].ring.started);
    CHECK_EQUAL(b->two.virtio.agreed, dev->agreed);
    vmm_virtio_write_status(&b->two.virtio, dev->status | VMM_STATUS_DRIVER_OK); /* and goes on from there */
    CHECK(b->two.virtio.running);
    vmm_virtio_write_status(dev, dev->status | VMM_STATUS_DRIVER_OK);
    vmm_virtio_write_status(dev, dev->status | VMM_STATUS_FAILED);
    moved(b);
    tear_down(b);
}

static void a_broken_device_stays_broken_until_its_driver_resets_it(void)
{
    struct bench *b = set_up(0);
    *ring_avail_idx(&b->driver.ring[0]) = 999;
    vmm_virtqueue_ring(&b->one.virtio.queues[0]);
    driver_turn(&b->driver);
    CHECK(b->one.virtio.fault[0] && !b->one.virtio.running);
    moved(b);
    CHECK(!strcmp(b->two.virtio.fault, b->one.virtio.fault));
    driver_start(&b->driver, b->vm, &b->two.virtio, 1 << 3, 0);
    offer(b, 0, 0);
    driver_turn(&b->driver);
    CHECK_EQUAL(b->seen[0], 1);
    tear_down(b);
}

static void the_driver_hears_of_changes_when_the_machine_goes_on(void)
{
    struct bench *b = set_up(0);
    struct echo *e = &b->one;
    const vmm_virtio_state state = saved(e);
    driver_turn(&b->driver);
    const unsigned config = b->driver.config_interrupts;
    vmm_virtio_set_config(&e->virtio, 4, "\7", 1);
    CHECK_EQUAL(b->driver.config_interrupts, config + 1);
    CHECK_EQUAL(vmm_virtio_load(&e->virtio, &state), 0);
    CHECK_EQUAL(b->driver.config_interrupts, config + 1); /* its own bytes again: nothing to tell */
    CHECK_EQUAL(e->virtio.config[4], 0);
    CHECK_EQUAL(e->virtio.generation, state.generation);
    CHECK_EQUAL(e->resumed, 0);
    driver_turn(&b->driver);
    CHECK_EQUAL(e->resumed, 1);
    driver_turn(&b->driver);
    CHECK_EQUAL(e->resumed, 1);
    tear_down(b);
}

static void a_device_s_own_numbers_come_after_its_start(void)
{
    struct bench *b = set_up(0);
    uint64_t own[VMM_VIRTIO_OWN];
    b->one.own = 7;
    vmm_virtio_save_own(&b->one.virtio, own);
    CHECK(own[0] == 7 && own[7] == 0);
    moved(b);
    CHECK_EQUAL(vmm_virtio_load_own(&b->two.virtio, own), 0);
    CHECK_EQUAL(b->two.own, 7);
    own[0] = 13;
    CHECK_EQUAL(vmm_virtio_load_own(&b->two.virtio, own), -EINVAL);
    tear_down(b);
}

/* ---- pages ---- */

/* Whatever changes in memory while the device works is told; the whole of it is compared. */
static void no_byte_a_device_writes_escapes_a_dirty_log(uint32_t flavour)
{
    struct bench *b = set_up(flavour);
    const uint64_t pages = 2 * MACHINE_RAM / 4096, words = pages / 64;
    b->vm->touched = calloc(words, sizeof(*b->vm->touched));
    uint8_t *before = malloc(MACHINE_RAM);
    CHECK(b->vm->touched && before);
    b->vm->tracked = true;
    const uint8_t *memory = machine_at(b->vm, 0, MACHINE_RAM);
    uint32_t written, changed = 0;
    for (uint32_t number = 0; number < 40; number++) {
        offer(b, number, number % 3);
        memset((void *)b->vm->touched, 0, words * sizeof(*b->vm->touched));
        memcpy(before, memory, MACHINE_RAM);
        driver_turn(&b->driver);
        for (uint64_t page = 0; page < MACHINE_RAM / 4096; page++)
            if (memcmp(before + page * 4096, memory + page * 4096, 4096) != 0) {
                CHECK(b->vm->touched[page / 64] >> page % 64 & 1);
                changed++;
            }
        while (driver_collect(&b->driver, 0, &written))
            ;
    }
    CHECK(changed >= 79); /* a ring and a buffer each time, but that a 0 over a 0 is no change */
    b->vm->tracked = false;
    free((void *)b->vm->touched);
    b->vm->touched = NULL;
    free(before);
    tear_down(b);
}

int main(void)
{
    for (unsigned i = 0; i < sizeof(flavours) / sizeof(flavours[0]); i++) {
        requests_survive_a_move_at_any_moment(flavours[i]);
        no_byte_a_device_writes_escapes_a_dirty_log(flavours[i]);
    }
    a_running_device_keeps_its_doorbells();
    a_request_that_is_held_makes_save_say_so();
    what_no_driver_can_have_done_is_refused_and_changes_nothing();
    a_position_that_memory_contradicts_breaks_the_device();
    every_stage_of_a_driver_is_saved();
    a_broken_device_stays_broken_until_its_driver_resets_it();
    the_driver_hears_of_changes_when_the_machine_goes_on();
    a_device_s_own_numbers_come_after_its_start();
    return 0;
}
