/* SPDX-License-Identifier: Apache-2.0 */
/* Switching the remedies on, and what they have done. */
#include "vcpu.h"

#include <errno.h>
#include <stdlib.h>

static int vcpu_init(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = calloc(1, sizeof *compat);
    if (!compat)
        return vmm_error_set(-ENOMEM, "memory for a vCPU's compatibility state");
    compat->vcpu = vcpu;
    compat->source = kvm_completion_source;
    compat->source.opaque = compat;
    xsave_layout_init(&compat->source.layout);
    vcpu->compat = compat;
    vcpu->look = ((const struct compat_machine *)vcpu->vm->compat_state)->flags & VMM_COMPAT_SYSCALL;
    return 0;
}

static void vcpu_fini(struct vmm_vcpu *vcpu)
{
    free(vcpu->compat);
    vcpu->compat = NULL;
}

static void vm_fini(struct vmm_vm *vm)
{
    free(vm->compat_state);
    vm->compat_state = NULL;
}

static const struct vmm_compat_ops complete_only = {
    .vcpu_init = vcpu_init,
    .internal_error = compat_internal_error,
    .vcpu_fini = vcpu_fini,
    .vm_fini = vm_fini,
};

static const struct vmm_compat_ops syscall_only = {
    .vcpu_init = vcpu_init,
    .debug = compat_debug,
    .shutdown = compat_shutdown,
    .rdmsr = compat_rdmsr,
    .wrmsr = compat_wrmsr,
    .msr_for_kvm = compat_msr_for_kvm,
    .msr_for_guest = compat_msr_for_guest,
    .msr_written = compat_msr_written,
    .look = compat_look,
    .loaded = compat_loaded,
    .vcpu_fini = vcpu_fini,
    .vm_fini = vm_fini,
};

static const struct vmm_compat_ops both = {
    .vcpu_init = vcpu_init,
    .internal_error = compat_internal_error,
    .debug = compat_debug,
    .shutdown = compat_shutdown,
    .rdmsr = compat_rdmsr,
    .wrmsr = compat_wrmsr,
    .msr_for_kvm = compat_msr_for_kvm,
    .msr_for_guest = compat_msr_for_guest,
    .msr_written = compat_msr_written,
    .look = compat_look,
    .loaded = compat_loaded,
    .vcpu_fini = vcpu_fini,
    .vm_fini = vm_fini,
};

/*
 * KVM writes the processor's own hypercall instruction over VMCALL or VMMCALL and executes it again, which its emulator
 * does for ever. With this quirk off it raises #UD instead (Linux 5.19 and later; an older KVM is left as it is).
 */
static void raise_at_hypercalls(struct vmm_vm *vm)
{
    if (vmm_vm_check_extension(vm, KVM_CAP_DISABLE_QUIRKS2) & KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
        vmm_vm_enable_cap(vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, 0, 0, 0);
}

int vmm_compat_enable(vmm_vm *vm, uint32_t flags)
{
    if (vm->compat)
        return vmm_error_set(-EBUSY, "host compatibility is switched on already");
    if (flags & ~(uint32_t)(VMM_COMPAT_COMPLETE | VMM_COMPAT_SYSCALL | VMM_COMPAT_LSTAR | VMM_COMPAT_SHADOW |
                            VMM_COMPAT_HYPERCALL) ||
        (flags & VMM_COMPAT_LSTAR && !(flags & VMM_COMPAT_SYSCALL)))
        return vmm_error_set(-EINVAL, "vmm_compat_enable: unknown flags 0x%x", flags);
    vm->shadow_paging = flags & VMM_COMPAT_SHADOW; /* the core's own affair: see state.c */
    if (flags & VMM_COMPAT_HYPERCALL)
        raise_at_hypercalls(vm);
    flags &= ~(uint32_t)(VMM_COMPAT_SHADOW | VMM_COMPAT_HYPERCALL);
    if (!flags)
        return 0;
    const int synced = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    if ((vmm_vm_check_extension(vm, KVM_CAP_SYNC_REGS) & synced) != synced)
        return vmm_error_set(-ENOTSUP, "host compatibility needs KVM_CAP_SYNC_REGS");
    /* Without this KVM also queues the #UD that it could not decide on. */
    if (flags & VMM_COMPAT_COMPLETE &&
        vmm_vm_enable_cap(vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1, 0, 0, 0) != 0)
        return vmm_error_set(-ENOTSUP, "completing instructions needs KVM_CAP_EXIT_ON_EMULATION_FAILURE");
    if (flags & VMM_COMPAT_SYSCALL) {
        int rc = syscall_repair_enable(vm);
        if (rc)
            return rc;
    }
    struct compat_machine *machine = calloc(1, sizeof *machine);
    if (!machine)
        return vmm_error_set(-ENOMEM, "memory for the compatibility state");
    machine->flags = flags;
    vm->compat_state = machine;
    vm->compat = !(flags & VMM_COMPAT_SYSCALL)    ? &complete_only
                 : !(flags & VMM_COMPAT_COMPLETE) ? &syscall_only
                                                  : &both;
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        int rc = vcpu_init(vm->vcpus[i]);
        if (rc)
            return rc;
    }
    return 0;
}

void vmm_compat_get_stats(vmm_vm *vm, vmm_compat_stats *stats)
{
    const struct compat_machine *machine = vm->compat_state;
    *stats = (vmm_compat_stats){0};
    if (!machine)
        return;
    stats->completed = atomic_load_explicit(&machine->completed, memory_order_relaxed);
    stats->syscalls = atomic_load_explicit(&machine->syscalls, memory_order_relaxed);
    stats->faults = atomic_load_explicit(&machine->faults, memory_order_relaxed);
}
