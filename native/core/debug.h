/* SPDX-License-Identifier: Apache-2.0 */
/* What the run loop, compat and the debugger say to the owner of KVM_SET_GUEST_DEBUG. */
#ifndef VMM_CORE_DEBUG_H
#define VMM_CORE_DEBUG_H

#include "vmmdebug.h"

#include <stdbool.h>

enum { VMM_DEBUG_REGISTERS = 4, VMM_DEBUG_RESERVED = 2 };

struct vmm_debug_point {
    uint64_t linear, last; /* last: the watched value as it was, for WATCH_BY_STEP */
    uint8_t kind, size;
};

/* Of a machine. Written while no vCPU runs (`pending` under vm->lock), so vCPUs read it without a lock. */
struct vmm_debug {
    bool open;
    uint32_t flags, controls; /* controls: what KVM_SET_GUEST_DEBUG takes here */
    int fd;                   /* 0: none yet */
    uint32_t reserved;        /* debug registers that compat keeps: 0 or VMM_DEBUG_RESERVED */
    struct vmm_debug_point points[VMM_DEBUG_REGISTERS];
    uint64_t *planted; /* guest-physical addresses, ascending */
    uint32_t n_planted, room;
    uint64_t events;  /* ever */
    uint32_t pending; /* events not taken: while there are any, no vCPU runs */
};

/* Of a vCPU. */
struct vmm_vcpu_debug {
    uint64_t reserved[VMM_DEBUG_RESERVED]; /* compat's breakpoints; 0: none */
    bool step_over;                        /* compat: one instruction with every breakpoint off */
    bool step, held, user;                 /* user: at CPL 3 when last looked */
    uint64_t follow, followed; /* steps still to be kept without an event, and made; 0: not followed */
    bool known;                /* whether what follows holds something */
    vmm_regs regs;             /* before the latest instruction of those */
    vmm_sregs sregs;
    uint64_t stop_at;      /* exits recorded; 0: none */
    vmm_debug_event event; /* kind NONE: none */
    uint64_t order;        /* of events */
};

struct vmm_vcpu;
struct vmm_vm;

/* Give KVM what this vCPU's debug state asks for. On the vCPU's thread, or while it does not run. 0 or -errno. */
int vmm_debug_apply(struct vmm_vcpu *vcpu);

/* The debugger wants to see an execution of `linear`. */
bool vmm_debug_wants(const struct vmm_vcpu *vcpu, uint64_t linear);

/* Exits that compat did not claim: 1: the vCPU may re-enter (and will find a request if an event was made of it). */
int vmm_debug_exit(struct vmm_vcpu *vcpu);
int vmm_debug_int3(struct vmm_vcpu *vcpu);

/* The count of vmm_debug_stop_at is reached. */
void vmm_debug_counted(struct vmm_vcpu *vcpu);

/* compat has done an instruction itself: that was a step. */
void vmm_debug_completed(struct vmm_vcpu *vcpu);

/* Whether this vCPU is to stay parked; under vm->lock. */
bool vmm_debug_parked(const struct vmm_vcpu *vcpu);

void vmm_debug_rearm(struct vmm_vm *vm); /* under vm->lock */
void vmm_debug_deinit(struct vmm_vm *vm);

#endif
