/* SPDX-License-Identifier: Apache-2.0 */
/* Checkpoints, and rolling back to them. */
#ifndef VMM_API_CHECKPOINT_H
#define VMM_API_CHECKPOINT_H

#include "vmm/vm.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/*
 * A copy of guest memory, and what vmm_vm_save gives. Rolling back copies the pages that were written since the
 * checkpoint was made or last rolled back to. All of it on a machine that is paused or does not run; devices are the
 * caller's. Any number at once.
 */
typedef struct vmm_checkpoint vmm_checkpoint;
int vmm_checkpoint_create(vmm_vm *vm, vmm_checkpoint **out);
void vmm_checkpoint_destroy(vmm_checkpoint *checkpoint); /* before vmm_vm_destroy; NULL is fine */

/* Memory. Returns how many pages were copied. */
int64_t vmm_checkpoint_roll_back_memory(vmm_checkpoint *checkpoint);
/* vCPUs and chips; after the devices, which drive the lines of the latter. */
int vmm_checkpoint_roll_back_processors(vmm_checkpoint *checkpoint);

/* cdef: end */

#endif
