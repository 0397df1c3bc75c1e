/* SPDX-License-Identifier: Apache-2.0 */
/* What each exit means: the bus, a remedy, the debugger, or the end of the run. */
#include "core/exits.h"
#include "core/stop.h"

#include <string.h>

static void record(struct vmm_vcpu *vcpu, const vmm_exit_record *entry)
{
    vcpu->last[vcpu->recorded++ & (VMM_LAST_EXITS - 1)] = *entry;
    if (unlikely(vcpu->recorded == vcpu->debug.stop_at))
        vmm_debug_counted(vcpu);
}

static enum vmm_verdict exit_pio(struct vmm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    const bool write = run->io.direction == KVM_EXIT_IO_OUT;
    const uint32_t size = run->io.size;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    vmm_exit_record entry = {.address = run->io.port,
                             .reason = KVM_EXIT_IO,
                             .size = (uint16_t)size,
                             .write = write,
                             .claimed = 1,
                             .count = run->io.count};
    for (uint32_t i = 0; i < run->io.count; i++, data += size) {
        entry.value = 0;
        memcpy(&entry.value, data, size);
        entry.claimed &= vmm_bus_access(vcpu, VMM_PIO, run->io.port, size, &entry.value, write, &entry.tag);
        if (!write)
            memcpy(data, &entry.value, size);
    }
    record(vcpu, &entry);
    vcpu->unsettled = true;
    return VMM_REENTER;
}

static enum vmm_verdict exit_mmio(struct vmm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    const uint32_t size = run->mmio.len <= 8 ? run->mmio.len : 8;
    vmm_exit_record entry = {.address = run->mmio.phys_addr,
                             .reason = KVM_EXIT_MMIO,
                             .size = (uint16_t)size,
                             .write = run->mmio.is_write,
                             .claimed = 1,
                             .count = 1};
    memcpy(&entry.value, run->mmio.data, size);
    entry.claimed =
        vmm_bus_access(vcpu, VMM_MMIO, entry.address, size, &entry.value, entry.write, &entry.tag);
    if (!entry.write)
        memcpy(run->mmio.data, &entry.value, size);
    record(vcpu, &entry);
    vcpu->unsettled = true;
    return VMM_REENTER;
}

static enum vmm_verdict leave(struct vmm_vcpu *vcpu, int reason, uint64_t code)
{
    vmm_vcpu_stop(vcpu, reason, code);
    return VMM_LEAVE;
}

typedef int (*remedy)(struct vmm_vcpu *);

static enum vmm_verdict remedied(struct vmm_vcpu *vcpu, remedy try, int reason, uint64_t code)
{
    vmm_exit_record entry = {.address = code, .reason = vcpu->run->exit_reason, .count = 1};
    entry.claimed = try && try(vcpu) == 1;
    record(vcpu, &entry);
    return entry.claimed ? VMM_REENTER : leave(vcpu, reason, code);
}

/* compat's breakpoints, then the debugger's, whose stops are no deed of the guest's and not recorded. */
static enum vmm_verdict exit_debug(struct vmm_vcpu *vcpu)
{
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    remedy ours = compat ? compat->debug : NULL;
    uint64_t exception = vcpu->run->debug.arch.exception;
    if (!vcpu->vm->debug.open)
        return remedied(vcpu, ours, VMM_STOP_DEBUG, exception);
    if (ours && ours(vcpu) == 1)
        vmm_debug_completed(vcpu);
    else if (!vmm_debug_exit(vcpu))
        return leave(vcpu, VMM_STOP_DEBUG, exception);
    return VMM_REENTER;
}

static enum vmm_verdict exit_internal_error(struct vmm_vcpu *vcpu)
{
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    if (vmm_debug_int3(vcpu))
        return VMM_REENTER;
    enum vmm_verdict verdict = remedied(vcpu, compat ? compat->internal_error : NULL, VMM_STOP_EMULATION,
                                        vcpu->run->internal.suberror);
    if (verdict == VMM_REENTER)
        vmm_debug_completed(vcpu);
    return verdict;
}

