/* SPDX-License-Identifier: Apache-2.0 */
/* The bus: devices on ranges of ports and of guest-physical addresses. */
#ifndef VMM_API_BUS_H
#define VMM_API_BUS_H

#include "vmm/vm.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/*
 * A device is two functions over (offset, size); it knows no address. size is 1, 2, 4 or 8 (MMIO may also carry 3,
 * 5, 6 or 7 where a guest access was split at a page or range end: such accesses are delivered byte by byte).
 * A read's bits above size are ignored.
 */
typedef struct vmm_device_ops {
    uint64_t (*read)(void *opaque, uint64_t offset, uint32_t size);
    void (*write)(void *opaque, uint64_t offset, uint32_t size, uint64_t value);
} vmm_device_ops;

enum vmm_space { VMM_PIO = 0, VMM_MMIO = 1 };

/*
 * Claim [base, base+size) of a space for a device. `ops` and `opaque` must outlive the attachment; `tag` is the
 * caller's name for it (traces). Safe while vCPUs run. At most 4096 ranges a space.
 * -EEXIST: overlaps another range (or RAM); -EINVAL: empty, wrapping, or beyond 64 Ki ports; -ENOSPC.
 */
int vmm_bus_attach(vmm_vm *vm, int space, uint64_t base, uint64_t size, const vmm_device_ops *ops,
                   void *opaque, uint32_t tag);

/* Give a range up. On return no vCPU is inside its ops, except the calling one. -ENOENT: no range starts there. */
int vmm_bus_detach(vmm_vm *vm, int space, uint64_t base);

/* One access as a vCPU would make it, for tests and the monitor. Unclaimed bytes read as ones. size 1..8. */
uint64_t vmm_bus_read(vmm_vm *vm, int space, uint64_t address, uint32_t size);
void vmm_bus_write(vmm_vm *vm, int space, uint64_t address, uint32_t size, uint64_t value);

/* Accesses that no device claimed, since creation. */
uint64_t vmm_bus_unclaimed(vmm_vm *vm);

/* cdef: end */

#endif
