/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The SYSCALL repair, and its relatives: how CPL 3 gets into the guest's kernel on hosts where that goes
 * wrong.
 *
 *   SYSCALL, 64-bit: RCX, R11, RFLAGS and RIP are right, but CPL stays 3. The entry point is supervisor memory,
 *                    so its fetch ends in the guest's #PF handler.
 *   SYSCALL, 32-bit: CPL is right, but RIP is CSTAR cut to 32 bits. Again a #PF, taken on the user's stack.
 *   INT n:           #UD.
 *   hypercalls:      #UD, once KVM is kept from executing them for ever.
 *
 * Hardware breakpoints on the first instructions of the guest's #PF and #UD handlers show us each such
 * exception before the guest sees it. One that should not have been is undone; any other is let go by
 * completing the handler's first instruction here, because KVM would hit the breakpoint again. Writes of the
 * MSRs are filtered, so that we know them and know when to look for the handlers. While armed, the guest's
 * own debug registers have no effect.
 */
#include "vcpu.h"

#include <errno.h>
#include <linux/kvm_para.h>
#include <string.h>

#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_SFMASK 0xc0000084u

enum { PF_ERROR_USER = 4 };

/* What the processor pushes for an exception in 64-bit mode, below an error code where there is one. */
struct exception_frame {
    uint64_t rip, cs, rflags, rsp, ss;
};

/* A gate of the 64-bit IDT, as far as it matters here. */
struct gate {
    uint64_t entry;
    uint16_t selector;
    uint8_t ist, type, dpl;
};
enum { GATE_INTERRUPT = 14, GATE_TRAP = 15 };

/* Breakpoints on; or off, for one instruction. */
static bool arm(struct compat_vcpu *compat, bool on)
{
    struct vmm_vcpu_debug *debug = &compat->vcpu->debug;
    debug->reserved[0] = compat->page_fault_entry;
    debug->reserved[1] = compat->undefined_entry;
    debug->step_over = !on;
    return vmm_debug_apply(compat->vcpu) == 0;
}

/* Supervisor memory read whatever the CPL, as exception delivery reads the IDT. */
static bool read_linear(struct completion *c, uint64_t linear, void *to, size_t n)
{
    for (size_t done = 0; done < n;) {
        size_t in_page = 4096 - ((linear + done) & 4095), part = in_page < n - done ? in_page : n - done;
        uint64_t gpa;
        if (linear_translate(c, linear + done, ACCESS_READ, &gpa) != COMPLETE_DONE)
            return false;
        const void *at = c->source->memory(c->source->opaque, gpa, part);
        if (!at)
            return false;
        memcpy((uint8_t *)to + done, at, part);
        done += part;
    }
    return true;
}

static bool read_gate(struct completion *c, unsigned vector, struct gate *gate)
{
    uint64_t raw[2];
    if (!(c->sregs.efer & EFER_LMA) || c->sregs.idt.limit < (vector + 1) * sizeof raw - 1 ||
        !read_linear(c, c->sregs.idt.base + vector * sizeof raw, raw, sizeof raw))
        return false;
    *gate = (struct gate){
        .entry = (raw[0] & 0xffff) | (raw[0] >> 32 & 0xffff0000u) | raw[1] << 32,
        .selector = raw[0] >> 16 & 0xffff,
        .ist = raw[0] >> 32 & 7,
        .type = raw[0] >> 40 & 15,
        .dpl = raw[0] >> 45 & 3,
    };
    return raw[0] >> 47 & 1 && (gate->type == GATE_INTERRUPT || gate->type == GATE_TRAP);
}

void syscall_repair_refresh(struct compat_vcpu *compat, struct completion *c)
{
    if (!compat->lstar)
        return;
    struct gate page_fault, undefined;
    uint64_t first = read_gate(c, V_PF, &page_fault) ? page_fault.entry : 0;
    uint64_t second = read_gate(c, V_UD, &undefined) ? undefined.entry : 0;
    if (first == compat->page_fault_entry && second == compat->undefined_entry &&
        !compat->vcpu->debug.step_over)
        return;
    compat->page_fault_entry = first;
    compat->undefined_entry = second;
    arm(compat, true);
}

/*
 * Is this #PF a SYSCALL's? A program that jumps to LSTAR by itself must not get in with an R11 of its choice:
 * SYSCALL has masked RFLAGS with SFMASK, a jump has not, and a program cannot clear IF, which every kernel
 * masks. The 32-bit form is at CPL 0 by then, where no program gets by itself.
 */
static bool is_syscall(const struct compat_vcpu *compat, const struct completion *c, uint64_t error,
                       const struct exception_frame *frame, uint64_t *entry)
{
    const uint64_t ignored = FLAG_RF | 2;
    bool user = (frame->cs & 3) == 3;
    *entry = user ? compat->lstar : compat->cstar;
    uint64_t reached = user ? compat->lstar : (uint32_t)compat->cstar;
    return *entry && frame->rip == reached && c->sregs.cr2 == reached && user == !!(error & PF_ERROR_USER) &&
           ((frame->rflags ^ (c->regs.r11 & ~compat->sfmask)) & ~ignored) == 0;
}

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

static bool repair_syscall(struct compat_vcpu *compat, struct completion *c)
{
    uint64_t error, entry;
    struct exception_frame frame;
    if (!read_linear(c, c->regs.rsp, &error, sizeof error) ||
        !read_linear(c, c->regs.rsp + sizeof error, &frame, sizeof frame) ||
        !is_syscall(compat, c, error, &frame, &entry))
        return false;
    enter_kernel(compat, c, entry, frame.rsp);
    return true;
}

