/* SPDX-License-Identifier: Apache-2.0 */
/* KVM_EXIT_INTERNAL_ERROR: an instruction that KVM gave up on, completed. */
#include "vcpu.h"

#include <string.h>

int compat_internal_error(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    const struct kvm_run *run = vcpu->run;
    if (run->internal.suberror != KVM_INTERNAL_ERROR_EMULATION)
        return 0;
    struct completion c;
    if (!completion_load(compat, &c))
        return 0;
    uint8_t bytes[INSN_MAX];
    size_t n = 0;
    bool reported = run->emulation_failure.ndata >= 1 &&
                    run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
    if (reported && run->emulation_failure.insn_size == INSN_MAX) {
        memcpy(bytes, run->emulation_failure.insn_bytes, INSN_MAX);
        n = INSN_MAX;
    } else {
        n = completion_fetch(&c, bytes); /* at a page's end KVM reports only what it had read */
    }
    enum outcome outcome = complete(&c, bytes, n);
    if (outcome == COMPLETE_UNKNOWN || !completion_store(compat, &c, outcome))
        return 0;
    if (compat_of(vcpu)->flags & VMM_COMPAT_SYSCALL)
        syscall_repair_refresh(compat, &c);
    atomic_fetch_add_explicit(&compat_of(vcpu)->completed, 1, memory_order_relaxed);
    return 1;
}
