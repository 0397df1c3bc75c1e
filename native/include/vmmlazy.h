/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lazy guest memory, filled on demand through userfaultfd: from a snapshot, or from a machine that is being migrated here.
 *
 * Pages are marked as wanted. A thread that touches one - a vCPU, KVM on its behalf, a device, this process - waits until it
 * is installed, and goes on as if it had always been there. A page that is missing and not wanted is zeros. A thread
 * of its own answers; where pages come from:
 *
 * - a file (vmm_lazy_from_file), read as needed;
 * - a stream socket (vmm_lazy_connect). Request, 8 bytes: the page's guest-physical address. Answer, 16 bytes: that
 *   address, 4 bytes of what follows (0: nothing, the page is zeros; 1: its 4096 bytes), 4 bytes of zeros. All
 *   little-endian. Returns come in any order, and pages may be sent that nobody asked for. The socket is closed when
 *   every page is here.
 *
 * A page is installed once. Once no page is wanted any more, memory is memory: nothing of this is left in its way.
 * Each machine has at most one, which ends with it. Not for memory in huge pages or from a file, nor where a server in
 * another process maps it (a share). Every function may be called from any thread.
 */
#ifndef VMMLAZY_H
#define VMMLAZY_H

#include "vmmcore.h"

/* cdef: begin */

typedef struct vmm_lazy vmm_lazy;

enum vmm_lazy_state {
    VMM_LAZY_IDLE = 0, /* not started */
    VMM_LAZY_SERVING = 1,
    VMM_LAZY_LOST = 2,      /* the source failed: faults wait for vmm_lazy_connect, _abandon, or a stop */
    VMM_LAZY_DONE = 3,      /* every page is here */
    VMM_LAZY_ABANDONED = 4, /* pages are missing for good; the machine was stopped */
};

/*
 * For all memory the machine has now; its memory is as before until the start. -EPERM: the host does not let this
 * process serve faults of the kernel, on which KVM depends (vmm_error_text says what to change); -ENOSYS: no userfaultfd;
 * -ENOTSUP: memory of another kind; -EEXIST: there is one already.
 */
int vmm_lazy_create(vmm_vm *vm, vmm_lazy **out);

/* Before the start. Mark the pages of a region's bitmap (vmmsnapshot.h) as wanted; what memory has there is dropped. */
int vmm_lazy_want(vmm_lazy *lazy, uint32_t region, const uint64_t *bitmap);

/* Before the start: a region's pages lie in a file, from `offset` on. `fd` stays the caller's and may be closed. */
int vmm_lazy_from_file(vmm_lazy *lazy, uint32_t region, int fd, uint64_t offset);

/* From now on touching a wanted page waits. -EBUSY: it was started. */
int vmm_lazy_start(vmm_lazy *lazy);

/* Pages come from this stream socket, instead of what was before; what is waited for is asked for again. `fd` stays the
 * caller's and may be closed. -EBUSY: done, or abandoned. */
int vmm_lazy_connect(vmm_lazy *lazy, int fd);

/* Fetch these pages in this order while no fault waits: those a machine of this snapshot touched first, last time. Once.
 * Addresses outside memory are skipped. -EEXIST: a list was given; -ENOMEM. */
int vmm_lazy_prefetch(vmm_lazy *lazy, const uint64_t *gpas, size_t n);

/* And then all others. Without this a page comes when it is touched, or never. */
void vmm_lazy_fetch_rest(vmm_lazy *lazy);

/* An eventfd: readable after each change of state. */
int vmm_lazy_fd(vmm_lazy *lazy);

int vmm_lazy_state(vmm_lazy *lazy); /* enum vmm_lazy_state */

/* Until every page is here (1), pages are missing for good (-ECANCELED), or the time is up (0; ms, -1: for ever). A source
 * that was lost is waited for. */
int vmm_lazy_wait(vmm_lazy *lazy, int timeout_ms);

/*
 * Stop the machine with VMM_STOP_MEMORY, if it has not stopped, since the pages will not come; `why` is its message
 * (NULL: none). Pending faults resolve to zero pages: vCPUs execute nothing any more, but a device may finish the
 * request that it is at with them. Idempotent.
 */
void vmm_lazy_abandon(vmm_lazy *lazy, const char *why);

/* Wanted pages in the order in which they were touched (fetched unasked: not in it). Returns how many there are; the first
 * `max` are copied. */
size_t vmm_lazy_order(vmm_lazy *lazy, uint64_t *gpas, size_t max);

typedef struct vmm_lazy_stats {
    uint64_t wanted;   /* pages marked */
    uint64_t missing;  /* of these, not here yet */
    uint64_t faults;   /* times that somebody touched a page that was not here */
    uint64_t unasked;  /* pages that came before they were touched */
    uint64_t repeated; /* pages that came although they were here */
    uint64_t fault_ns; /* time from reading a fault to installing its page, all together; file only */
} vmm_lazy_stats;
void vmm_lazy_get_stats(vmm_lazy *lazy, vmm_lazy_stats *stats);

/* cdef: end */

#endif
