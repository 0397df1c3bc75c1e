/* SPDX-License-Identifier: Apache-2.0 */
/* A vCPU's registers and state, read and set while it does not run. */
#include "core/core.h"

#include <errno.h>
#include <string.h>

_Static_assert(sizeof(vmm_regs) == sizeof(struct kvm_regs), "vmm_regs is kvm_regs");
_Static_assert(sizeof(vmm_segment) == sizeof(struct kvm_segment), "vmm_segment is kvm_segment");
_Static_assert(sizeof(vmm_dtable) == sizeof(struct kvm_dtable), "vmm_dtable is kvm_dtable");
_Static_assert(sizeof(vmm_sregs) == sizeof(struct kvm_sregs), "vmm_sregs is kvm_sregs");
_Static_assert(offsetof(vmm_sregs, cr0) == offsetof(struct kvm_sregs, cr0), "vmm_sregs is kvm_sregs");
_Static_assert(offsetof(vmm_regs, rip) == offsetof(struct kvm_regs, rip), "vmm_regs is kvm_regs");
_Static_assert(sizeof(vmm_cpuid_entry) == sizeof(struct kvm_cpuid_entry2),
               "vmm_cpuid_entry is kvm_cpuid_entry2");

#define MAX_MSRS 512  /* KVM_GET_MSR_INDEX_LIST is near 200 */
#define MAX_CPUID 512 /* KVM_MAX_CPUID_ENTRIES is 256 */

_Thread_local struct vmm_vcpu *vmm_current_vcpu;

/* Without vm->lock, which a caller may hold: who paused the machine has seen every vCPU park under it. */
static bool runs_elsewhere(const vmm_vcpu *vcpu)
{
    return atomic_load(&vcpu->state) == VMM_VCPU_RUNNING && vcpu != vmm_current_vcpu;
}

/*
 * A vCPU in KVM_RUN keeps everybody else's ioctls waiting until it exits: for ever, if it halts. So of one that runs,
 * only its own thread may ask. With a request made it is about to leave, and the ioctl waits for no more than that.
 */
static int at_rest(const vmm_vcpu *vcpu)
{
    const uint32_t leaving = VMM_REQUEST_STOP | VMM_REQUEST_PAUSE | VMM_REQUEST_DEBUG;
    if (!runs_elsewhere(vcpu) || atomic_load(&vcpu->vm->requests) & leaving)
        return 0;
    return vmm_error_set(-EBUSY, "vCPU %u runs: pause the machine before you look at it", vcpu->id);
}

/* In the order in which KVM_RUN takes them. */
int vmm_vcpu_flush_registers(struct vmm_vcpu *vcpu)
{
    int rc = at_rest(vcpu);
    if (rc < 0 || runs_elsewhere(vcpu)) /* its own thread gives what is left there before it leaves */
        return rc;
    const uint64_t waiting = vcpu->run->kvm_dirty_regs;
    struct kvm_sync_regs *from = &vcpu->run->s.regs;
    vcpu->run->kvm_dirty_regs = 0;
    if (waiting & KVM_SYNC_X86_REGS)
        rc = vmm_engine_set(vcpu->engine, VMM_STATE_REGS, &from->regs);
    if (rc == 0 && waiting & KVM_SYNC_X86_SREGS)
        rc = vmm_engine_set(vcpu->engine, VMM_STATE_SREGS, &from->sregs);
    if (rc == 0 && waiting & KVM_SYNC_X86_EVENTS)
        rc = vmm_engine_set(vcpu->engine, VMM_STATE_EVENTS, &from->events);
    return rc;
}

static int get_part(vmm_vcpu *vcpu, enum vmm_state part, void *value)
{
    const int rc = vmm_vcpu_flush_registers(vcpu);
    return rc ? rc : vmm_engine_get(vcpu->engine, part, value);
}

