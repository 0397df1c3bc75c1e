/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_TIME_STATE_H
#define VMM_TIME_STATE_H

#include "core/core.h"

/* vmm_vm_load of what vmm_vm_save gave for this machine, where it may be known that no page table was written meanwhile. */
int vmm_vm_roll_back(struct vmm_vm *vm, const vmm_vcpu_state *vcpus, const vmm_chips_state *chips,
                     bool remapped);

#endif