static bool fetch_linear(struct completion *c, uint64_t linear, unsigned access, uint8_t *bytes, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        uint64_t gpa;
        if (linear_translate(c, linear + i, access, &gpa) != COMPLETE_DONE)
            return false;
        const uint8_t *at = c->source->memory(c->source->opaque, gpa, 1);
        if (!at)
            return false;
        bytes[i] = *at;
    }
    return true;
}

/*
 * A #UD that is the kernel's hypercall (compat.c): undone, with what KVM returns for a call that it does not know. It
 * offers none on such a host.
 */
static bool repair_hypercall(struct completion *c)
{
    enum { LENGTH = 3, VMCALL = 0xc1, VMMCALL = 0xd9 };
    struct exception_frame frame;
    uint8_t bytes[LENGTH];
    if (!read_linear(c, c->regs.rsp, &frame, sizeof frame) || frame.cs != c->sregs.cs.selector ||
        !fetch_linear(c, frame.rip, ACCESS_FETCH, bytes, LENGTH) || bytes[0] != 0x0f || bytes[1] != 0x01 ||
        (bytes[2] != VMCALL && bytes[2] != VMMCALL))
        return false;
    c->regs.rip = frame.rip + LENGTH;
    c->regs.rsp = frame.rsp;
    c->regs.rflags = frame.rflags & ~(uint64_t)FLAG_RF;
    c->regs.rax = (uint64_t)-KVM_ENOSYS;
    return true;
}

/*
 * A #UD that is CPL 3's INT n: its frame lies where INT n's would and differs in RIP and RF, so it is put
 * right in place and the other gate's handler entered. A gate that CPL 3 may not use stays a #UD.
 */
static bool repair_int(struct completion *c)
{
    enum { INT_N = 0xcd, LENGTH = 2 };
    struct exception_frame frame;
    struct gate undefined, gate;
    if (!read_linear(c, c->regs.rsp, &frame, sizeof frame) || (frame.cs & 3) != 3)
        return false;
    uint8_t bytes[LENGTH];
    if (!fetch_linear(c, frame.rip, ACCESS_FETCH | ACCESS_USER, bytes, LENGTH))
        return false;
    if (bytes[0] != INT_N || !read_gate(c, V_UD, &undefined) || !read_gate(c, bytes[1], &gate) ||
        gate.dpl != 3 || gate.ist || undefined.ist || gate.selector != undefined.selector)
        return false;
    frame.rip += LENGTH;
    frame.rflags &= ~(uint64_t)FLAG_RF;
    struct span span;
    if (linear_span(c, c->regs.rsp, sizeof frame, ACCESS_WRITE, &span) != COMPLETE_DONE)
        return false;
    span_write(&span, 0, &frame, sizeof frame);
    c->regs.rip = gate.entry;
    c->regs.rflags &= ~(uint64_t)(FLAG_IF | FLAG_RF);
    if (gate.type == GATE_TRAP)
        c->regs.rflags |= frame.rflags & FLAG_IF;
    return true;
}

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
    if (!completion_load(compat, &c) || c.regs.rip != at || completion_cpl(&c) != 0)
        return 0;
    if (page_fault ? repair_syscall(compat, &c) : repair_int(&c) || repair_hypercall(&c)) {
        atomic_fetch_add_explicit(&machine->syscalls, 1, memory_order_relaxed);
        return completion_store(compat, &c, COMPLETE_JUMPED);
    }
    atomic_fetch_add_explicit(&machine->faults, 1, memory_order_relaxed);
    if (vmm_debug_wants(vcpu, at))
        return 0;
    return step_over(compat, &c);
}

static uint64_t *kept_msr(struct compat_vcpu *compat, uint32_t index)
{
    return index == MSR_STAR     ? &compat->star
           : index == MSR_LSTAR  ? &compat->lstar
           : index == MSR_CSTAR  ? &compat->cstar
           : index == MSR_SFMASK ? &compat->sfmask
                                 : NULL;
}

void compat_loaded(struct vmm_vcpu *vcpu, const vmm_vcpu_state *state)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct completion c = {.source = &compat->source};
    memcpy(&c.regs, &state->regs, sizeof(c.regs));
    memcpy(&c.sregs, &state->sregs, sizeof(c.sregs));
    for (uint32_t i = 0; i < state->n_msrs; i++)
        if (kept_msr(compat, state->msrs[i].index))
            *kept_msr(compat, state->msrs[i].index) = state->msrs[i].value;
    if (compat->lstar) {
        syscall_repair_refresh(compat, &c);
    } else if (compat->page_fault_entry || compat->undefined_entry) {
        compat->page_fault_entry = compat->undefined_entry = 0;
        arm(compat, true);
    }
}

int compat_wrmsr(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct kvm_run *run = vcpu->run;
    uint32_t index = run->msr.index;
    uint64_t value = run->msr.data;
    uint64_t *kept = kept_msr(compat, index);
    if (!kept)
        return 0;
    vcpu->unsettled = true; /* KVM ends the instruction on the next entry */
    run->msr.error = vmm_vcpu_set_msrs(vcpu, &index, &value, 1) != 1; /* refused: #GP, as without us */
    if (run->msr.error)
        return 1;
    *kept = value;
    struct completion c;
    if (completion_load(compat, &c))
        syscall_repair_refresh(compat, &c);
    return 1;
}

int syscall_repair_enable(struct vmm_vm *vm)
{
    /* Writes of these four exit to us: a clear bit denies. */
    _Static_assert(MSR_LSTAR == MSR_STAR + 1 && MSR_SFMASK == MSR_STAR + 3, "one range of four");
    uint8_t allowed[1] = {0};
    struct kvm_msr_filter filter = {
        .flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
        .ranges[0] = {.flags = KVM_MSR_FILTER_WRITE, .nmsrs = 4, .base = MSR_STAR, .bitmap = allowed},
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
