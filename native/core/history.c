/* SPDX-License-Identifier: Apache-2.0 */
/* What a vCPU did last, for those who look at it afterwards. */
#include "core/core.h"

#include <string.h>

uint32_t vmm_vcpu_last_exits(vmm_vcpu *vcpu, vmm_exit_record *records, uint32_t max)
{
    uint64_t end = vcpu->recorded, n = end < VMM_LAST_EXITS ? end : VMM_LAST_EXITS;
    if (n > max)
        n = max;
    for (uint64_t i = 0; i < n; i++)
        records[i] = vcpu->last[(end - n + i) & (VMM_LAST_EXITS - 1)];
    return (uint32_t)n;
}

uint64_t vmm_vcpu_recorded(vmm_vcpu *vcpu)
{
    return vcpu->recorded;
}

uint64_t vmm_vcpu_exit_count(vmm_vcpu *vcpu, uint32_t reason)
{
    return reason < VMM_EXIT_REASONS ? vcpu->exits[reason] : 0;
}

uint32_t vmm_vcpu_failed_instruction(vmm_vcpu *vcpu, uint8_t bytes[16])
{
    const struct kvm_run *run = vcpu->run;
    memset(bytes, 0, 16);
    if (run->exit_reason != KVM_EXIT_INTERNAL_ERROR ||
        run->internal.suberror != KVM_INTERNAL_ERROR_EMULATION || run->emulation_failure.ndata < 1 ||
        !(run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
        return 0;
    uint32_t n = run->emulation_failure.insn_size;
    if (n > 15)
        n = 15;
    memcpy(bytes, run->emulation_failure.insn_bytes, n);
    return n;
}

uint32_t vmm_vcpu_internal_error(vmm_vcpu *vcpu, uint64_t data[16])
{
    const struct kvm_run *run = vcpu->run;
    enum { MAX = sizeof(run->internal.data) / sizeof(run->internal.data[0]) };
    memset(data, 0, MAX * sizeof(*data));
    if (run->exit_reason != KVM_EXIT_INTERNAL_ERROR || run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION)
        return 0;
    const uint32_t n = run->internal.ndata < MAX ? run->internal.ndata : MAX;
    memcpy(data, run->internal.data, n * sizeof(*data));
    return n;
}
