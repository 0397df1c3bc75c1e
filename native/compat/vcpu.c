/* SPDX-License-Identifier: Apache-2.0 */
/* Completion's KVM side: registers and bytes in, one pure completion, registers and events out. */
#include "vcpu.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

enum { DR6_BS = 0x4000 };

static bool load_xsave(void *opaque, void *area)
{
    struct compat_vcpu *compat = opaque;
    return vmm_engine_get(compat->vcpu->engine, VMM_STATE_XSAVE, area) == 0;
}

static bool store_xsave(void *opaque, const void *area)
{
    struct compat_vcpu *compat = opaque;
    return vmm_engine_set(compat->vcpu->engine, VMM_STATE_XSAVE, area) == 0;
}

static bool load_xcr0(void *opaque, uint64_t *xcr0)
{
    struct compat_vcpu *compat = opaque;
    struct kvm_xcrs xcrs;
    if (vmm_engine_get(compat->vcpu->engine, VMM_STATE_XCRS, &xcrs) != 0)
        return false;
    for (uint32_t i = 0; i < xcrs.nr_xcrs && i < KVM_MAX_XCRS; i++)
        if (xcrs.xcrs[i].xcr == 0) {
            *xcr0 = xcrs.xcrs[i].value;
            return true;
        }
    return false;
}

static bool load_msr(void *opaque, uint32_t index, uint64_t *value)
{
    struct compat_vcpu *compat = opaque;
    return vmm_vcpu_get_msrs(compat->vcpu, &index, value, 1) == 1;
}

/* KVM drops what it cached of the guest's page tables when a paging bit changes: change CR4.PGE and change it
 * back. */
static bool flush_tlb(void *opaque)
{
    struct compat_vcpu *compat = opaque;
    struct kvm_sregs sregs;
    if (vmm_engine_get(compat->vcpu->engine, VMM_STATE_SREGS, &sregs) != 0)
        return false;
    for (int i = 0; i < 2; i++) {
        sregs.cr4 ^= CR4_PGE;
        if (vmm_engine_set(compat->vcpu->engine, VMM_STATE_SREGS, &sregs) != 0)
            return false;
    }
    return true;
}

static void *guest_memory(void *opaque, uint64_t gpa, uint64_t size)
{
    struct compat_vcpu *compat = opaque;
    return vmm_vm_gpa(compat->vcpu->vm, gpa, size);
}

static void wrote_memory(void *opaque, const void *at, size_t n)
{
    const struct compat_vcpu *compat = opaque;
    vmm_vm_wrote(compat->vcpu->vm, at, n);
}

const struct completion_source kvm_completion_source = {
    .memory = guest_memory,
    .wrote = wrote_memory,
    .get_xsave = load_xsave,
    .set_xsave = store_xsave,
    .get_xcr0 = load_xcr0,
    .get_msr = load_msr,
    .flush_tlb = flush_tlb,
};

/* The guest's CPUID, as KVM has it: on some hosts it has more than was set. It does not change once the guest runs. */
static bool learn_cpuid(struct compat_vcpu *compat)
{
    static const struct {
        uint32_t function, index;
        size_t at;
    } words[N_CPUID_WORDS] = {
        [CPUID_1_ECX] = {1, 0, offsetof(struct kvm_cpuid_entry2, ecx)},
        [CPUID_1_EDX] = {1, 0, offsetof(struct kvm_cpuid_entry2, edx)},
        [CPUID_7_EBX] = {7, 0, offsetof(struct kvm_cpuid_entry2, ebx)},
        [CPUID_7_ECX] = {7, 0, offsetof(struct kvm_cpuid_entry2, ecx)},
        [CPUID_7_EDX] = {7, 0, offsetof(struct kvm_cpuid_entry2, edx)},
        [CPUID_D1_EAX] = {0xd, 1, offsetof(struct kvm_cpuid_entry2, eax)},
        [CPUID_80000001_ECX] = {0x80000001, 0, offsetof(struct kvm_cpuid_entry2, ecx)},
        [CPUID_80000001_EDX] = {0x80000001, 0, offsetof(struct kvm_cpuid_entry2, edx)},
        [CPUID_80000008_EBX] = {0x80000008, 0, offsetof(struct kvm_cpuid_entry2, ebx)},
    };
    enum { MOST = 256 };
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[MOST];
    } list = {.head.nent = MOST};
    if (compat->vcpu->engine->ops->get_cpuid(compat->vcpu->engine, &list.head) != 0)
        return false;
    for (uint32_t i = 0; i < list.head.nent && i < MOST; i++)
        for (unsigned w = 0; w < N_CPUID_WORDS; w++)
            if (list.entries[i].function == words[w].function && list.entries[i].index == words[w].index)
                memcpy(&compat->source.cpuid[w], (const char *)&list.entries[i] + words[w].at,
                       sizeof(uint32_t));
    return true;
}

