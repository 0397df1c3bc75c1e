/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A machine that is RAM and nothing else: no KVM, no vCPU, no line. For tests of what works on guest memory.
 * vmm_vm_destroy ends it. A guard page stands on each side of every region, so that an access outside is a fault.
 */
#ifndef VMM_TESTS_MACHINE_H
#define VMM_TESTS_MACHINE_H

#include "base/thread.h"
#include "check.h"
#include "core/core.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define MACHINE_RAM 0x1000000ull /* bytes in each region: [0, 16 MiB) and, past a hole, 16 MiB at 4 GiB */
#define MACHINE_HIGH 0x100000000ull

/* Another region; it may touch the ones there are. Answers its first byte. */
static inline uint8_t *machine_add(vmm_vm *vm, uint64_t gpa, uint64_t size, uint32_t flags)
{
    CHECK(vm->n_regions < VMM_MAX_REGIONS && (gpa | size) % 4096 == 0);
    int fd = memfd_create("test-memory", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    uint8_t *guarded = mmap(NULL, size + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(guarded != MAP_FAILED);
    uint8_t *host = mmap(guarded + 4096, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    CHECK(host != MAP_FAILED);
    vm->regions[vm->n_regions++] =
        (struct vmm_region){.gpa = gpa, .size = size, .host = host, .fd = fd, .flags = flags};
    return host;
}

/* An engine that executes nothing: lines lead nowhere, and what it is asked for it does not have. */
static inline void machine_close(struct vmm_engine *engine)
{
    (void)engine;
}

static inline int machine_capability(struct vmm_engine *engine, uint32_t capability)
{
    (void)engine, (void)capability;
    return 0;
}

static inline void machine_line(struct vmm_engine *engine, uint32_t gsi, bool level)
{
    (void)engine, (void)gsi, (void)level;
}

static inline int machine_set_memory(struct vmm_engine *engine,
                                     const struct kvm_userspace_memory_region *slot)
{
    (void)engine, (void)slot;
    return vmm_error_host(-ENOTSUP, "a machine without an engine has no memory slots");
}

static inline int machine_ioeventfd(struct vmm_engine *engine, const struct kvm_ioeventfd *doorbell)
{
    (void)engine, (void)doorbell;
    return vmm_error_host(-ENOTSUP, "a machine without an engine has no ioeventfds");
}

static inline int machine_routing(struct vmm_engine *engine, const struct kvm_irq_routing *table)
{
    (void)engine, (void)table;
    return vmm_error_host(-ENOTSUP, "a machine without an engine has no interrupt routes");
}

static const struct vmm_engine_ops machine_engine_ops = {
    .close = machine_close,
    .capability = machine_capability,
    .line = machine_line,
    .set_memory = machine_set_memory,
    .ioeventfd = machine_ioeventfd,
    .routing = machine_routing,
};

static inline vmm_vm *machine_create(void)
{
    static struct vmm_engine engine = {.ops = &machine_engine_ops};
    vmm_vm *vm = calloc(1, sizeof(*vm));
    CHECK(vm);
    vm->engine = &engine;
    vm->stop_fd = -1;
    vm->stop_vcpu = UINT32_MAX;
    pthread_mutex_init(&vm->lock, NULL);
    vmm_cond_init(&vm->changed);
    pthread_mutex_init(&vm->dirty_lock, NULL);
    vmm_bus_init(&vm->bus);
    machine_add(vm, 0, MACHINE_RAM, 0);
    machine_add(vm, MACHINE_HIGH, MACHINE_RAM, 0);
    return vm;
}

/* Guest memory as the guest sees it; a range outside RAM ends the test. */
static inline void *machine_at(vmm_vm *vm, uint64_t gpa, uint64_t size)
{
    void *host = vmm_vm_gpa(vm, gpa, size);
    CHECK(host);
    return host;
}

#endif
