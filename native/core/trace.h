/* SPDX-License-Identifier: Apache-2.0 */
/* The writers' side of the exit trace (vmmtrace.h). */
#ifndef VMM_CORE_TRACE_H
#define VMM_CORE_TRACE_H

#include "vmmtrace.h"

#include <stdatomic.h>
#include <stdbool.h>

#include <x86intrin.h>

/* A ring with one writer, and any number of readers that do not hold it up. Both count events ever written. */
struct vmm_trace {
    _Atomic uint64_t begun, done;
    uint32_t capacity;
    vmm_trace_event events[];
};

/* What a thread traces into. `on` is NULL while tracing is off; the ring lives as long as the machine. */
struct vmm_trace_point {
    _Atomic(struct vmm_trace *) on;
    struct vmm_trace *ring;
};

static inline struct vmm_trace *vmm_trace_on(struct vmm_trace_point *point)
{
    return atomic_load_explicit(&point->on, memory_order_acquire);
}

static inline void vmm_trace_put(struct vmm_trace *trace, const vmm_trace_event *event)
{
    uint64_t at = atomic_load_explicit(&trace->begun, memory_order_relaxed);
    atomic_store_explicit(&trace->begun, at + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release); /* the slot is known as taken before it changes */
    trace->events[at & (trace->capacity - 1)] = *event;
    atomic_store_explicit(&trace->done, at + 1, memory_order_release);
}

static inline uint32_t vmm_trace_ticks(uint64_t since)
{
    uint64_t ticks = __rdtsc() - since;
    return ticks < UINT32_MAX ? (uint32_t)ticks : UINT32_MAX;
}

struct vmm_vm;
struct vmm_vcpu;

/* RIP as KVM copied it out with the exit; 0: it did not. To be read before the exit is handled, which may move it. */
uint64_t vmm_trace_rip(struct vmm_vcpu *vcpu);

/* One exit of a vCPU that began at `tsc`; `record` is what was recorded of it, NULL: nothing. */
void vmm_trace_exit(struct vmm_trace *trace, struct vmm_vcpu *vcpu, uint64_t tsc, uint64_t rip,
                    const vmm_exit_record *record);

/* Something a device did (enum vmm_trace_kind), from any thread. */
void vmm_trace_io(struct vmm_vm *vm, uint16_t kind, uint32_t tag, uint64_t address, uint64_t value,
                  uint64_t since);

int vmm_trace_vcpu_init(struct vmm_vcpu *vcpu); /* a vCPU created while tracing is on traces too */
void vmm_trace_destroy(struct vmm_vm *vm);

#endif