static enum vmm_verdict exit_msr(struct vmm_vcpu *vcpu, remedy try)
{
    const struct kvm_run *run = vcpu->run;
    vmm_exit_record entry = {.address = run->msr.index,
                             .reason = run->exit_reason,
                             .size = 8,
                             .write = run->exit_reason == KVM_EXIT_X86_WRMSR,
                             .count = 1};
    entry.claimed = try && try(vcpu) == 1;
    entry.value = run->msr.data; /* what was written, or the answer */
    record(vcpu, &entry);
    return entry.claimed ? VMM_REENTER : leave(vcpu, VMM_STOP_UNKNOWN_EXIT, run->exit_reason);
}

static enum vmm_verdict exit_shutdown(struct vmm_vcpu *vcpu)
{
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    return compat && compat->shutdown && compat->shutdown(vcpu) == 1 ? VMM_REENTER
                                                                     : leave(vcpu, VMM_STOP_TRIPLE_FAULT, 0);
}

static enum vmm_verdict exit_other(struct vmm_vcpu *vcpu)
{
    const struct kvm_run *run = vcpu->run;
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    switch (run->exit_reason) {
    case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_INTR:
        return VMM_REENTER;
    case KVM_EXIT_HLT:
        return leave(vcpu, VMM_STOP_HALT, 0);
    case KVM_EXIT_SHUTDOWN:
        return exit_shutdown(vcpu);
    case KVM_EXIT_FAIL_ENTRY:
        return leave(vcpu, VMM_STOP_FAIL_ENTRY, run->fail_entry.hardware_entry_failure_reason);
    case KVM_EXIT_SYSTEM_EVENT:
        return leave(vcpu, VMM_STOP_SYSTEM_EVENT, run->system_event.type);
    case KVM_EXIT_INTERNAL_ERROR:
        return exit_internal_error(vcpu);
    case KVM_EXIT_DEBUG:
        return exit_debug(vcpu);
    case KVM_EXIT_X86_RDMSR:
        return exit_msr(vcpu, compat ? compat->rdmsr : NULL);
    case KVM_EXIT_X86_WRMSR:
        return exit_msr(vcpu, compat ? compat->wrmsr : NULL);
    default:
        return leave(vcpu, VMM_STOP_UNKNOWN_EXIT, run->exit_reason);
    }
}

static enum vmm_verdict handle(struct vmm_vcpu *vcpu)
{
    uint32_t reason = vcpu->run->exit_reason;
    vcpu->exits[reason < VMM_EXIT_REASONS ? reason : VMM_EXIT_REASONS - 1]++;
    if (likely(reason == KVM_EXIT_IO))
        return exit_pio(vcpu);
    if (likely(reason == KVM_EXIT_MMIO))
        return exit_mmio(vcpu);
    return exit_other(vcpu);
}

static enum vmm_verdict handle_and_tell(struct vmm_vcpu *vcpu, struct vmm_trace *trace, uint64_t hooked)
{
    const uint32_t reason = vcpu->run->exit_reason;
    uint64_t tsc = __rdtsc(), rip = trace ? vmm_trace_rip(vcpu) : 0, recorded = vcpu->recorded;
    enum vmm_verdict verdict = handle(vcpu);
    const vmm_exit_record bare = {.reason = reason, .count = 1}, *entry = NULL;
    if (vcpu->recorded != recorded)
        entry = &vcpu->last[recorded & (VMM_LAST_EXITS - 1)];
    if (trace)
        vmm_trace_exit(trace, vcpu, tsc, rip, entry);
    if (hooked >> (reason < VMM_EXIT_REASONS ? reason : VMM_EXIT_REASONS - 1) & 1)
        vcpu->vm->hook_exit(vcpu->vm->hook_opaque, vcpu->id, entry ? entry : &bare);
    return verdict;
}

enum vmm_verdict vmm_vcpu_handle_exit(struct vmm_vcpu *vcpu)
{
    struct vmm_trace *trace = vmm_trace_on(&vcpu->trace);
    const uint64_t hooked = atomic_load(&vcpu->vm->hooked_exits);
    return unlikely(trace || hooked) ? handle_and_tell(vcpu, trace, hooked) : handle(vcpu);
}
