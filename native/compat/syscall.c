/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The SYSCALL repair, and its relatives: how CPL 3 gets into the guest's kernel on hosts where that goes
 * wrong.
 *
 *   SYSCALL, 64-bit: RCX, R11, RFLAGS are right and RIP is LSTAR, but CPL stays 3. KVM is given another LSTAR than the
 *                    guest's, at which CPL 3 cannot execute: the fetch is a #PF, whatever the guest maps at its own.
 *                    Only where it is so (VMM_COMPAT_LSTAR): a SYSCALL that does reach CPL 0 must find its entry.
 *   SYSCALL, 32-bit: CPL is right, but RIP is CSTAR cut to 32 bits. Again a #PF, taken on the user's stack.
 *   INT n:           #UD; without paging, any instruction KVM's emulator lacks.
 *   hypercalls:      #UD, once KVM is kept from executing them for ever.
 *
 * Hardware breakpoints on the first instructions of the guest's #PF and #UD handlers show us each such
 * exception before the guest sees it. One that should not have been is undone; any other is let go by
 * completing the handler's first instruction here, because KVM would hit the breakpoint again. A guest without such a
 * handler is seen at KVM_EXIT_SHUTDOWN, which leaves the registers as they were at the instruction.
 *
 * The handlers are looked for when the MSRs are written (which is filtered), when an instruction was completed, and,
 * until there is one for #UD, at every exit. While breakpoints are armed, the guest's own debug registers have no effect.
 */
#include "vcpu.h"

#include <errno.h>
#include <linux/kvm_para.h>
#include <string.h>

#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_SFMASK 0xc0000084u

/*
 * What KVM has for LSTAR. PVM keeps the lowest 512 GiB of the upper half to itself: no guest's page tables make anything
 * there executable at CPL 3. Elsewhere it is an address that hardly any guest maps for CPL 3.
 */
#define NO_ENTRY 0xffff807ffffff000ull

enum { PF_ERROR_USER = 4 };

/* ---- where the guest's handlers are ---- */

/* Breakpoints on; or off, for one instruction. */
static bool arm(struct compat_vcpu *compat, bool on)
{
    struct vmm_vcpu_debug *debug = &compat->vcpu->debug;
    debug->reserved[0] = compat->page_fault_entry;
    debug->reserved[1] = compat->undefined_entry;
    debug->step_over = !on;
    return vmm_debug_apply(compat->vcpu) == 0;
}

/* The linear address of a handler's first instruction; 0: the guest has none that could be entered. */
static uint64_t handler_entry(struct completion *c, uint8_t vector)
{
    struct gate gate;
    uint64_t code;
    bool found;
    if (!(c->sregs.cr0 & CR0_PE) || gate_read(c, vector, &gate) != COMPLETE_DONE || !gate.present ||
        (gate.type != GATE_INTERRUPT && gate.type != GATE_TRAP))
        return 0;
    if (c->sregs.efer & EFER_LMA)
        return canonical(gate.entry) ? gate.entry : 0;
    if (descriptor_read(c, gate.selector, &code, &found) != COMPLETE_DONE || !found)
        return 0;
    return (uint32_t)(descriptor_segment(gate.selector, code).base + gate.entry);
}

void syscall_repair_refresh(struct compat_vcpu *compat, struct completion *c)
{
    const uint64_t page_fault = compat->lstar || compat->cstar ? handler_entry(c, V_PF) : 0;
    const uint64_t undefined = handler_entry(c, V_UD);
    compat->vcpu->look = !undefined;
    if (page_fault == compat->page_fault_entry && undefined == compat->undefined_entry &&
        !compat->vcpu->debug.step_over)
        return;
    compat->page_fault_entry = page_fault;
    compat->undefined_entry = undefined;
    arm(compat, true);
}

void compat_look(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct completion c = {.source = &compat->source};
    if (!vcpu->debug.step_over && vmm_engine_get(vcpu->engine, VMM_STATE_SREGS, &c.sregs) == 0 &&
        c.sregs.cr0 & CR0_PE)
        syscall_repair_refresh(compat, &c);
}

/* ---- undoing an exception ---- */

static unsigned frame_word(const struct completion *c)
{
    return c->sregs.efer & EFER_LMA ? 8 : 4;
}

/* Back to where the exception at whose handler's first instruction the vCPU is was raised, as an IRET there goes back. */
static bool undo(struct completion *c, bool has_error)
{
    c->regs.rsp += has_error ? frame_word(c) : 0;
    return interrupt_return(c, frame_word(c)) == COMPLETE_JUMPED;
}

