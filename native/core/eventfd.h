/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ioeventfds: a guest's write to a port or to memory-mapped space that KVM turns into an eventfd's signal, without
 * an exit to us.
 */
#ifndef VMM_CORE_EVENTFD_H
#define VMM_CORE_EVENTFD_H

#include "core/core.h"

/*
 * Have KVM signal `fd` for a write of `size` bytes (1, 2, 4, 8; 0: of any size) at `address` of a space (enum
 * vmm_space); with `match` only if `value` is written. assign = false undoes it; the same arguments say which.
 * Both wait for a grace period of KVM's (milliseconds): never on a path the guest may take often.
 * -EEXIST: the place is taken; -EINVAL: a size KVM has no ioeventfd for, or match without one; else the ioctl's.
 */
int vmm_vm_ioeventfd(struct vmm_vm *vm, int space, uint64_t address, uint32_t size, bool match,
                     uint64_t value, int fd, bool assign);

#endif
