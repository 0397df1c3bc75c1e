/* SPDX-License-Identifier: Apache-2.0 */
/* What the exit trace costs in pyvmm itself, without KVM: its branch while off, an event while on. Used by trace.py. */
#include "core/core.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { EVENTS = 2000000, ROUNDS = 20, CAPACITY = 1 << 18 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* What handle_exit in run.c does around an exit. */
__attribute__((noinline)) static void one_exit(struct vmm_vcpu *vcpu, const vmm_exit_record *record)
{
    struct vmm_trace *trace = vmm_trace_on(&vcpu->trace);
    if (__builtin_expect(trace != NULL, 0))
        vmm_trace_exit(trace, vcpu, __rdtsc(), vmm_trace_rip(vcpu), record);
}

static double least(struct vmm_vcpu *vcpu, bool on)
{
    const vmm_exit_record record = {
        .address = 0x3f8, .value = 'H', .reason = KVM_EXIT_IO, .size = 1, .write = 1, .count = 1};
    double found = 1e9;
    atomic_store(&vcpu->trace.on, on ? vcpu->trace.ring : NULL);
    for (int round = 0; round < ROUNDS; round++) {
        double began = now();
        for (int i = 0; i < EVENTS; i++) {
            one_exit(vcpu, &record);
            __asm__ volatile("" ::: "memory");
        }
        double each = (now() - began) / EVENTS;
        found = each < found ? each : found;
    }
    return found;
}

int main(void)
{
    static struct vmm_vm vm = {.sync_regs = true};
    static struct vmm_vcpu vcpu = {.vm = &vm};
    vcpu.run = calloc(1, 3 * 4096);
    vcpu.trace.ring = calloc(1, sizeof(struct vmm_trace) + (size_t)CAPACITY * sizeof(vmm_trace_event));
    vcpu.run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    vcpu.trace.ring->capacity = CAPACITY;
    double off = least(&vcpu, false), on = least(&vcpu, true);
    printf("%.2f %.2f\n", off, on);
    return 0;
}
