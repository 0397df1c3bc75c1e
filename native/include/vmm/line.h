/* SPDX-License-Identifier: Apache-2.0 */
/* Interrupt lines. */
#ifndef VMM_API_LINE_H
#define VMM_API_LINE_H

#include "vmm/vm.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/* One wire. A device is given a line; whether an irqchip, a test or nothing is behind it is not its business. */
typedef struct vmm_line {
    void (*set)(void *opaque, uint32_t n, int level);
    void *opaque;
    uint32_t n;
} vmm_line;

/* The machine's wire `gsi` into the in-kernel irqchip. The machine's; valid until vmm_vm_destroy. NULL: gsi > 4095. */
const vmm_line *vmm_vm_line(vmm_vm *vm, uint32_t gsi);

/* Drive a line from Python. */
void vmm_line_set(const vmm_line *line, int level);

/* cdef: end */

#endif
