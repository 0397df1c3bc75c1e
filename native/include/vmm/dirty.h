/* SPDX-License-Identifier: Apache-2.0 */
/* Dirty logs: which pages of guest memory change. */
#ifndef VMM_API_DIRTY_H
#define VMM_API_DIRTY_H

#include "vmm/vm.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/*
 * A log of the pages of guest memory that were written: by the guest (KVM's dirty log), by devices, by host code that
 * says so. Any number at once, each with its own idea of what is clean. Another process that maps guest memory (a
 * share's server) is not seen. Open one while the machine is paused or not started.
 */
typedef struct vmm_dirty vmm_dirty;

/* Every page is clean in it from now on. -ENOMEM; else KVM's refusal to log. */
int vmm_dirty_open(vmm_vm *vm, vmm_dirty **out);
void vmm_dirty_close(vmm_dirty *log); /* before vmm_vm_destroy; NULL is fine */

/* Fetch what was written meanwhile. Returns how many pages are dirty in this log now. */
int64_t vmm_dirty_collect(vmm_dirty *log);

/*
 * Move a region's bitmap (bit n of word n / 64: its n-th page of 4 KiB) out of the log, which has it clean from now
 * on; nothing is fetched. Returns the pages set. -EINVAL: no such region; -EMSGSIZE: `words` is not its size.
 */
int64_t vmm_dirty_take(vmm_dirty *log, uint32_t region, uint64_t *bitmap, size_t words);

/* The monitor has written guest memory; after the write. Devices in C say so by themselves. */
void vmm_vm_dirty(vmm_vm *vm, uint64_t gpa, uint64_t size);

/* cdef: end */

#endif
