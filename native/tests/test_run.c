/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stop, pause, kick and settle (run.c), with the races where they hurt most: between a vCPU's look at its requests and
 * its KVM_RUN, inside KVM_RUN, inside a device, between an exit and the entry that completes it. Without /dev/kvm.
 */
#include "fake_kvm.h"

#include "core/loop.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

static vmm_vm *vm;

static void await_pause(void)
{
    CHECK_EQUAL(vmm_vm_await_pause(vm, patience_ms()), 1);
}

static void pause_all(void)
{
    CHECK_EQUAL(vmm_vm_request_pause(vm), 0);
    await_pause();
}

static int stop_reason(void)
{
    uint64_t code;
    uint32_t id;
    return vmm_vm_stop_reason(vm, &code, &id);
}

/* The rax of a vCPU that stands still. */
static uint64_t rax_of(unsigned i)
{
    vmm_regs regs;
    CHECK_EQUAL(vmm_vcpu_get_regs(fake_vcpu(i)->vcpu, &regs), 0);
    return regs.rax;
}

static void tear_down(void)
{
    fake_destroy(vm);
    vm = NULL;
}

/* ---- a request on the way into KVM_RUN: its signal is spent in user space ---- */

static _Atomic unsigned entered;

static enum fake_exit enter_and_halt(struct fake_vcpu *v)
{
    atomic_fetch_add(&entered, 1);
    return fake_halt(v);
}

static void stop_now(struct fake_vcpu *v)
{
    (void)v;
    vmm_vm_stop(vm, VMM_STOP_HOST, 7);
}

static void a_stop_on_the_way_into_the_guest_keeps_it_out(void)
{
    vm = fake_machine(1);
    entered = 0;
    fake_vcpu(0)->guest = enter_and_halt;
    fake_vcpu(0)->entering = stop_now;
    fake_join(fake_start_vcpu(0));
    CHECK_EQUAL(entered, 0);
    CHECK_EQUAL(stop_reason(), VMM_STOP_HOST);
    tear_down();
}

static sem_t on_the_way, asked;

static void let_the_other_ask(struct fake_vcpu *v)
{
    v->entering = NULL;
    sem_post(&on_the_way);
    fake_wait(&asked);
}

static void a_pause_on_the_way_into_the_guest_keeps_it_out(void)
{
    vm = fake_machine(1);
    entered = 0;
    fake_vcpu(0)->guest = enter_and_halt;
    fake_vcpu(0)->entering = let_the_other_ask;
    const pthread_t thread = fake_start_vcpu(0);
    fake_wait(&on_the_way);
    CHECK_EQUAL(vmm_vm_request_pause(vm), 0);
    sem_post(&asked);
    await_pause();
    CHECK_EQUAL(entered, 0);
    CHECK_EQUAL(vmm_vm_resume(vm), 0);
    fake_join(thread);
    CHECK_EQUAL(entered, 1);
    CHECK_EQUAL(stop_reason(), VMM_STOP_HALT);
    tear_down();
}

/* ---- a request while the guest computes ---- */

static enum fake_exit compute(struct fake_vcpu *v)
{
    (void)v;
    return FAKE_COMPUTES;
}

static void await_computing(unsigned i, unsigned times)
{
    for (int waited = 0; atomic_load(&fake_vcpu(i)->computing) < times; waited++) {
        CHECK(waited < patience_ms());
        poll(NULL, 0, 1);
    }
}

static void a_guest_that_computes_is_fetched_out(void)
{
    vm = fake_machine(2);
    pthread_t threads[2];
    for (unsigned i = 0; i < 2; i++) {
        fake_vcpu(i)->guest = compute;
        threads[i] = fake_start_vcpu(i);
        await_computing(i, 1);
    }
    pause_all();
    CHECK_EQUAL(vmm_vm_resume(vm), 0);
    for (unsigned i = 0; i < 2; i++)
        await_computing(i, 2); /* it goes on where nothing asks any more */
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    for (unsigned i = 0; i < 2; i++)
        fake_join(threads[i]);
    tear_down();
}

/* ---- a request while a device works ---- */

enum { PORT_VALUE = 0x5a };

static sem_t in_device, leave_device;

static uint64_t held_read(void *opaque, uint64_t offset, uint32_t size)
{
    (void)opaque;
    (void)size;
    sem_post(&in_device);
    fake_wait(&leave_device);
    return PORT_VALUE + offset;
}

static void ignore_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    (void)opaque;
    (void)offset;
    (void)size;
    (void)value;
}

static const vmm_device_ops held_ops = {held_read, ignore_write};

/* One access, then it computes. */
static enum fake_exit read_port_once(struct fake_vcpu *v)
{
    v->guest = compute;
    return fake_in(v, FAKE_PORT);
}

static enum fake_exit load_once(struct fake_vcpu *v)
{
    v->guest = compute;
    return fake_load(v, FAKE_REGISTER);
}

