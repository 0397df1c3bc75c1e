/* SPDX-License-Identifier: Apache-2.0 */
/* Guest memory. */
#ifndef VMM_API_MEMORY_H
#define VMM_API_MEMORY_H

#include "vmm/vm.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

enum vmm_memory_flags {
    VMM_MEMORY_HUGE_2M = 1,   /* memfd from the 2 MiB huge page pool */
    VMM_MEMORY_DIRTY_LOG = 2, /* let KVM record which pages the guest writes */
    VMM_MEMORY_READONLY = 4,  /* guest writes exit as MMIO */
    VMM_MEMORY_PRIVATE = 8,   /* set by vmm_vm_add_memory_file and vmm_vm_freeze_memory */
};

/*
 * Create `size` bytes of guest RAM at guest-physical address `gpa`, on a memfd of its own, mapped once. Nothing is
 * touched: memory the guest never writes costs nothing. Both numbers are multiples of 4 KiB (2 MiB with HUGE_2M).
 * *host points at the first byte and stays valid until vmm_vm_destroy. At most 32 regions.
 * -EEXIST: overlaps a region; -EINVAL: unaligned, empty or wrapping; -ENOMEM; -ENOSPC: too many regions.
 */
int vmm_vm_add_memory(vmm_vm *vm, uint64_t gpa, uint64_t size, uint32_t flags, void **host, int *memfd);

/*
 * The same from the content of a file at `offset` (a multiple of 4 KiB), which is never written: a page is the file's
 * until the guest or a device writes it, and is read when it is first looked at. The file must not change from now on,
 * nor shrink (a page behind its end is SIGBUS). `fd` stays the caller's. No server in another process (a share) sees
 * such memory. -EINVAL: also for flags, which must be 0, and for a file that is too short.
 */
int vmm_vm_add_memory_file(vmm_vm *vm, uint64_t gpa, uint64_t size, int fd, uint64_t offset, uint32_t flags,
                           void **host);

/* The file behind a region of memory, in the order they were added; the library's. -EINVAL: there is none such. */
int vmm_vm_memory_fd(vmm_vm *vm, uint32_t region);

/*
 * Freeze all memory as it is into one file per region, for other machines to start from; this one goes on with private
 * pages over them. *fds, room for each region, are the library's, and never written again: so no other process
 * may have been given them. Not twice, nor where memory is from a file (-EALREADY), nor in huge pages (-ENOTSUP). The
 * machine is paused or does not run.
 */
int vmm_vm_freeze_memory(vmm_vm *vm, int *fds);

/* The only way from a guest-physical range to a host pointer: NULL unless one region holds all of it. */
void *vmm_vm_gpa(vmm_vm *vm, uint64_t gpa, uint64_t size);

/* cdef: end */

#endif
