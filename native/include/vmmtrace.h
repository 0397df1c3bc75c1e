/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The exit trace: what each vCPU did, and the I/O thread with its devices, as it happens.
 *
 * One ring a thread, with one writer that never waits: whoever reads too slowly loses the oldest events and is
 * told how many. Off, it is one predicted branch an exit. On, an event costs two reads of the TSC and a store of
 * one cache line, and KVM copies the general registers out with each exit (KVM_CAP_SYNC_REGS).
 */
#ifndef VMMTRACE_H
#define VMMTRACE_H

#include "vmmcore.h"

/* cdef: begin */

enum vmm_trace_kind {
    /* 0..63: a vCPU's exit, by KVM's exit reason */
    VMM_TRACE_DOORBELL = 64,  /* I/O thread: a driver rang; address: queue */
    VMM_TRACE_INTERRUPT = 65, /* a device interrupted; address: queue, or UINT64_MAX for its configuration */
    VMM_TRACE_REQUESTS = 66,  /* I/O thread: a doorbell was served; address: queue, value: requests taken */
};

typedef struct vmm_trace_event {
    uint64_t tsc;     /* when: the host's time stamp counter (vmm_trace_clock) */
    uint64_t rip;     /* of the guest; 0 where there is none. An OUT may be past already on some hosts */
    uint64_t address; /* as in vmm_exit_record */
    uint64_t value;
    uint32_t duration; /* TSC ticks from KVM_RUN's return to the end of handling; UINT32_MAX: longer */
    uint32_t tag;      /* of the range that answered; of a virtio device (vmm_virtio_set_tag) */
    uint32_t count;
    uint16_t kind; /* enum vmm_trace_kind */
    uint16_t vcpu; /* UINT16_MAX: the I/O thread */
    uint16_t size;
    uint8_t write, claimed;
    uint8_t reserved[12]; /* zero */
} vmm_trace_event;

/*
 * Begin; may be called while vCPUs run. `capacity` events are kept for each thread: a power of two, 64 to 2^24.
 * A second call goes on with the rings there are. -EINVAL; -ENOMEM.
 */
int vmm_trace_start(vmm_vm *vm, uint32_t capacity);
void vmm_trace_stop(vmm_vm *vm); /* what was traced can still be read */

/*
 * Copy events of one thread (vcpu: its number, UINT32_MAX: the I/O thread) from *position on, oldest first; at most
 * `max`. Returns how many; *position moves behind them, *lost grows by those that were overwritten before.
 */
uint32_t vmm_trace_read(vmm_vm *vm, uint32_t vcpu, uint64_t *position, vmm_trace_event *events, uint32_t max,
                        uint64_t *lost);

/* The TSC and CLOCK_MONOTONIC, in nanoseconds, at one moment: two such pairs make one from the other. */
void vmm_trace_clock(uint64_t *tsc, uint64_t *ns);

/* cdef: end */

#endif