static int set_part(vmm_vcpu *vcpu, enum vmm_state part, const void *value)
{
    const int rc = vmm_vcpu_flush_registers(vcpu);
    return rc ? rc : vmm_engine_set(vcpu->engine, part, value);
}

int vmm_vcpu_get_regs(vmm_vcpu *vcpu, vmm_regs *regs)
{
    return get_part(vcpu, VMM_STATE_REGS, regs);
}

int vmm_vcpu_set_regs(vmm_vcpu *vcpu, const vmm_regs *regs)
{
    return set_part(vcpu, VMM_STATE_REGS, regs);
}

int vmm_vcpu_get_sregs(vmm_vcpu *vcpu, vmm_sregs *sregs)
{
    return get_part(vcpu, VMM_STATE_SREGS, sregs);
}

int vmm_vcpu_set_sregs(vmm_vcpu *vcpu, const vmm_sregs *sregs)
{
    return set_part(vcpu, VMM_STATE_SREGS, sregs);
}

int vmm_vcpu_translate(vmm_vcpu *vcpu, uint64_t linear, uint64_t *gpa)
{
    struct kvm_translation t = {.linear_address = linear};
    int rc = vmm_vcpu_flush_registers(vcpu);
    rc = rc ? rc : vcpu->engine->ops->translate(vcpu->engine, &t);
    if (rc < 0)
        return rc;
    if (!t.valid)
        return vmm_error_set(-EFAULT, "linear address %#llx is not mapped", (unsigned long long)linear);
    *gpa = t.physical_address;
    return 0;
}

/* ---- CPUID and MSRs ---- */

struct cpuid_list {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[MAX_CPUID];
};

int vmm_vcpu_set_cpuid(vmm_vcpu *vcpu, const vmm_cpuid_entry *entries, uint32_t n)
{
    struct cpuid_list list = {.head.nent = n};
    if (n > MAX_CPUID)
        return vmm_error_set(-E2BIG, "%u CPUID entries are more than an engine takes", n);
    memcpy(list.entries, entries, n * sizeof(*entries));
    const int rc = vmm_vcpu_flush_registers(vcpu);
    return rc ? rc : vcpu->engine->ops->set_cpuid(vcpu->engine, &list.head);
}

struct msr_list {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MAX_MSRS];
};

static int fill_msrs(const vmm_vcpu *vcpu, struct msr_list *list, const uint32_t *index,
                     const uint64_t *value, uint32_t n)
{
    if (n > MAX_MSRS)
        return vmm_error_set(-E2BIG, "%u MSRs are more than one call takes", n);
    list->head.nmsrs = n;
    for (uint32_t i = 0; i < n; i++)
        list->entries[i] = (struct kvm_msr_entry){
            .index = index[i],
            .data = value ? vmm_msr_for_kvm(vcpu, index[i], value[i]) : 0,
        };
    return 0;
}

/* Registers that wait come first: EFER and the APIC's base are among both. */
int vmm_vcpu_get_msrs(vmm_vcpu *vcpu, const uint32_t *index, uint64_t *value, uint32_t n)
{
    struct msr_list list;
    memset(value, 0, n * sizeof(*value));
    int rc = fill_msrs(vcpu, &list, index, NULL, n);
    rc = rc ? rc : vmm_vcpu_flush_registers(vcpu);
    rc = rc ? rc : vcpu->engine->ops->get_msrs(vcpu->engine, &list.head);
    for (int i = 0; i < rc; i++)
        value[i] = vmm_msr_for_guest(vcpu, index[i], list.entries[i].data);
    return rc;
}

int vmm_vcpu_set_msrs(vmm_vcpu *vcpu, const uint32_t *index, const uint64_t *value, uint32_t n)
{
    struct msr_list list;
    int rc = fill_msrs(vcpu, &list, index, value, n);
    rc = rc ? rc : vmm_vcpu_flush_registers(vcpu);
    rc = rc ? rc : vcpu->engine->ops->set_msrs(vcpu->engine, &list.head);
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    for (int i = 0; i < rc && compat && compat->msr_written; i++)
        compat->msr_written(vcpu, index[i], value[i]);
    return rc;
}

