/* SPDX-License-Identifier: Apache-2.0 */
/* kvmclock and the TSCs of a machine, saved and set as of one moment. */
#ifndef VMM_TIME_CLOCKS_H
#define VMM_TIME_CLOCKS_H

#include "core/core.h"

struct vmm_moment {
    uint64_t host_tsc, clock; /* ns of kvmclock, at one moment */
    uint64_t passed;          /* ns that kvmclock has gone on since the moment that was saved */
};

/* Once KVM has made the vCPU, before it is one of the machine's. */
int vmm_clocks_created(struct vmm_vcpu *vcpu);
int vmm_clocks_save(struct vmm_vm *vm, vmm_chips_state *to, struct vmm_moment *at);
/* `value` is what its MSR held; `read_at` the host's TSC before it was read. */
void vmm_clocks_save_tsc(const struct vmm_vcpu *vcpu, const struct vmm_moment *at, uint64_t value,
                         uint64_t read_at, vmm_vcpu_state *to);
/* `ahead`: by the time that the host's clock says has passed since they were saved. */
int vmm_clocks_load(struct vmm_vm *vm, const vmm_chips_state *from, bool ahead, struct vmm_moment *at);
/* vCPUs in their order; then the deadline, once it has its local APIC. */
int vmm_clocks_load_tsc(struct vmm_vcpu *vcpu, const vmm_vcpu_state *from, const struct vmm_moment *at,
                        uint64_t *beyond);
int vmm_clocks_load_deadline(struct vmm_vcpu *vcpu, const vmm_vcpu_state *from, uint64_t beyond);
/* Tell a guest's watchdogs (PVCLOCK_GUEST_STOPPED) that it was not the guest that stood still. */
void vmm_clocks_jumped(const struct vmm_vcpu *vcpu);

#endif
