/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The I/O thread of a machine: waits for file descriptors and calls their owners. It starts with the first
 * source and ends in vmm_vm_destroy, before memory goes. An idle source costs nothing.
 */
#ifndef VMM_CORE_LOOP_H
#define VMM_CORE_LOOP_H

#include "core/core.h"

typedef struct vmm_loop vmm_loop;

/* Embedded in what owns the descriptor; valid until removed and the loop has been seen outside (loop_sync). */
struct vmm_source {
    int fd;
    void (*ready)(struct vmm_source *source, uint32_t events); /* EPOLLIN, EPOLLOUT, EPOLLHUP, EPOLLERR */
    void *opaque;
    _Atomic bool live;
};

/* The machine's loop; created on first use. NULL: no memory or descriptors (vmm_error_text). */
vmm_loop *vmm_vm_loop(struct vmm_vm *vm);

/* Watch for `events` (level-triggered). -errno as epoll_ctl has it. */
int vmm_loop_add(vmm_loop *loop, struct vmm_source *source, uint32_t events);
int vmm_loop_modify(vmm_loop *loop, struct vmm_source *source, uint32_t events);
/* No call begins after this; one may be in progress on the I/O thread. The descriptor stays the caller's. */
void vmm_loop_remove(vmm_loop *loop, struct vmm_source *source);
/* Wait until no call that began before is in progress. Not from the I/O thread, not with a lock a handler takes. */
void vmm_loop_sync(vmm_loop *loop);

/* Park the I/O thread between two calls, and let it go on; nests. From the I/O thread: nothing. vmm_loop_pause asks,
 * and waits as long as it takes; vmm_loop_await_pause waits `until` then (vmm_deadline; NULL: no end) and returns
 * whether the thread is parked. */
void vmm_loop_pause(vmm_loop *loop);
void vmm_loop_request_pause(vmm_loop *loop);
bool vmm_loop_await_pause(vmm_loop *loop, const struct timespec *until);
void vmm_loop_resume(vmm_loop *loop);

/* Is this the I/O thread? */
bool vmm_loop_current(const vmm_loop *loop);

/* Call `active` after each batch of events that begins while VMM_REQUEST_WATCH is set. Before it is set first. */
void vmm_loop_on_activity(vmm_loop *loop, void (*active)(struct vmm_vm *vm));

/* Ends the thread; sources are forgotten. */
void vmm_loop_destroy(vmm_loop *loop);

#endif