/*
 * An instruction of CPL 3 that was #UD, done here. Where KVM runs CPL 3 on the processor, which is in long mode, only
 * INT n can be one that should not have been. UNKNOWN, and *c as it was: it is a #UD.
 */
static enum outcome redo_user(struct completion *c)
{
    struct completion user = *c;
    uint8_t bytes[INSN_MAX];
    struct insn insn;
    const size_t n = completion_fetch(&user, bytes);
    if (completion_cpl(&user) != 3 || !insn_decode(&insn, bytes, n, completion_mode(&user)))
        return COMPLETE_UNKNOWN;
    const bool int_n = insn.map == MAP_PRIMARY && insn.opcode == 0xcd;
    if (user.sregs.efer & EFER_LMA && !int_n)
        return COMPLETE_UNKNOWN;
    const enum outcome o = complete(&user, bytes, n);
    if (o == COMPLETE_UNKNOWN || (o == COMPLETE_FAULT && user.event.vector == V_UD))
        return COMPLETE_UNKNOWN;
    *c = user;
    return o;
}

/*
 * The kernel's hypercall (compat.c), with what KVM returns for a call that it does not know. It offers none on such a
 * host.
 */
static enum outcome redo_hypercall(struct completion *c)
{
    enum { LENGTH = 3, VMCALL = 0xc1, VMMCALL = 0xd9 };
    uint8_t bytes[INSN_MAX];
    if (completion_fetch(c, bytes) < LENGTH || bytes[0] != 0x0f || bytes[1] != 0x01 ||
        (bytes[2] != VMCALL && bytes[2] != VMMCALL))
        return COMPLETE_UNKNOWN;
    c->regs.rip += LENGTH;
    c->regs.rflags &= ~(uint64_t)FLAG_RF;
    c->regs.rax = (uint64_t)-KVM_ENOSYS;
    return COMPLETE_JUMPED;
}

static enum outcome repair_undefined(struct completion *c)
{
    struct completion before = *c;
    if (!undo(&before, false))
        return COMPLETE_UNKNOWN;
    const enum outcome o = completion_cpl(&before) == 3 ? redo_user(&before) : redo_hypercall(&before);
    if (o != COMPLETE_UNKNOWN)
        *c = before;
    return o;
}

/* ---- SYSCALL ---- */

/* SYSCALL's own description (SDM volume 2): flat CS and SS from STAR, RFLAGS masked; RCX and R11 are right
 * already. */
