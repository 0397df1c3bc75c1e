/* SPDX-License-Identifier: Apache-2.0 */
/* Finding out that a machine can never wake: halt.c. Under vm->lock where the name says so. */
#ifndef VMM_CORE_HALT_H
#define VMM_CORE_HALT_H

#include "core/loop.h"

struct vmm_halt;

/* The guest does something again, after VMM_REQUEST_WATCH was set. */
void vmm_halt_active_locked(struct vmm_vm *vm);

/* A vCPU has parked. true: all have, as a look asked for, and nothing can wake any of them. */
bool vmm_halt_judge_locked(struct vmm_vm *vm);
/* No look any more: parked vCPUs go on. */
void vmm_halt_give_up_locked(struct vmm_vm *vm);

void vmm_halt_destroy(struct vmm_halt *halt); /* after the I/O thread */

#endif
