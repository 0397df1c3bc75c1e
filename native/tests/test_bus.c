/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attach and detach while vCPUs use the bus (bus.c): detach returns when no vCPU is inside the device, and a table is
 * freed when no vCPU reads it any more. What is detached is freed at once here, so that a sanitizer sees a vCPU that is
 * late; without one, what was freed is overwritten. Without /dev/kvm.
 */
#include "fake_kvm.h"

#include "core/core.h"

#include <sched.h>

static vmm_vm *vm;

static void ignore_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    (void)opaque;
    (void)offset;
    (void)size;
    (void)value;
}

/* ---- a vCPU inside the device ---- */

static sem_t in_device, leave_device;

static uint64_t held_read(void *opaque, uint64_t offset, uint32_t size)
{
    (void)opaque;
    (void)offset;
    (void)size;
    sem_post(&in_device);
    fake_wait(&leave_device);
    return 0;
}

static const vmm_device_ops held_ops = {held_read, ignore_write};

static enum fake_exit compute(struct fake_vcpu *v)
{
    (void)v;
    return FAKE_COMPUTES;
}

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

enum { HOOK = 7 };

struct removal {
    int (*remove)(void);
    _Atomic bool returned;
};

static int detach_port(void)
{
    return vmm_bus_detach(vm, VMM_PIO, FAKE_PORT);
}

static int detach_register(void)
{
    return vmm_bus_detach(vm, VMM_MMIO, FAKE_REGISTER);
}

static int detach_hook(void)
{
    return vmm_hook_detach(vm, VMM_PIO, HOOK);
}

static void *remove_it(void *opaque)
{
    struct removal *removal = opaque;
    CHECK_EQUAL(removal->remove(), 0);
    atomic_store(&removal->returned, true);
    return NULL;
}

/* It gives its processor away again and again while it waits, and so is known to wait. */
static void await_waiting(const struct removal *removal)
{
    const unsigned before = atomic_load(&fake_yields);
    while (atomic_load(&fake_yields) - before < 100 && !atomic_load(&removal->returned))
        poll(NULL, 0, 1);
    CHECK(!atomic_load(&removal->returned));
}

static void stop_and_join(pthread_t vcpu)
{
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    fake_join(vcpu);
    fake_destroy(vm);
}

static void ignore_access(void *opaque, vmm_access *access)
{
    (void)opaque;
    (void)access;
}

static void ignore_exit(void *opaque, uint32_t vcpu, const vmm_exit_record *record)
{
    (void)opaque;
    (void)vcpu;
    (void)record;
}

/* With the vCPU inside the device: the removal waits until it has left. Ends the vCPU's thread. */
static void remove_while_inside(pthread_t vcpu, struct removal *removal)
{
    fake_wait(&in_device);
    const pthread_t remover = fake_start(remove_it, removal);
    await_waiting(removal);
    sem_post(&leave_device);
    fake_join(remover);
    stop_and_join(vcpu);
}

static void removing_waits_for_the_vcpu_inside(enum fake_exit (*guest)(struct fake_vcpu *),
                                               int (*remove)(void))
{
    struct removal removal = {.remove = remove};
    vm = fake_machine(2); /* the second one is outside all the time */
    vmm_vm_on_hook(vm, ignore_access, ignore_exit, NULL);
    CHECK_EQUAL(vmm_hook_attach(vm, VMM_PIO, FAKE_PORT, 1, HOOK), 0);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, FAKE_PORT, 1, &held_ops, NULL, 0), 0);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_MMIO, FAKE_REGISTER, 1, &held_ops, NULL, 0), 0);
    fake_vcpu(0)->guest = guest;
    const pthread_t vcpu = fake_start_vcpu(0);
    remove_while_inside(vcpu, &removal);
}

/* ---- a vCPU that changes the bus from inside a device ---- */

/* Allocate whatever was freed, of any size that a small table has, and overwrite it. */
static void overwrite_what_was_freed(void)
{
    enum { STEP = 16, SIZES = 16 };
    void *taken[SIZES];
    for (size_t i = 0; i < SIZES; i++) {
        taken[i] = malloc((i + 1) * STEP);
        CHECK(taken[i]);
        memset(taken[i], 0x5a, (i + 1) * STEP);
    }
    for (size_t i = 0; i < SIZES; i++)
        free(taken[i]);
}

static uint64_t leaving_read(void *opaque, uint64_t offset, uint32_t size)
{
    (void)opaque;
    (void)size;
    if (offset == 0) {
        CHECK_EQUAL(detach_register(), 0); /* its own range, from the vCPU's thread: it does not wait */
        overwrite_what_was_freed();
    }
    return 0x11 + offset;
}

