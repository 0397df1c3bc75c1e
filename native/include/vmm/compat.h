/* SPDX-License-Identifier: Apache-2.0 */
/* Remedies for hosts whose KVM departs from the architecture (native/compat; docs/architecture.md). */
#ifndef VMM_API_COMPAT_H
#define VMM_API_COMPAT_H

#include "vmm/vm.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

enum vmm_compat_flags {
    VMM_COMPAT_COMPLETE = 1, /* complete instructions KVM's emulator lacks */
    VMM_COMPAT_SYSCALL = 2,  /* repair CPL 3's ways into the guest's kernel: INT n, SYSCALL of 32-bit code */
    VMM_COMPAT_LSTAR =
        16, /* with it: SYSCALL of 64-bit code stays at CPL 3; KVM is kept from knowing LSTAR */
    VMM_COMPAT_HYPERCALL = 8, /* KVM's emulator executes a hypercall for ever: have it raise #UD */
    VMM_COMPAT_SHADOW = 4,    /* KVM shadows page tables: have it forget them when memory was put back */
};

/* Switch remedies on, before the first run. -ENOTSUP names the capability this needs. */
int vmm_compat_enable(vmm_vm *vm, uint32_t flags);

/* How often: instructions completed; SYSCALL and INT n entries repaired; other #PF and #UD stepped over. */
typedef struct vmm_compat_stats {
    uint64_t completed, syscalls, faults;
} vmm_compat_stats;
void vmm_compat_get_stats(vmm_vm *vm, vmm_compat_stats *stats);

/* cdef: end */

#endif
