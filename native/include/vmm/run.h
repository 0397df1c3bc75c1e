/* SPDX-License-Identifier: Apache-2.0 */
/* Running vCPUs; stop, pause and resume. */
#ifndef VMM_API_RUN_H
#define VMM_API_RUN_H

#include "vmm/vcpu.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/* Why a run ended. The first reason given to a machine is the one it keeps. */
enum vmm_stop_reason {
    VMM_STOP_NONE = 0,
    VMM_STOP_HOST = 1,          /* the monitor asked (code: the caller's) */
    VMM_STOP_POWEROFF = 2,      /* the guest powered off */
    VMM_STOP_RESET = 3,         /* the guest asked for a reset */
    VMM_STOP_DEBUG_EXIT = 4,    /* isa-debug-exit (code: the value written) */
    VMM_STOP_PANIC = 5,         /* pvpanic (code: the event bits) */
    VMM_STOP_TRIPLE_FAULT = 6,  /* KVM_EXIT_SHUTDOWN */
    VMM_STOP_EMULATION = 7,     /* KVM_EXIT_INTERNAL_ERROR (code: suberror) */
    VMM_STOP_FAIL_ENTRY = 8,    /* KVM_EXIT_FAIL_ENTRY (code: hardware reason) */
    VMM_STOP_HALT = 9,          /* halted, and nothing can wake it */
    VMM_STOP_SYSTEM_EVENT = 10, /* KVM_EXIT_SYSTEM_EVENT (code: type) */
    VMM_STOP_UNKNOWN_EXIT = 11, /* an exit reason the loop has no answer to (code: reason) */
    VMM_STOP_RUN_FAILED = 12,   /* KVM_RUN itself failed (code: errno) */
    VMM_STOP_CALLBACK = 13,     /* a device's own code failed (an exception waits above) */
    VMM_STOP_DEBUG = 14,        /* KVM_EXIT_DEBUG that was not asked for (code: exception vector) */
    VMM_STOP_NO_BIOS = 16,      /* the guest called a BIOS, and there is none */
    VMM_STOP_MEMORY = 15,       /* guest memory that was still to come will not (vmmlazy.h) */
};

/*
 * Run a vCPU on the calling thread until the machine stops. All signals but the kick are blocked on that thread
 * from then on. A pause parks the thread inside this call. Returns the machine's vmm_stop_reason.
 */
int vmm_vcpu_run(vmm_vcpu *vcpu);

/* End the run: the first reason wins, every vCPU is kicked. Does not wait. Also for device ops. */
void vmm_vm_stop(vmm_vm *vm, int reason, uint64_t code);

/* What ended the run, which vCPU (UINT32_MAX: none in particular), and an eventfd that turns readable then. */
int vmm_vm_stop_reason(vmm_vm *vm, uint64_t *code, uint32_t *vcpu_id);
int vmm_vm_stop_fd(vmm_vm *vm);

/*
 * Pause: returns when no vCPU is inside KVM_RUN or a device op, with every exit's result written back, so that
 * registers and memory are consistent. Nests: resume as often. -EDEADLK: called from a device op on a vCPU thread.
 *
 * A device op may take as long as it likes. For callers that have to look up meanwhile (signals) vmm_vm_request_pause
 * asks only, and vmm_vm_await_pause waits at most `timeout_ms` (less than 0: as long as it takes): 1 once all stand, 0
 * not yet. A request that is given up is undone by vmm_vm_resume. -EBUSY: nothing was requested.
 */
int vmm_vm_pause(vmm_vm *vm);
int vmm_vm_request_pause(vmm_vm *vm);
int vmm_vm_await_pause(vmm_vm *vm, int timeout_ms);
int vmm_vm_resume(vmm_vm *vm);

/* Make the machine runnable again after every vmm_vcpu_run returned: forgets the stop reason. */
int vmm_vm_rearm(vmm_vm *vm);

/*
 * Stop with VMM_STOP_HALT once nothing can wake the machine: every vCPU is halted with interrupts off, and no NMI, SMI or
 * INIT can come. Found a second or more after the guest's last exit; where there is doubt, it runs on, as it does
 * while it is paused or a debugger is open. After each start; the I/O thread watches. -errno.
 * looks: how often the vCPUs were stopped, all together, to find out.
 */
int vmm_vm_watch_halt(vmm_vm *vm);
uint64_t vmm_vm_halt_looks(vmm_vm *vm);

/* cdef: end */

#endif