/*
 * One KVM_RUN that comes straight back brings registers, segments and events together, for a third of what
 * the three ioctls cost; what completion_store() changes goes in with the guest's next entry. The core clears
 * immediate_exit and reads the requests before that entry, so a kick that arrives here is not lost.
 */
bool completion_load(struct compat_vcpu *compat, struct completion *c)
{
    struct kvm_run *run = compat->vcpu->run;
    if (!compat->knows_cpuid && !(compat->knows_cpuid = learn_cpuid(compat)))
        return false;
    uint32_t exit_reason = run->exit_reason;
    uint64_t valid = run->kvm_valid_regs; /* a trace has registers copied out as well */
    run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    bool stayed_out = compat->vcpu->engine->ops->run(compat->vcpu->engine) == -EINTR;
    __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    run->kvm_valid_regs = valid;
    run->exit_reason = exit_reason;
    *c = (struct completion){.source = &compat->source, .regs = run->s.regs.regs, .sregs = run->s.regs.sregs};
    return stayed_out;
}

size_t completion_fetch(struct completion *c, uint8_t bytes[INSN_MAX])
{
    const uint64_t linear = completion_linear_rip(c);
    size_t n = 0;
    while (n < INSN_MAX) {
        size_t in_page = 4096 - ((linear + n) & 4095), part = in_page < INSN_MAX - n ? in_page : INSN_MAX - n;
        uint64_t gpa;
        unsigned access = ACCESS_FETCH | (completion_cpl(c) == 3 ? ACCESS_USER : 0);
        if (linear_translate(c, linear + n, access, &gpa) != COMPLETE_DONE)
            break;
        const void *at = vmm_vm_gpa(((struct compat_vcpu *)c->source->opaque)->vcpu->vm, gpa, part);
        if (!at)
            break;
        memcpy(bytes + n, at, part);
        n += part;
    }
    return n;
}

/* The exception or interrupt a completion ends in, queued as KVM queues one whose delivery was cut short. */
static void queue_event(const struct completion *c, struct kvm_vcpu_events *events)
{
    if (c->event.software) {
        events->interrupt.injected = 1;
        events->interrupt.nr = c->event.vector;
        events->interrupt.soft = 1;
    } else {
        events->exception.injected = 1;
        events->exception.pending = 0;
        events->exception.nr = c->event.vector;
        events->exception.has_error_code = c->event.has_error;
        events->exception.error_code = c->event.error;
    }
}

static bool single_step_trap(struct compat_vcpu *compat, struct completion *c)
{
    struct kvm_debugregs debug;
    if (vmm_engine_get(compat->vcpu->engine, VMM_STATE_DEBUGREGS, &debug) != 0)
        return false;
    debug.dr6 |= DR6_BS;
    c->event.vector = V_DB;
    return vmm_engine_set(compat->vcpu->engine, VMM_STATE_DEBUGREGS, &debug) == 0;
}

bool completion_store(struct compat_vcpu *compat, struct completion *c, enum outcome outcome)
{
    struct kvm_run *run = compat->vcpu->run;
    struct kvm_sync_regs *sync = &run->s.regs;
    bool event = outcome == COMPLETE_FAULT || outcome == COMPLETE_TRAP;
    if (outcome == COMPLETE_DONE && c->regs.rflags & FLAG_TF) {
        if (!single_step_trap(compat, c))
            return false;
        event = true;
    }
    if (outcome == COMPLETE_FAULT) {
        c->regs.rflags |= FLAG_RF; /* SDM volume 3, 17.3.1.1: the image a fault pushes has RF set */
        if (c->event.vector == V_PF) {
            c->sregs.cr2 = c->event.address;
            c->sregs_changed = true;
        }
    }
    sync->regs = c->regs;
    run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    if (c->sregs_changed) {
        sync->sregs = c->sregs;
        run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
    }
    if (event || c->unmasks_nmi || sync->events.interrupt.shadow) {
        /* STI's and MOV SS's shadow ends with the instruction after them, which this was. */
        sync->events.flags = KVM_VCPUEVENT_VALID_SHADOW;
        sync->events.interrupt.shadow = 0;
        if (c->unmasks_nmi)
            sync->events.nmi.masked = 0;
        if (event)
            queue_event(c, &sync->events);
        run->kvm_dirty_regs |= KVM_SYNC_X86_EVENTS;
    }
    compat->vcpu->unsettled = true; /* a pause must first let these in */
    return true;
}

void completion_forget_exception(struct compat_vcpu *compat)
{
    struct kvm_run *run = compat->vcpu->run;
    memset(&run->s.regs.events.exception, 0, sizeof run->s.regs.events.exception);
    run->s.regs.events.flags = KVM_VCPUEVENT_VALID_SHADOW;
    run->kvm_dirty_regs |= KVM_SYNC_X86_EVENTS;
}