/* ---- the other state, by kind ---- */

static const uint16_t state_sizes[] = {
    [VMM_STATE_MP] = sizeof(struct kvm_mp_state),
    [VMM_STATE_EVENTS] = sizeof(struct kvm_vcpu_events),
    [VMM_STATE_DEBUGREGS] = sizeof(struct kvm_debugregs),
    [VMM_STATE_LAPIC] = sizeof(struct kvm_lapic_state),
    [VMM_STATE_FPU] = sizeof(struct kvm_fpu),
    [VMM_STATE_XSAVE] = sizeof(struct kvm_xsave),
    [VMM_STATE_XCRS] = sizeof(struct kvm_xcrs),
    [VMM_STATE_REGS] = sizeof(struct kvm_regs),
    [VMM_STATE_SREGS] = sizeof(struct kvm_sregs),
    [VMM_STATE_CLOCK] = sizeof(struct kvm_clock_data),
    [VMM_STATE_PIT] = sizeof(struct kvm_pit_state2),
    [VMM_STATE_PIC_MASTER] = sizeof(struct kvm_irqchip),
    [VMM_STATE_PIC_SLAVE] = sizeof(struct kvm_irqchip),
    [VMM_STATE_IOAPIC] = sizeof(struct kvm_irqchip),
};

int vmm_state_size(int kind)
{
    const int n = sizeof(state_sizes) / sizeof(state_sizes[0]);
    return kind >= 0 && kind < n && state_sizes[kind] ? state_sizes[kind] : -EINVAL;
}

static int check_kind(int kind, size_t size, bool machine)
{
    const int expected = vmm_state_size(kind);
    if (expected < 0 || (kind >= VMM_STATE_CLOCK) != machine)
        return vmm_error_set(-EINVAL, "there is no %s state of kind %d", machine ? "machine" : "vCPU", kind);
    return size == (size_t)expected
               ? 0
               : vmm_error_set(-EMSGSIZE, "state of kind %d is %d bytes, not %zu", kind, expected, size);
}

int vmm_vcpu_get_state(vmm_vcpu *vcpu, int kind, void *buffer, size_t size)
{
    const int rc = check_kind(kind, size, false);
    return rc ? rc : get_part(vcpu, (enum vmm_state)kind, buffer);
}

int vmm_vcpu_set_state(vmm_vcpu *vcpu, int kind, const void *buffer, size_t size)
{
    const int rc = check_kind(kind, size, false);
    return rc ? rc : set_part(vcpu, (enum vmm_state)kind, buffer);
}

static int get_chip(vmm_vm *vm, uint32_t id, struct kvm_irqchip *chip)
{
    chip->chip_id = id;
    return vm->engine->ops->get_chip(vm->engine, chip);
}

int vmm_vm_get_state(vmm_vm *vm, int kind, void *buffer, size_t size)
{
    const int rc = check_kind(kind, size, true);
    if (rc < 0)
        return rc;
    switch (kind) {
    case VMM_STATE_CLOCK:
        return vm->engine->ops->get_clock(vm->engine, buffer);
    case VMM_STATE_PIT:
        return vm->engine->ops->get_pit(vm->engine, buffer);
    default:
        return get_chip(vm, (uint32_t)(kind - VMM_STATE_PIC_MASTER), buffer);
    }
}

_Static_assert(VMM_STATE_PIC_SLAVE - VMM_STATE_PIC_MASTER == KVM_IRQCHIP_PIC_SLAVE &&
                   VMM_STATE_IOAPIC - VMM_STATE_PIC_MASTER == KVM_IRQCHIP_IOAPIC,
               "kinds are in the order of KVM's chip numbers");
