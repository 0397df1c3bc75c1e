/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory balloon (virtio 1.2, 5.5): the guest gives pages up, and the host has them back at once.
 *
 * A page is 4 KiB, by the device's definition. What the guest gives up is punched out of the memory's file, so that
 * neither this process nor the host keeps it; whoever touches the page afterwards, guest or monitor, gets zeroes. A
 * deflated page needs nothing: it comes back as it is touched. Page numbers have 32 bits: pages above 16 TiB cannot
 * be named, and stay with the guest. Numbers outside RAM are counted and otherwise ignored.
 *
 * F_PAGE_POISON and F_FREE_PAGE_HINT are not offered: a guest that poisons its free pages does not report them then.
 */
#ifndef VMMBALLOON_H
#define VMMBALLOON_H

#include "vmmvirtio.h"

/* cdef: begin */

/* ---- balloon ---- */

typedef struct vmm_balloon vmm_balloon;

enum vmm_balloon_flags {
    VMM_BALLOON_STATISTICS = 1, /* F_STATS_VQ: the guest tells of its memory when asked */
    VMM_BALLOON_DEFLATE_ON_OOM =
        2, /* F_DEFLATE_ON_OOM: the guest may take pages back before it kills a process */
    VMM_BALLOON_REPORTING =
        4, /* F_PAGE_REPORTING: the guest names free pages unasked, and may use them again */
};

/* After the machine's memory. -ENOTSUP: it is in pages of 2 MiB, of which single ones cannot be given back. */
int vmm_balloon_create(vmm_vm *vm, const char *name, uint32_t flags, vmm_balloon **out);
void vmm_balloon_destroy(vmm_balloon *balloon); /* after vmm_vm_destroy */
vmm_virtio *vmm_balloon_virtio(vmm_balloon *balloon);

/* Pages the guest is to give up: the register num_pages. -EINVAL: more than there are. */
int vmm_balloon_set_target(vmm_balloon *balloon, uint32_t pages);

typedef struct vmm_balloon_info {
    uint32_t target, actual;               /* pages; actual is what the guest wrote there */
    uint64_t inflated, deflated, reported; /* pages named, ever */
    uint64_t released;                     /* of them given back to the host (whole pages of RAM) */
    uint64_t refused;                      /* pages that are not RAM, or that the host would not take */
} vmm_balloon_info;
void vmm_balloon_get_info(vmm_balloon *balloon, vmm_balloon_info *info);

/* virtio 1.2, 5.5.6.4: value[tag] of each tag whose bit is set in `present`. `updates` counts the guest's answers. */
typedef struct vmm_balloon_memory {
    uint64_t value[16];
    uint32_t present;
    uint64_t updates;
} vmm_balloon_memory;
/*
 * Ask the guest for new numbers and wait for them. -ENOTSUP: no driver that agreed to give them; -ETIMEDOUT: none
 * came within timeout_ms, and *memory has the last that did.
 */
int vmm_balloon_ask(vmm_balloon *balloon, uint32_t timeout_ms, vmm_balloon_memory *memory);

/* cdef: end */

#endif