/* One access that KVM makes as two: its bytes stand in two pages (KVM_MAX_MMIO_FRAGMENTS). */
static enum fake_exit load_fragments_once(struct fake_vcpu *v)
{
    v->fragments = 1;
    return load_once(v);
}

static pthread_t start_in_device(enum fake_exit (*guest)(struct fake_vcpu *))
{
    vm = fake_machine(1);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, FAKE_PORT, 1, &held_ops, NULL, 0), 0);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_MMIO, FAKE_REGISTER, 2, &held_ops, NULL, 0), 0);
    fake_vcpu(0)->guest = guest;
    const pthread_t thread = fake_start_vcpu(0);
    fake_wait(&in_device);
    return thread;
}

static void a_pause_waits_for_a_device_and_for_the_result(enum fake_exit (*guest)(struct fake_vcpu *),
                                                          unsigned accesses)
{
    const pthread_t thread = start_in_device(guest);
    CHECK_EQUAL(vmm_vm_request_pause(vm), 0);
    CHECK_EQUAL(vmm_vm_await_pause(vm, 0), 0);
    sem_post(&leave_device);
    for (unsigned i = 1; i < accesses; i++) {
        fake_wait(&in_device);
        sem_post(&leave_device);
    }
    await_pause();
    CHECK_EQUAL(rax_of(0), PORT_VALUE + accesses - 1);
    CHECK_EQUAL(fake_vcpu(0)->fragments, 0);
    CHECK_EQUAL(atomic_load(&fake_vcpu(0)->computing), 0); /* to settle is not to run */
    CHECK_EQUAL(vmm_vm_resume(vm), 0);
    await_computing(0, 1);
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    fake_join(thread);
    tear_down();
}

static void a_stop_leaves_the_result_in_the_registers(enum fake_exit (*guest)(struct fake_vcpu *))
{
    const pthread_t thread = start_in_device(guest);
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    sem_post(&leave_device);
    fake_join(thread);
    CHECK_EQUAL(rax_of(0), PORT_VALUE);
    CHECK_EQUAL(atomic_load(&fake_vcpu(0)->computing), 0);
    tear_down();
}

static uint64_t stopping_read(void *opaque, uint64_t offset, uint32_t size)
{
    (void)opaque;
    (void)offset;
    (void)size;
    vmm_vm_stop(vm, VMM_STOP_POWEROFF, 0);
    CHECK_EQUAL(vmm_vm_request_pause(vm), -EDEADLK);
    return PORT_VALUE;
}

static void a_device_that_stops_the_machine_still_gives_its_result(void)
{
    static const vmm_device_ops ops = {stopping_read, ignore_write};
    vm = fake_machine(1);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, FAKE_PORT, 1, &ops, NULL, 0), 0);
    fake_vcpu(0)->guest = read_port_once;
    fake_join(fake_start_vcpu(0));
    CHECK_EQUAL(stop_reason(), VMM_STOP_POWEROFF);
    CHECK_EQUAL(rax_of(0), PORT_VALUE);
    tear_down();
}

/* ---- pauses nest ---- */

static void a_vcpu_goes_on_with_the_last_resume(void)
{
    vm = fake_machine(1);
    fake_vcpu(0)->guest = compute;
    CHECK_EQUAL(vmm_vm_resume(vm), -EBUSY);
    CHECK_EQUAL(vmm_vm_await_pause(vm, 0), -EBUSY);
    pause_all();
    const pthread_t thread = fake_start_vcpu(0); /* comes into a machine that is paused */
    pause_all();
    CHECK_EQUAL(vmm_vm_resume(vm), 0);
    pause_all(); /* were it on its way into the guest, this would wait until it is not */
    CHECK_EQUAL(atomic_load(&fake_vcpu(0)->computing), 0);
    CHECK_EQUAL(vmm_vm_resume(vm), 0);
    CHECK_EQUAL(vmm_vm_resume(vm), 0);
    await_computing(0, 1);
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    fake_join(thread);
    tear_down();
}

/* ---- the I/O thread ---- */

struct work {
    struct vmm_source source;
    sem_t begun, may_end;
    _Atomic unsigned done;
};

static void work(struct vmm_source *source, uint32_t events)
{
    struct work *w = source->opaque;
    uint64_t count;
    (void)events;
    CHECK_EQUAL(read(source->fd, &count, sizeof(count)), sizeof(count));
    sem_post(&w->begun);
    fake_wait(&w->may_end);
    atomic_fetch_add(&w->done, 1);
}

static void ring(const struct work *w)
{
    CHECK_EQUAL(write(w->source.fd, &(uint64_t){1}, 8), 8);
}

