/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The SYSCALL repair.
 *
 * On the hosts concerned SYSCALL at CPL 3 sets RCX, R11, RFLAGS and RIP as it should but leaves CPL at 3. The
 * entry point is supervisor memory, so its fetch ends in the guest's #PF handler. A hardware breakpoint on
 * that handler's first instruction shows us each #PF before the guest sees it: one that is such a SYSCALL is
 * undone and the vCPU put where SYSCALL should have; any other is let go by completing the handler's first
 * instruction here, because KVM would hit the breakpoint again. LSTAR writes are filtered so that we know
 * when to look for the handler.
 */
#include "vcpu.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_SFMASK 0xc0000084u

enum { DR6_B0 = 1, DR7_L0_G0_EXACT = 0x702, PF_ERROR_USER = 4 };

/* What the processor pushes for #PF in 64-bit mode. */
struct page_fault_frame {
    uint64_t error, rip, cs, rflags, rsp, ss;
};

static bool guest_debug(struct compat_vcpu *compat, uint32_t control, uint64_t breakpoint)
{
    struct kvm_guest_debug debug = {.control = control};
    if (control & KVM_GUESTDBG_USE_HW_BP) {
        debug.arch.debugreg[0] = breakpoint;
        debug.arch.debugreg[7] = DR7_L0_G0_EXACT;
    }
    return ioctl(compat->vcpu->fd, KVM_SET_GUEST_DEBUG, &debug) == 0;
}

static bool arm(struct compat_vcpu *compat, uint64_t breakpoint)
{
    compat->stepping = false;
    compat->breakpoint = breakpoint;
    uint32_t control = breakpoint ? KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP : 0;
    return guest_debug(compat, control, breakpoint);
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

static uint64_t page_fault_entry(struct completion *c)
{
    uint64_t gate[2];
    uint64_t at = c->sregs.idt.base + V_PF * sizeof gate;
    if (!(c->sregs.efer & EFER_LMA) || c->sregs.idt.limit < (V_PF + 1) * sizeof gate - 1 ||
        !read_linear(c, at, gate, sizeof gate) || !(gate[0] >> 47 & 1))
        return 0;
    return (gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff0000u) | gate[1] << 32;
}

void syscall_repair_refresh(struct compat_vcpu *compat, struct completion *c)
{
    if (!compat->lstar)
        return;
    uint64_t entry = page_fault_entry(c);
    if (entry != compat->breakpoint || compat->stepping)
        arm(compat, entry);
}

/*
 * Is this #PF a SYSCALL's? A program that jumps to LSTAR by itself must not get in with an R11 of its choice:
 * SYSCALL has masked RFLAGS with SFMASK, a jump has not, and a program cannot clear IF, which every kernel
 * masks.
 */
static bool is_syscall(const struct compat_vcpu *compat, const struct completion *c,
                       const struct page_fault_frame *frame)
{
    const uint64_t ignored = FLAG_RF | 2;
    return frame->rip == compat->lstar && c->sregs.cr2 == compat->lstar && (frame->cs & 3) == 3 &&
           frame->error & PF_ERROR_USER &&
           ((frame->rflags ^ (c->regs.r11 & ~compat->sfmask)) & ~ignored) == 0;
}

/* SYSCALL's own description (SDM volume 2): flat CS and SS from STAR, RFLAGS masked; RCX and R11 are right
 * already. */
static void enter_kernel(const struct compat_vcpu *compat, struct completion *c, uint64_t user_rsp)
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
    c->regs.rip = compat->lstar;
    c->regs.rsp = user_rsp;
    c->regs.rflags = (c->regs.r11 & ~compat->sfmask & ~(uint64_t)FLAG_RF) | 2;
}

/* Let the handler's first instruction happen: completed here, or else single-stepped with the breakpoint off.
 */
static bool step_over(struct compat_vcpu *compat, struct completion *c)
{
    uint8_t bytes[INSN_MAX];
    size_t n = completion_fetch(c, bytes);
    enum outcome outcome = complete(c, bytes, n);
    if (outcome == COMPLETE_DONE)
        return completion_store(compat, c, outcome);
    compat->stepping = true;
    return guest_debug(compat, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, 0);
}

int compat_debug(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct compat_machine *machine = compat_of(vcpu);
    if (compat->stepping) /* wherever the step ended, an interrupt's entry included */
        return arm(compat, compat->breakpoint);
    const struct kvm_debug_exit_arch *debug = &vcpu->run->debug.arch;
    if (!compat->breakpoint || debug->exception != V_DB || !(debug->dr6 & DR6_B0))
        return 0;
    struct completion c;
    struct page_fault_frame frame;
    if (!completion_load(compat, &c))
        return 0;
    if (c.regs.rip != compat->breakpoint)
        return 0;
    if (page_fault_entry(&c) == compat->breakpoint && completion_cpl(&c) == 0 &&
        read_linear(&c, c.regs.rsp, &frame, sizeof frame) && is_syscall(compat, &c, &frame)) {
        enter_kernel(compat, &c, frame.rsp);
        if (!completion_store(compat, &c, COMPLETE_JUMPED))
            return 0;
        atomic_fetch_add_explicit(&machine->syscalls, 1, memory_order_relaxed);
        return 1;
    }
    atomic_fetch_add_explicit(&machine->faults, 1, memory_order_relaxed);
    return step_over(compat, &c);
}

int compat_wrmsr(struct vmm_vcpu *vcpu)
{
    struct compat_vcpu *compat = vcpu->compat;
    struct kvm_run *run = vcpu->run;
    uint32_t index = run->msr.index;
    uint64_t value = run->msr.data;
    uint64_t *kept = index == MSR_STAR     ? &compat->star
                     : index == MSR_LSTAR  ? &compat->lstar
                     : index == MSR_SFMASK ? &compat->sfmask
                                           : NULL;
    if (!kept)
        return 0;
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
    /* Denied writes exit to us: bits of STAR, LSTAR and SFMASK clear, CSTAR's set. */
    _Static_assert(MSR_LSTAR == MSR_STAR + 1 && MSR_SFMASK == MSR_STAR + 3,
                   "bit n of the bitmap is STAR + n");
    uint8_t allowed[1] = {1u << 2};
    struct kvm_msr_filter filter = {
        .flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
        .ranges[0] = {.flags = KVM_MSR_FILTER_WRITE, .nmsrs = 4, .base = MSR_STAR, .bitmap = allowed},
    };
    if (vmm_vm_check_extension(vm, KVM_CAP_SET_GUEST_DEBUG) <= 0)
        return vmm_error_set(-ENOTSUP, "the SYSCALL repair needs KVM_CAP_SET_GUEST_DEBUG");
    if (vmm_vm_enable_cap(vm, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, 0, 0, 0) != 0)
        return vmm_error_set(-ENOTSUP, "the SYSCALL repair needs KVM_CAP_X86_USER_SPACE_MSR");
    if (ioctl(vm->fd, KVM_X86_SET_MSR_FILTER, &filter) != 0)
        return vmm_error_set(-ENOTSUP, "the SYSCALL repair needs KVM_CAP_X86_MSR_FILTER");
    return 0;
}
