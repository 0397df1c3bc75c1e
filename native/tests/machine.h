/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A machine that is RAM and nothing else: no KVM, no vCPU, no line. For tests of what works on guest memory.
 * vmm_vm_destroy ends it. A guard page stands on each side of every region, so that an access outside is a fault.
 */
#ifndef VMM_TESTS_MACHINE_H
#define VMM_TESTS_MACHINE_H

#include "check.h"
#include "core/core.h"
#include "core/thread.h"

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

static inline vmm_vm *machine_create(void)
{
    vmm_vm *vm = calloc(1, sizeof(*vm));
    CHECK(vm);
    vm->kvm_fd = vm->fd = vm->stop_fd = -1;
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
