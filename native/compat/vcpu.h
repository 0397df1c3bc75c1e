/* SPDX-License-Identifier: Apache-2.0 */
/* The remedies' state, per machine and per vCPU, and a completion's KVM side (vcpu.c). */
#ifndef VMM_COMPAT_VCPU_H
#define VMM_COMPAT_VCPU_H

#include "compat.h"
#include "core/core.h"

#include <stdatomic.h>

struct compat_machine {
    uint32_t flags; /* enum vmm_compat_flags */
    _Atomic uint64_t completed, syscalls, faults;
};

struct compat_vcpu {
    struct vmm_vcpu *vcpu;
    struct completion_source source;
    bool knows_cpuid; /* source.cpuid is the guest's */
    /* The SYSCALL repair. The MSRs are as the guest wrote them; lstar 0: not yet. */
    uint64_t star, lstar, cstar, sfmask;
    uint64_t page_fault_entry, undefined_entry; /* linear; breakpoints, armed while not 0 */
};

static inline struct compat_machine *compat_of(const struct vmm_vcpu *vcpu)
{
    return vcpu->vm->compat_state;
}

/* Registers of the vCPU into a completion, ready for complete(); and its outcome back. False: the host
 * refused. */
bool completion_load(struct compat_vcpu *compat, struct completion *c);
bool completion_store(struct compat_vcpu *compat, struct completion *c, enum outcome outcome);

/* Have KVM forget the exception that it could not deliver; between completion_load() and completion_store(). */
void completion_forget_exception(struct compat_vcpu *compat);

/* The bytes at RIP, as many as can be fetched. */
size_t completion_fetch(struct completion *c, uint8_t bytes[INSN_MAX]);

extern const struct completion_source kvm_completion_source; /* less opaque and layout */

/* exits (exits.c, syscall.c): 1 handled, 0 not */
int compat_internal_error(struct vmm_vcpu *vcpu);
int compat_debug(struct vmm_vcpu *vcpu);
int compat_shutdown(struct vmm_vcpu *vcpu);
int compat_wrmsr(struct vmm_vcpu *vcpu);
int compat_rdmsr(struct vmm_vcpu *vcpu);

/* See struct vmm_compat_ops. */
uint64_t compat_msr_for_kvm(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value);
uint64_t compat_msr_for_guest(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value);
void compat_msr_written(struct vmm_vcpu *vcpu, uint32_t index, uint64_t value);

/* Look for the guest's handlers between two runs, without disturbing what an exit left half done. */
void compat_look(struct vmm_vcpu *vcpu);

/* The vCPU was given another state: what the repair knows of the guest is in that. */
void compat_loaded(struct vmm_vcpu *vcpu, const vmm_vcpu_state *state);

/* Look again for the guest's handlers, which it may have moved, by the segment registers and tables in *c. */
void syscall_repair_refresh(struct compat_vcpu *compat, struct completion *c);

/* 0 or -errno */
int syscall_repair_enable(struct vmm_vm *vm);

#endif
