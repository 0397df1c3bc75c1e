/* SPDX-License-Identifier: Apache-2.0 */
/* Ending a run, and kicking vCPUs out of the guest. Under vm->lock where the name says so. */
#ifndef VMM_CORE_STOP_H
#define VMM_CORE_STOP_H

#include "core/core.h"

/* Have every vCPU look at its requests. */
void vmm_vm_kick_locked(struct vmm_vm *vm);

/* End the run, unless it has ended: the first reason is kept. `vcpu` is the id of the one that ends it; UINT32_MAX: none. */
void vmm_stop_locked(struct vmm_vm *vm, int reason, uint64_t code, uint32_t vcpu);

/* The same from a vCPU's own thread. */
void vmm_vcpu_stop(struct vmm_vcpu *vcpu, int reason, uint64_t code);

#endif
