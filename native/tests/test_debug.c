/* SPDX-License-Identifier: Apache-2.0 */
/* The owner of KVM_SET_GUEST_DEBUG: what is refused, what is shared with compat, that nothing stays behind. */
#include "check.h"
#include "core/core.h"

#include <errno.h>
#include <string.h>

enum { SKIPPED = 77, RAM = 1 << 20 };

static vmm_vm *machine(uint8_t **ram)
{
    vmm_vm *vm;
    int memfd;
    vmm_vcpu *vcpu;
    if (vmm_vm_create("/dev/kvm", 0, &vm) < 0)
        return NULL;
    CHECK(vmm_vm_add_memory(vm, 0, RAM, 0, (void **)ram, &memfd) == 0);
    CHECK(vmm_vcpu_create(vm, 0, &vcpu) == 0);
    CHECK(vmm_debug_open(vm, 0) == 0);
    return vm;
}

static void a_thousand_breakpoints_come_and_go(vmm_vm *vm, uint8_t *ram)
{
    uint8_t original = 0;
    for (uint32_t i = 0; i < 1000; i++)
        ram[i * 7 % 1000] = (uint8_t)(i * 7 % 1000);
    for (uint32_t i = 0; i < 1000; i++) {
        uint64_t at = i * 7 % 1000;
        CHECK(vmm_debug_plant(vm, at, &original) == 0 && original == (uint8_t)at && ram[at] == 0xcc);
    }
    CHECK(vmm_debug_plant(vm, 500, &original) == -EEXIST);
    CHECK(vmm_debug_close(vm) == -EBUSY);
    for (uint64_t at = 0; at < 1000; at++)
        CHECK(vmm_debug_lift(vm, at, (uint8_t)at) == 0 && ram[at] == (uint8_t)at);
    CHECK(vmm_debug_lift(vm, 500, 0) == -ENOENT);
}

static void what_cannot_be_is_refused(vmm_vm *vm)
{
    uint8_t original;
    CHECK(vmm_debug_plant(vm, RAM, &original) == -EFAULT);
    CHECK(vmm_debug_slots(vm) == 4);
    CHECK(vmm_debug_set_point(vm, 4, VMM_DEBUG_EXECUTE, 0, 1) == -EINVAL);
    CHECK(vmm_debug_set_point(vm, 0, VMM_DEBUG_EXECUTE, 0, 2) == -EINVAL);
    CHECK(vmm_debug_set_point(vm, 0, VMM_DEBUG_WRITE, 0, 3) == -EINVAL);
    CHECK(vmm_debug_set_point(vm, 0, VMM_DEBUG_WRITE, 2, 4) == -EINVAL);
    CHECK(vmm_debug_set_point(vm, 0, VMM_DEBUG_SOFTWARE, 0, 1) == -EINVAL);
    CHECK(vmm_debug_set_point(vm, 0, VMM_DEBUG_STEP, 0, 1) == -EINVAL);
    CHECK(vmm_debug_set_point(vm, 3, VMM_DEBUG_ACCESS, 8, 8) == 0);
    CHECK(vmm_debug_open(vm, 2) == -EINVAL);
    CHECK(vmm_debug_open(vm, VMM_DEBUG_WATCH_BY_STEP) == 0);
    CHECK(vmm_debug_set_point(vm, 3, VMM_DEBUG_ACCESS, 8, 8) == -ENOTSUP);
}

static void a_step_at_cpl_3_is_refused_where_it_would_not_stop(vmm_vm *vm)
{
    vmm_vcpu *vcpu = vm->vcpus[0];
    vmm_sregs before, sregs;
    CHECK(vmm_vcpu_get_sregs(vcpu, &before) == 0);
    sregs = before;
    sregs.cr0 |= 1;
    sregs.cs.dpl = sregs.ss.dpl = 3;
    CHECK(vmm_vcpu_set_sregs(vcpu, &sregs) == 0);
    CHECK(vmm_debug_step(vcpu, 1) == -ENOTSUP);
    CHECK(vmm_debug_follow(vcpu, 1) == -ENOTSUP && vmm_debug_follow(vcpu, 0) == 0);
    CHECK(vmm_debug_open(vm, 0) == 0);
    CHECK(vmm_debug_step(vcpu, 1) == 0);
    CHECK(vmm_debug_step(vcpu, 0) == 0);
    CHECK(vmm_vcpu_set_sregs(vcpu, &before) == 0);
}

static void a_followed_vcpu_is_known_from_where_it_stands_until_that_ends(vmm_vm *vm)
{
    vmm_regs regs, now;
    vmm_sregs sregs;
    uint64_t steps = 7;
    vmm_vcpu *vcpu = vm->vcpus[0];
    CHECK(vmm_vcpu_get_regs(vcpu, &now) == 0);
    CHECK(vmm_debug_followed(vcpu, &regs, &sregs, &steps) == -ENOENT);
    CHECK(vmm_debug_follow(vcpu, 5) == 0);
    CHECK(vmm_debug_followed(vcpu, &regs, &sregs, &steps) == 0);
    CHECK(steps == 0 && regs.rip == now.rip && !memcmp(&regs, &now, sizeof(regs)));
    CHECK(vmm_debug_follow(vcpu, 0) == 0);
    CHECK(vmm_debug_followed(vcpu, &regs, &sregs, &steps) == -ENOENT);
    CHECK(vmm_debug_stop_at(vcpu, 1) == 0 && vmm_vcpu_recorded(vcpu) == 0);
}

static void no_event_is_taken_where_there_is_none(vmm_vm *vm)
{
    vmm_debug_event event;
    CHECK(vmm_debug_take(vm, &event) == 0);
    CHECK(vmm_debug_close(vm) == 0);
    CHECK(vmm_debug_close(vm) == 0);
    CHECK(vmm_debug_take(vm, &event) == -EINVAL);
    CHECK(atomic_load(&vm->requests) == 0);
}

static void compat_keeps_two_registers(void)
{
    vmm_vm *vm;
    CHECK(vmm_vm_create("/dev/kvm", 0, &vm) == 0);
    if (vmm_compat_enable(vm, VMM_COMPAT_SYSCALL) == 0) {
        CHECK(vmm_debug_open(vm, 0) == 0);
        CHECK(vmm_debug_slots(vm) == 2);
        CHECK(vmm_debug_set_point(vm, 2, VMM_DEBUG_EXECUTE, 0, 1) == -EINVAL);
    }
    vmm_vm_destroy(vm);
}

int main(void)
{
    uint8_t *ram = NULL;
    vmm_vm *vm = machine(&ram);
    if (!vm)
        return SKIPPED;
    a_thousand_breakpoints_come_and_go(vm, ram);
    what_cannot_be_is_refused(vm);
    a_step_at_cpl_3_is_refused_where_it_would_not_stop(vm);
    a_followed_vcpu_is_known_from_where_it_stands_until_that_ends(vm);
    no_event_is_taken_where_there_is_none(vm);
    vmm_vm_destroy(vm);
    compat_keeps_two_registers();
    return 0;
}
