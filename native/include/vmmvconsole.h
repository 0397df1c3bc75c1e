/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio console (virtio 1.2, 5.3), one port: what the guest knows as hvc0. Its bytes go through a vmm_console, as
 * those of a UART do, so whoever sits at the other end cannot tell the two apart.
 *
 * While the console refuses output (its pump is too far behind) transmit buffers stay with the device, and the guest
 * waits; while nothing is typed its receive buffers do.
 */
#ifndef VMMVCONSOLE_H
#define VMMVCONSOLE_H

#include "vmmvirtio.h"

/* cdef: begin */

/* ---- virtio-console ---- */

typedef struct vmm_vconsole vmm_vconsole;
/* `console` outlives it. cols and rows: characters of the terminal; both 0: not known, and F_SIZE is not offered. */
int vmm_vconsole_create(vmm_vm *vm, const char *name, vmm_console *console, uint16_t cols, uint16_t rows,
                        vmm_vconsole **out);
void vmm_vconsole_destroy(vmm_vconsole *device); /* after vmm_vm_destroy */
vmm_virtio *vmm_vconsole_virtio(vmm_vconsole *device);
/* The terminal has another size now. -ENOTSUP: its size was not known when the device was created. */
int vmm_vconsole_resize(vmm_vconsole *device, uint16_t cols, uint16_t rows);

/* cdef: end */

#endif
