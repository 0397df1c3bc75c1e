/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-rng (virtio 1.2, 5.4). */
#ifndef VMMRNG_H
#define VMMRNG_H

#include "vmmvirtio.h"

/* cdef: begin */

typedef struct vmm_rng vmm_rng;
int vmm_rng_create(vmm_vm *vm, const char *name, vmm_rng **out);
vmm_virtio *vmm_rng_virtio(vmm_rng *rng);
void vmm_rng_destroy(vmm_rng *rng); /* after vmm_vm_destroy */

/* cdef: end */

#endif
