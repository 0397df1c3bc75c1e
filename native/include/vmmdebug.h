/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Debugging a guest: breakpoints, watchpoints, single-step.
 *
 * The library alone speaks KVM_SET_GUEST_DEBUG, and shares a vCPU's four debug registers between the debugger and
 * native/compat, which keeps the first two where it repairs SYSCALL. Points are the machine's: every vCPU has them.
 * While any is set the guest's own debug registers have no effect.
 *
 * What a vCPU runs into is an event. It stops the vCPU before it does anything more, holds every other, and makes
 * vmm_debug_fd readable. Whoever waits for that calls vmm_vm_pause, takes the event with vmm_debug_take, looks at
 * what it likes, and lets the machine go on with vmm_vm_resume.
 *
 * Everything here but vmm_debug_fd and vmm_debug_slots is to be called while no vCPU runs: -EBUSY otherwise.
 */
#ifndef VMMDEBUG_H
#define VMMDEBUG_H

#include "vmmcore.h"

/* cdef: begin */

enum vmm_debug_flags {
    /*
     * For hosts whose KVM emulates guest CPL 0 code, which sees no data breakpoint, and does not stop at CPL 3 at all.
     * A watchpoint then steps every instruction at CPL 0 and compares; CPL 3 is never stepped, and what an interrupt
     * taken there writes is seen from the next exit on.
     */
    VMM_DEBUG_WATCH_BY_STEP = 1,
};

/* Let debug events stop the machine rather than end its run. Again: the flags are the new ones. -ENOTSUP. */
int vmm_debug_open(vmm_vm *vm, uint32_t flags);

/* Take back all but software breakpoints, which are to be lifted before (-EBUSY): debug registers, steps, holds, events. */
int vmm_debug_close(vmm_vm *vm);

/* An eventfd that is readable while an event waits to be taken. */
int vmm_debug_fd(vmm_vm *vm);

enum vmm_debug_kind {
    VMM_DEBUG_NONE = 0,
    VMM_DEBUG_SOFTWARE = 1, /* an INT3 of ours */
    VMM_DEBUG_EXECUTE = 2,  /* the rest are debug registers */
    VMM_DEBUG_WRITE = 3,
    VMM_DEBUG_ACCESS = 4, /* read or written */
    VMM_DEBUG_STEP = 5,   /* an event only: one instruction was executed */
    VMM_DEBUG_COUNT = 6,  /* an event only: vmm_debug_stop_at's count was reached */
};

/*
 * Software breakpoints: INT3 in place of the byte at `gpa`, which *original gets. At most 4096. -EFAULT: not RAM;
 * -EEXIST; -ENOSPC. Lifting puts `byte` there unless the guest has written over the INT3. -ENOENT.
 */
int vmm_debug_plant(vmm_vm *vm, uint64_t gpa, uint8_t *original);
int vmm_debug_lift(vmm_vm *vm, uint64_t gpa, uint8_t byte);

/*
 * Debug registers: slots 0 to vmm_debug_slots() - 1. kind EXECUTE (size 1), WRITE or ACCESS (1, 2, 4 or 8 bytes,
 * aligned to their size) at a linear address; NONE clears. -EINVAL; -ENOTSUP: ACCESS with WATCH_BY_STEP.
 */
uint32_t vmm_debug_slots(vmm_vm *vm);
int vmm_debug_set_point(vmm_vm *vm, uint32_t slot, int kind, uint64_t linear, uint32_t size);

/*
 * One instruction, then an event, whenever this vCPU runs; interrupts wait where KVM can have them wait.
 * -ENOTSUP: it stands at CPL 3, which WATCH_BY_STEP says cannot be stepped.
 */
int vmm_debug_step(vmm_vcpu *vcpu, int on);

/*
 * Follow a vCPU to its end: step it, without events, and keep its registers before each instruction; the next
 * VMM_DEBUG_STEP comes after `steps` of them. Interrupts do not wait, and what they or exceptions enter is not stepped,
 * but goes on to its return. Taking an event of this vCPU, or 0, ends it. -ENOTSUP as vmm_debug_step.
 */
int vmm_debug_follow(vmm_vcpu *vcpu, uint64_t steps);

/* What vmm_debug_follow saw last: the registers the latest instruction began with; steps made. -ENOENT: nothing yet. */
int vmm_debug_followed(vmm_vcpu *vcpu, vmm_regs *regs, vmm_sregs *sregs, uint64_t *steps);

/* An event once this vCPU has recorded `count` exits in its life (vmm_vcpu_recorded); once, and 0: none. */
int vmm_debug_stop_at(vmm_vcpu *vcpu, uint64_t count);

/* A held vCPU stays where it is when the machine goes on. */
int vmm_debug_hold(vmm_vcpu *vcpu, int on);

typedef struct vmm_debug_event {
    uint32_t vcpu, kind;
    uint64_t address; /* linear: of the breakpoint, of what is watched, or of the next instruction */
} vmm_debug_event;

/*
 * The event that came first; 1, or 0: there is none. Another vCPU that stands before a breakpoint of its own, or has
 * made its step, will say so again when it runs; only what cannot be had again (a watchpoint) is kept for the next call.
 */
int vmm_debug_take(vmm_vm *vm, vmm_debug_event *event);

/* cdef: end */

#endif
