/* SPDX-License-Identifier: Apache-2.0 */
/*
 * No wake-up is lost (virtio 1.2, 2.7.7, 2.7.10, 2.8.10): a driver and a device on two threads, which sleep on real
 * eventfds whenever the other has nothing for them and ask for as few notifications as the rules allow. One that was
 * lost leaves both asleep; a minute of that fails the test. Every request carries a number there and back, so a
 * ring entry seen too early fails too.
 *
 *     test_queue_stress [requests]        of each kind; the default takes seconds under AddressSanitizer
 */
#include "ring.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>

#define REQUESTS 50000
#define RING 0x10000ull
#define TABLES 0x40000ull
#define BUFFERS 0x100000ull /* one page a request */
#define MASK 0x5a5a5a5a5a5a5a5aull

struct stress {
    vmm_vm *vm;
    struct ring ring;
    struct vmm_queue q;
    int doorbell, interrupt;
    uint64_t requests;
    uint64_t doorbells, interrupts;
    const char *name;
};

static uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

static void notify(int fd)
{
    uint64_t one = 1;
    CHECK_EQUAL(write(fd, &one, sizeof(one)), sizeof(one));
}

static void wait_for(const struct stress *s, const char *who, int fd)
{
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    uint64_t count;
    if (poll(&ready, 1, PATIENCE_MS) != 1) {
        fprintf(stderr, "%s: the %s sleeps and nobody wakes it\n", s->name, who);
        exit(1);
    }
    CHECK_EQUAL(read(fd, &count, sizeof(count)), sizeof(count));
}

/* Sometimes a little later: the races are where one side decides while the other acts. */
static void dawdle(uint32_t *state)
{
    for (uint32_t n = next_random(state) & 0x3f; n; n--)
        atomic_signal_fence(memory_order_seq_cst);
}

/*
 * Look for a while before going to sleep, sometimes: whoever looks answers within nanoseconds, and so comes upon the
 * other in the middle of its decision. Without it a missing fence is not noticed in millions of requests.
 */
#define LOOKS 200
#define LOOK(state, there)                                                                                   \
    for (int looks_ = next_random(state) & 3 ? LOOKS : 0; looks_ && !(there); looks_--)                      \
    __builtin_ia32_pause()

/* ---- device: the handler of queue.h ---- */

static void device_kick(struct stress *s, uint32_t *state, uint64_t *done)
{
    static struct vmm_chain chains[4];
    do {
        vmm_queue_suppress(&s->q);
        for (;;) {
            unsigned n = 0, most = 1 + next_random(state) % 4;
            while (n < most && vmm_queue_pop(&s->q, &chains[n]) == 1)
                n++;
            CHECK(!s->q.fault);
            if (n == 0)
                break;
            *done += n;
            while (n--) { /* the last first */
                uint64_t number;
                CHECK_EQUAL(vmm_chain_read(&chains[n], 0, &number, sizeof(number)), sizeof(number));
                number ^= MASK;
                CHECK_EQUAL(vmm_chain_write(&chains[n], 0, &number, sizeof(number)), sizeof(number));
                vmm_queue_push(&s->q, &chains[n], sizeof(number));
            }
            if (next_random(state) & 1 && vmm_queue_publish(&s->q))
                notify(s->interrupt);
            dawdle(state);
        }
        if (vmm_queue_publish(&s->q))
            notify(s->interrupt);
        LOOK(state, vmm_queue_waiting(&s->q));
        dawdle(state);
    } while (vmm_queue_arm(&s->q));
}

static void *device(void *opaque)
{
    struct stress *s = opaque;
    uint32_t state = 0x12345679;
    for (uint64_t done = 0; done < s->requests;) {
        wait_for(s, "device", s->doorbell);
        device_kick(s, &state, &done);
    }
    return NULL;
}

/* ---- driver ---- */

static int offer(struct stress *s, uint64_t number, uint32_t *state)
{
    /* The buffers of id i are in page i; ids come back from offer, so ask for the one it will be. */
    uint64_t page = BUFFERS + 4096ull * s->ring.free, table = TABLES + 64ull * s->ring.free;
    struct piece pieces[3] = {OUT(page, 3), OUT(page + 3, 5), IN(page + 2048, 8)};
    if (!s->ring.n_free)
        return -1;
    memcpy(machine_at(s->vm, page, 8), &number, 8);
    if (next_random(state) % 3 == 0)
        return ring_offer_indirect(&s->ring, table, pieces, 3);
    return ring_offer(&s->ring, pieces, 3);
}

static void driver(struct stress *s)
{
    uint32_t state = 0x87654321, written;
    uint64_t offered = 0, collected = 0, numbers[VMM_QUEUE_SIZE_MAX], got;
    while (collected < s->requests) {
        int id = 0;
        for (uint32_t n = 1 + next_random(&state) % 3; n && id >= 0 && offered < s->requests; n--) {
            id = offer(s, offered, &state);
            if (id >= 0)
                numbers[id] = offered++;
        }
        dawdle(&state);
        if (ring_doorbell(&s->ring)) {
            s->doorbells++;
            notify(s->doorbell);
        }
        if (id >= 0 && offered < s->requests && next_random(&state) % 4 == 0)
            continue; /* more, before anything is collected */
        LOOK(&state, ring_waiting(&s->ring));
        dawdle(&state);
        while (!ring_waiting(&s->ring) && !ring_arm(&s->ring)) {
            wait_for(s, "driver", s->interrupt);
            s->interrupts++;
        }
        ring_suppress(&s->ring);
        while (ring_collect(&s->ring, &id, &written)) {
            memcpy(&got, machine_at(s->vm, BUFFERS + 4096ull * id + 2048, 8), 8);
            CHECK_EQUAL(written, 8);
            CHECK_EQUAL(got ^ MASK, numbers[id]);
            collected++;
        }
    }
}

static void no_wakeup_is_lost(const char *name, uint32_t features, uint16_t size, uint64_t requests)
{
    struct stress s = {.name = name, .requests = requests};
    s.vm = machine_create();
    s.doorbell = eventfd(0, EFD_CLOEXEC);
    s.interrupt = eventfd(0, EFD_CLOEXEC);
    CHECK(s.doorbell >= 0 && s.interrupt >= 0);
    ring_init(&s.ring, s.vm, RING, size, features | VMM_QUEUE_INDIRECT);
    ring_give(&s.ring, &s.q);
    CHECK_EQUAL(vmm_queue_start(&s.q, s.vm, features | VMM_QUEUE_INDIRECT), 0);
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, device, &s), 0);
    driver(&s);
    CHECK_EQUAL(pthread_join(thread, NULL), 0);
    CHECK_EQUAL(s.q.requests, requests);
    CHECK_EQUAL(s.q.in_flight, 0);
    printf("%-18s %llu requests, %llu doorbells, %llu interrupts, the driver slept for %llu\n", name,
           (unsigned long long)requests, (unsigned long long)s.doorbells, (unsigned long long)s.q.interrupts,
           (unsigned long long)s.interrupts);
    close(s.doorbell);
    close(s.interrupt);
    vmm_vm_destroy(s.vm);
}

int main(int argc, char **argv)
{
    uint64_t requests = argc > 1 ? strtoull(argv[1], NULL, 0) : REQUESTS;
    no_wakeup_is_lost("split", 0, 16, requests);
    no_wakeup_is_lost("split, event idx", VMM_QUEUE_EVENT_IDX, 16, requests);
    no_wakeup_is_lost("packed", VMM_QUEUE_PACKED, 17, requests);
    no_wakeup_is_lost("packed, event idx", VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX, 17, requests);
    return 0;
}