static void enter_kernel(const struct compat_vcpu *compat, struct completion *c, uint64_t entry,
                         uint64_t user_rsp)
{
    uint16_t selector = compat->star >> 32 & 0xfffc;
    c->sregs.cs = (struct kvm_segment){
        .selector = selector, .limit = 0xffffffff, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    c->sregs.ss = (struct kvm_segment){.selector = (uint16_t)(selector + 8),
                                       .limit = 0xffffffff,
                                       .type = 3,
                                       .present = 1,
                                       .db = 1,
                                       .s = 1,
                                       .g = 1};
    c->sregs_changed = true;
    c->regs.rip = entry;
    c->regs.rsp = user_rsp;
    c->regs.rflags = (c->regs.r11 & ~compat->sfmask & ~(uint64_t)FLAG_RF) | 2;
}

/* RFLAGS are as SYSCALL leaves them: a program that gets to the entry by itself may not choose R11. */
static bool flags_masked(const struct compat_vcpu *compat, const struct completion *c, uint64_t rflags)
{
    const uint64_t ignored = FLAG_RF | 2;
    return ((rflags ^ (c->regs.r11 & ~compat->sfmask)) & ~ignored) == 0;
}

/* RCX is behind a SYSCALL that CPL 3 may execute: a program that jumps to NO_ENTRY gets in as by that, or not at all. */
static bool behind_syscall(struct completion *c)
{
    enum { LENGTH = 2 };
    if (!canonical(c->regs.rcx)) /* SYSRET would fault in the kernel, on the program's stack */
        return false;
    for (unsigned i = 0; i < LENGTH; i++) {
        uint64_t gpa;
        if (linear_translate(c, c->regs.rcx - LENGTH + i, ACCESS_FETCH | ACCESS_USER, &gpa) != COMPLETE_DONE)
            return false;
        const uint8_t *at = c->source->memory(c->source->opaque, gpa, 1);
        if (!at || *at != (i ? 0x05 : 0x0f))
            return false;
    }
    return true;
}

/* The 64-bit SYSCALL whose #PF is not delivered, or no longer: the vCPU is at NO_ENTRY, at CPL 3. */
static bool enter_from_nowhere(const struct compat_vcpu *compat, struct completion *c)
{
    if (!(compat_of(compat->vcpu)->flags & VMM_COMPAT_LSTAR) || !compat->lstar || c->regs.rip != NO_ENTRY ||
        c->sregs.cr2 != NO_ENTRY || completion_cpl(c) != 3 || !(c->sregs.efer & EFER_LMA) ||
        !flags_masked(compat, c, c->regs.rflags) || !behind_syscall(c))
        return false;
    enter_kernel(compat, c, compat->lstar, c->regs.rsp);
    return true;
}

/* What the processor pushes for a #PF in 64-bit mode. */
struct page_fault_frame {
    uint64_t error, rip, cs, rflags, rsp, ss;
};

/* Is the #PF at whose handler the vCPU is a SYSCALL's? The 32-bit form's is from CPL 0, where no program gets by itself. */
static bool repair_syscall(const struct compat_vcpu *compat, struct completion *c)
{
    struct page_fault_frame frame;
    if (!(c->sregs.efer & EFER_LMA) || system_read(c, c->regs.rsp, &frame, sizeof frame) != COMPLETE_DONE ||
        c->sregs.cr2 != frame.rip)
        return false;
    if (frame.rip == NO_ENTRY && frame.error & PF_ERROR_USER) {
        struct completion user = *c;
        if (!undo(&user, true) || !enter_from_nowhere(compat, &user))
            return false;
        *c = user;
        return true;
    }
    if (!compat->cstar || frame.rip != (uint32_t)compat->cstar || frame.cs & 3 ||
        frame.error & PF_ERROR_USER || !flags_masked(compat, c, frame.rflags))
        return false;
    enter_kernel(compat, c, compat->cstar, frame.rsp);
    return true;
}

/* ---- exits ---- */

/* Let the handler's first instruction happen: completed here, or else single-stepped with the breakpoints
 * off. */
static bool step_over(struct compat_vcpu *compat, struct completion *c)
{
    uint8_t bytes[INSN_MAX];
    size_t n = completion_fetch(c, bytes);
    enum outcome outcome = complete(c, bytes, n);
    if (outcome == COMPLETE_DONE)
        return completion_store(compat, c, outcome);
    return arm(compat, false);
}

static bool repaired(struct compat_vcpu *compat, struct completion *c, enum outcome outcome)
{
    atomic_fetch_add_explicit(&compat_of(compat->vcpu)->syscalls, 1, memory_order_relaxed);
    return completion_store(compat, c, outcome);
}

int compat_debug(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct compat_machine *machine = compat_of(vcpu);
    if (vcpu->debug.step_over) /* wherever the step ended, an interrupt's entry included */
        return arm(compat, true);
    uint64_t at = vcpu->run->debug.arch.pc;
    bool page_fault = at == compat->page_fault_entry;
    if (!at || (!page_fault && at != compat->undefined_entry))
        return 0;
    struct completion c;
    if (!completion_load(compat, &c) || completion_linear_rip(&c) != at || completion_cpl(&c) != 0)
        return 0;
    const enum outcome outcome = !page_fault                  ? repair_undefined(&c)
                                 : repair_syscall(compat, &c) ? COMPLETE_JUMPED
                                                              : COMPLETE_UNKNOWN;
    if (outcome != COMPLETE_UNKNOWN)
        return repaired(compat, &c, outcome);
    atomic_fetch_add_explicit(&machine->faults, 1, memory_order_relaxed);
    if (vmm_debug_wants(vcpu, at))
        return 0;
    return step_over(compat, &c);
}

/*
 * Only an exception that could not be delivered is looked at, and it is forgotten: what is raised here instead and cannot
 * be delivered either ends the run.
 */
int compat_shutdown(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct completion c;
    if (!completion_load(compat, &c) || completion_cpl(&c) != 3 || !(c.sregs.cr0 & CR0_PE))
        return 0;
    if (vcpu->run->s.regs.events.interrupt.injected)
        return 0; /* it is this that was not delivered */
    const uint8_t vector = vcpu->run->s.regs.events.exception.nr;
    enum outcome outcome = COMPLETE_UNKNOWN;
    if (vector == V_PF)
        outcome = enter_from_nowhere(compat, &c) ? COMPLETE_JUMPED : COMPLETE_UNKNOWN;
    else if (vector == V_UD)
        outcome = redo_user(&c);
    if (outcome == COMPLETE_UNKNOWN)
        return 0;
    completion_forget_exception(compat);
    return repaired(compat, &c, outcome);
}

static uint64_t *kept_msr(struct compat_vcpu *compat, uint32_t index)
{
    return index == MSR_STAR     ? &compat->star
           : index == MSR_LSTAR  ? &compat->lstar
           : index == MSR_CSTAR  ? &compat->cstar
           : index == MSR_SFMASK ? &compat->sfmask
                                 : NULL;
}

uint64_t compat_msr_for_kvm(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value)
{
    const bool kept = index == MSR_LSTAR && compat_of(vcpu)->flags & VMM_COMPAT_LSTAR;
    return kept && value && canonical(value) ? NO_ENTRY : value; /* KVM is to refuse what is not canonical */
}

uint64_t compat_msr_for_guest(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value)
{
    const struct compat_vcpu *compat = vcpu->compat;
    return index == MSR_LSTAR && compat_of(vcpu)->flags & VMM_COMPAT_LSTAR ? compat->lstar : value;
}

void compat_msr_written(struct vmm_vcpu *vcpu, uint32_t index, uint64_t value)
{
    uint64_t *kept = kept_msr(vcpu->compat, index);
    if (kept)
        *kept = value;
}

void compat_loaded(struct vmm_vcpu *vcpu, const vmm_vcpu_state *state)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct completion c = {.source = &compat->source};
    memcpy(&c.regs, &state->regs, sizeof(c.regs));
    memcpy(&c.sregs, &state->sregs, sizeof(c.sregs));
    for (uint32_t i = 0; i < state->n_msrs; i++)
        compat_msr_written(vcpu, state->msrs[i].index, state->msrs[i].value);
    syscall_repair_refresh(compat, &c);
}