static void a_pause_holds_the_io_thread_too(void)
{
    vm = fake_machine(0);
    vmm_loop *loop = vmm_vm_loop(vm);
    struct work w = {.source = {.fd = eventfd(0, EFD_CLOEXEC), .ready = work, .opaque = &w}};
    sem_init(&w.begun, 0, 0);
    sem_init(&w.may_end, 0, 0);
    CHECK_EQUAL(vmm_loop_add(loop, &w.source, EPOLLIN), 0);
    ring(&w);
    fake_wait(&w.begun);
    CHECK_EQUAL(vmm_vm_request_pause(vm), 0);
    CHECK_EQUAL(vmm_vm_await_pause(vm, 0), 0); /* a handler is at work */
    sem_post(&w.may_end);
    await_pause();
    CHECK_EQUAL(w.done, 1);
    sem_post(&w.may_end);
    ring(&w);
    vmm_loop_sync(loop); /* if it ran, two turns would pass, and the second begins after the ring */
    vmm_loop_sync(loop);
    CHECK_EQUAL(w.done, 1);
    CHECK_EQUAL(vmm_vm_resume(vm), 0);
    fake_wait(&w.begun);
    vmm_loop_remove(loop, &w.source);
    vmm_loop_sync(loop);
    CHECK_EQUAL(w.done, 2);
    tear_down();
    close(w.source.fd);
}

/* ---- no kick is lost, whenever it comes ---- */

static uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

struct busy {
    uint32_t random;
    uint8_t last; /* what its port read as last */
};

static uint64_t count_read(void *opaque, uint64_t offset, uint32_t size)
{
    struct busy *busy = opaque;
    (void)offset;
    (void)size;
    return ++busy->last;
}

static enum fake_exit compute_or_read(struct fake_vcpu *v)
{
    struct busy *busy = v->opaque;
    const uint32_t what = next_random(&busy->random) % 8;
    if (what == 0)
        return FAKE_COMPUTES;
    return what < 4 ? fake_in(v, (uint16_t)(FAKE_PORT + v->index)) : fake_load(v, FAKE_REGISTER + v->index);
}

enum { STORM_VCPUS = 2, STORM_PAUSES = 1500 };

static _Atomic bool storm_ends;

/* Pauses that nobody looks at, so that those which are looked at begin and end at any moment of theirs. */
static void *pause_and_resume(void *opaque)
{
    (void)opaque;
    while (!atomic_load(&storm_ends)) {
        pause_all();
        CHECK_EQUAL(vmm_vm_resume(vm), 0);
        sched_yield();
    }
    return NULL;
}

static void no_kick_is_lost_and_every_pause_finds_whole_registers(void)
{
    static const vmm_device_ops ops = {count_read, ignore_write};
    struct busy busy[STORM_VCPUS] = {{.random = 0x12345679}, {.random = 0x87654321}};
    pthread_t threads[STORM_VCPUS];
    vm = fake_machine(STORM_VCPUS);
    storm_ends = false;
    for (unsigned i = 0; i < STORM_VCPUS; i++) {
        CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, FAKE_PORT + i, 1, &ops, &busy[i], i), 0);
        CHECK_EQUAL(vmm_bus_attach(vm, VMM_MMIO, FAKE_REGISTER + i, 1, &ops, &busy[i], i), 0);
        fake_vcpu(i)->guest = compute_or_read;
        fake_vcpu(i)->opaque = &busy[i];
        threads[i] = fake_start_vcpu(i);
    }
    const pthread_t other = fake_start(pause_and_resume, NULL);
    for (unsigned n = 0; n < STORM_PAUSES; n++) {
        pause_all();
        for (unsigned i = 0; i < STORM_VCPUS; i++)
            CHECK_EQUAL(rax_of(i), busy[i].last);
        CHECK_EQUAL(vmm_vm_resume(vm), 0);
        if (n % 8 == 0)
            sched_yield();
    }
    atomic_store(&storm_ends, true);
    fake_join(other);
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    for (unsigned i = 0; i < STORM_VCPUS; i++)
        fake_join(threads[i]);
    for (unsigned i = 0; i < STORM_VCPUS; i++)
        CHECK_EQUAL(rax_of(i), busy[i].last);
    tear_down();
}

int main(void)
{
    sem_init(&on_the_way, 0, 0);
    sem_init(&asked, 0, 0);
    sem_init(&in_device, 0, 0);
    sem_init(&leave_device, 0, 0);
    a_stop_on_the_way_into_the_guest_keeps_it_out();
    a_pause_on_the_way_into_the_guest_keeps_it_out();
    a_guest_that_computes_is_fetched_out();
    a_pause_waits_for_a_device_and_for_the_result(read_port_once, 1);
    a_pause_waits_for_a_device_and_for_the_result(load_once, 1);
    a_pause_waits_for_a_device_and_for_the_result(load_fragments_once, 2);
    a_stop_leaves_the_result_in_the_registers(read_port_once);
    a_stop_leaves_the_result_in_the_registers(load_once);
    a_device_that_stops_the_machine_still_gives_its_result();
    a_vcpu_goes_on_with_the_last_resume();
    a_pause_holds_the_io_thread_too();
    no_kick_is_lost_and_every_pause_finds_whole_registers();
    return 0;
}