static enum fake_exit load_three_bytes_once(struct fake_vcpu *v)
{
    fake_load(v, FAKE_REGISTER);
    v->run->mmio.len = 3; /* byte by byte: the table that the first one retires serves the others */
    v->guest = fake_halt;
    return FAKE_EXITS;
}

static void a_device_may_detach_itself_in_the_middle_of_an_access(void)
{
    static const vmm_device_ops ops = {leaving_read, ignore_write};
    vm = fake_machine(1);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_MMIO, FAKE_REGISTER, 4, &ops, NULL, 0), 0);
    fake_vcpu(0)->guest = load_three_bytes_once;
    fake_join(fake_start_vcpu(0));
    CHECK_EQUAL(fake_vcpu(0)->run->mmio.data[1], 0x12);
    CHECK_EQUAL(fake_vcpu(0)->run->mmio.data[2], 0x13);
    CHECK_EQUAL(vmm_bus_read(vm, VMM_MMIO, FAKE_REGISTER, 1), 0xff);
    fake_destroy(vm);
}

/* A device whose access reaches the bus again, as one that completes another access does. */
static uint64_t nesting_read(void *opaque, uint64_t offset, uint32_t size)
{
    uint64_t value = 0;
    uint32_t tag;
    vmm_bus_access(opaque, VMM_PIO, FAKE_PORT + 1, 1, &value, true, &tag);
    return held_read(NULL, offset, size);
}

static void an_access_within_an_access_does_not_let_the_outer_one_go(void)
{
    static const vmm_device_ops ops = {nesting_read, ignore_write};
    struct removal removal = {.remove = detach_port};
    vm = fake_machine(1);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, FAKE_PORT, 1, &ops, fake_vcpu(0)->vcpu, 0), 0);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, FAKE_PORT + 1, 1, &held_ops, NULL, 0), 0);
    fake_vcpu(0)->guest = read_port_once;
    const pthread_t vcpu = fake_start_vcpu(0);
    remove_while_inside(vcpu, &removal);
}

/* ---- devices that come and go under vCPUs that never pause ---- */

enum { VCPUS = 2, DEVICES = 2000, ACCESSES = 4, LIMIT_MS = 300 };

struct device {
    uint64_t alive; /* not atomic: that nothing but the bus orders its end is the test */
    _Atomic unsigned accesses;
};

#define ALIVE 0x616c697665ull

static uint64_t living_read(void *opaque, uint64_t offset, uint32_t size)
{
    struct device *device = opaque;
    (void)offset;
    (void)size;
    CHECK_EQUAL(device->alive, ALIVE);
    atomic_fetch_add_explicit(&device->accesses, 1, memory_order_relaxed);
    return 0;
}

static enum fake_exit read_port(struct fake_vcpu *v)
{
    return fake_in(v, FAKE_PORT);
}

/* The time that this process had a processor: what is done in it does not depend on how busy the host is. */
static uint64_t milliseconds_spent(void)
{
    struct timespec spent;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return (uint64_t)spent.tv_sec * 1000 + (uint64_t)spent.tv_nsec / 1000000;
}

static void a_detached_device_is_never_used_again(void)
{
    static const vmm_device_ops ops = {living_read, ignore_write};
    pthread_t vcpus[VCPUS];
    vm = fake_machine(VCPUS);
    for (unsigned i = 0; i < VCPUS; i++) {
        fake_vcpu(i)->guest = read_port;
        vcpus[i] = fake_start_vcpu(i);
    }
    const uint64_t limit = milliseconds_spent() + LIMIT_MS;
    for (unsigned n = 0; n < DEVICES && milliseconds_spent() < limit; n++) {
        struct device *device = malloc(sizeof(*device));
        CHECK(device);
        *device = (struct device){.alive = ALIVE};
        CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, FAKE_PORT, 1, &ops, device, n), 0);
        while (atomic_load_explicit(&device->accesses, memory_order_relaxed) < ACCESSES)
            sched_yield();
        CHECK_EQUAL(detach_port(), 0);
        device->alive = 0;
        free(device);
    }
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    for (unsigned i = 0; i < VCPUS; i++)
        fake_join(vcpus[i]);
    fake_destroy(vm);
}

int main(void)
{
    sem_init(&in_device, 0, 0);
    sem_init(&leave_device, 0, 0);
    removing_waits_for_the_vcpu_inside(read_port_once, detach_port);
    removing_waits_for_the_vcpu_inside(load_once, detach_register);
    removing_waits_for_the_vcpu_inside(read_port_once, detach_hook);
    a_device_may_detach_itself_in_the_middle_of_an_access();
    an_access_within_an_access_does_not_let_the_outer_one_go();
    a_detached_device_is_never_used_again();
    return 0;
}
