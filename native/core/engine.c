/* SPDX-License-Identifier: Apache-2.0 */
/* What a machine asks of its engine: capabilities, chips, the CPUID it supports. */
#include "core/core.h"

#include <errno.h>
#include <string.h>

#define MAX_CPUID 512 /* KVM_MAX_CPUID_ENTRIES is 256 */

int vmm_vm_check_extension(vmm_vm *vm, uint32_t capability)
{
    return vm->engine->ops->capability(vm->engine, capability);
}

int vmm_vm_enable_cap(vmm_vm *vm, uint32_t capability, uint64_t arg0, uint64_t arg1, uint64_t arg2,
                      uint64_t arg3)
{
    const struct kvm_enable_cap cap = {.cap = capability, .args = {arg0, arg1, arg2, arg3}};
    return vm->engine->ops->enable(vm->engine, &cap);
}

/*
 * KVM wants the interrupt controllers before the first vCPU; they come no earlier than that because a memory
 * slot that is set after them waits for the SRCU grace period in which KVM frees the buses they replaced (4
 * to 7 ms).
 */
int vmm_vm_create_chips(struct vmm_vm *vm)
{
    if (vm->has_chips || !(vm->flags & VMM_VM_IRQCHIP))
        return 0;
    const int rc = vm->engine->ops->create_chips(vm->engine, vm->flags & VMM_VM_PIT);
    vm->has_chips = rc == 0;
    return rc;
}

struct cpuid_list {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[MAX_CPUID];
};

int vmm_vm_supported_cpuid(vmm_vm *vm, vmm_cpuid_entry *entries, uint32_t max)
{
    struct cpuid_list list = {.head.nent = MAX_CPUID};
    const int rc = vm->engine->ops->supported_cpuid(vm->engine, &list.head);
    if (rc < 0)
        return rc;
    if (list.head.nent > max)
        return vmm_error_set(-E2BIG, "KVM_GET_SUPPORTED_CPUID has %u entries", list.head.nent);
    memcpy(entries, list.entries, list.head.nent * sizeof(*entries));
    return (int)list.head.nent;
}