int compat_wrmsr(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct kvm_run *run = vcpu->run;
    uint32_t index = run->msr.index;
    uint64_t value = run->msr.data;
    if (!kept_msr(compat, index))
        return 0;
    vcpu->unsettled = true; /* KVM ends the instruction on the next entry */
    run->msr.error = vmm_vcpu_set_msrs(vcpu, &index, &value, 1) != 1; /* refused: #GP, as without us */
    if (run->msr.error)
        return 1;
    struct completion c;
    if (completion_load(compat, &c))
        syscall_repair_refresh(compat, &c);
    return 1;
}

int compat_rdmsr(struct vmm_vcpu *vcpu)
{
    const struct compat_vcpu *compat = vcpu->compat;
    struct kvm_run *run = vcpu->run;
    if (run->msr.index != MSR_LSTAR)
        return 0;
    run->msr.data = compat->lstar;
    run->msr.error = 0;
    vcpu->unsettled = true;
    return 1;
}

int syscall_repair_enable(struct vmm_vm *vm)
{
    /* Writes of these four exit to us, and reads of the one that is another's in KVM: a clear bit denies. */
    _Static_assert(MSR_LSTAR == MSR_STAR + 1 && MSR_SFMASK == MSR_STAR + 3, "one range of four");
    uint8_t none[1] = {0};
    struct kvm_msr_filter filter = {
        .flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
        .ranges[0] = {.flags = KVM_MSR_FILTER_WRITE, .nmsrs = 4, .base = MSR_STAR, .bitmap = none},
        .ranges[1] = {.flags = KVM_MSR_FILTER_READ, .nmsrs = 1, .base = MSR_LSTAR, .bitmap = none},
    };
    if (vmm_vm_check_extension(vm, KVM_CAP_SET_GUEST_DEBUG) <= 0)
        return vmm_error_set(-ENOTSUP, "the SYSCALL repair needs KVM_CAP_SET_GUEST_DEBUG");
    if (vmm_vm_enable_cap(vm, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, 0, 0, 0) != 0)
        return vmm_error_set(-ENOTSUP, "the SYSCALL repair needs KVM_CAP_X86_USER_SPACE_MSR");
    if (vm->engine->ops->filter_msrs(vm->engine, &filter) != 0)
        return vmm_error_set(-ENOTSUP, "the SYSCALL repair needs KVM_CAP_X86_MSR_FILTER");
    vm->debug.reserved = VMM_DEBUG_RESERVED;
    return 0;
}
