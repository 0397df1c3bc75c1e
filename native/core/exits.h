/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_CORE_EXITS_H
#define VMM_CORE_EXITS_H

#include "core/core.h"

enum vmm_verdict { VMM_REENTER, VMM_LEAVE };

/* Do what the exit in the vCPU's page asks for, on its thread. VMM_LEAVE: the run has ended. */
enum vmm_verdict vmm_vcpu_handle_exit(struct vmm_vcpu *vcpu);

#endif
