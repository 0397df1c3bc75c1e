/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hooks: being told what vCPUs do on the buses and why they exit, whatever device answers.
 *
 * A hook is a range of ports or guest-physical addresses, not a device: ranges may overlap, be unclaimed, and what
 * lies behind may come, go and move. What never leaves KVM is not seen: RAM, the in-kernel interrupt controllers
 * and timer, doorbells that are ioeventfds.
 */
#ifndef VMMHOOK_H
#define VMMHOOK_H

#include "vmmcore.h"

/* cdef: begin */

/* One access. A hook may change `value`: what the device is given on a write, the guest on a read. */
typedef struct vmm_access {
    uint64_t address, value;
    uint32_t vcpu;
    uint32_t tag; /* of the hook */
    uint8_t size; /* 1..8; a split access is delivered whole */
    uint8_t write;
    uint8_t space; /* enum vmm_space */
} vmm_access;

/*
 * Whom to tell, on the vCPU's thread and outside locks; by several vCPUs at once. Set it once, before the first
 * call below; `opaque` must last as long as the machine.
 */
void vmm_vm_on_hook(vmm_vm *vm, void (*access)(void *opaque, vmm_access *access),
                    void (*exit)(void *opaque, uint32_t vcpu, const vmm_exit_record *record), void *opaque);

/*
 * Tell of each access that touches [base, base+size): of a write before the device sees it, of a read when the
 * device has answered. Several hooks of one access are told in the order they were attached. Safe while vCPUs run.
 * -EINVAL: empty, wrapping, beyond 64 Ki ports; -EEXIST: guest RAM, whose accesses do not exit; -ENOSPC: over 64.
 */
int vmm_hook_attach(vmm_vm *vm, int space, uint64_t base, uint64_t size, uint32_t tag);

/* On return no vCPU is inside this hook, except the calling one. -ENOENT: no such tag in this space. */
int vmm_hook_detach(vmm_vm *vm, int space, uint32_t tag);

/* Tell of exits once they were answered: bit n for KVM's exit reason n, bit 63 for all above 62. 0: of none. */
void vmm_hook_exits(vmm_vm *vm, uint64_t reasons);

/* cdef: end */

#endif
