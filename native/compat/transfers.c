/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transfers of control between segments and privilege levels: software interrupts, and the returns IRET and RETF (Intel
 * SDM volume 2; volume 3, 5.8 and 6.12). Virtual-8086 mode, task switches and shadow stacks are not completed.
 */
#include "compat.h"

#include <string.h>

/* Delivered by KVM, which checks no gate's DPL. `software`: INT n, not an exception. */
static enum outcome software_interrupt(struct completion *c, uint8_t vector, bool software)
{
    if (c->regs.rflags & FLAG_VM)
        return COMPLETE_UNKNOWN;
    if (c->sregs.cr0 & CR0_PE) {
        const uint32_t error = (uint32_t)vector << 3 | 2; /* of the IDT */
        struct gate gate;
        const enum outcome o = gate_read(c, vector, &gate);
        if (o != COMPLETE_DONE)
            return o;
        if (!gate.valid || gate.dpl < completion_cpl(c))
            return fault_error(c, V_GP, error);
        if (!gate.present)
            return fault_error(c, V_NP, error);
    }
    c->event.vector = vector;
    c->event.software = software;
    return COMPLETE_TRAP;
}

enum outcome complete_int3(struct completion *c)
{
    return software_interrupt(c, V_BP, false);
}

enum outcome complete_int(struct completion *c)
{
    return software_interrupt(c, (uint8_t)c->insn.immediate, true);
}

/* INT1 is delivered as the exception is: no gate's DPL counts, and DR6 stays as it is. */
enum outcome complete_int1(struct completion *c)
{
    c->event.vector = V_DB;
    return COMPLETE_TRAP;
}

enum outcome complete_into(struct completion *c)
{
    if (c->insn.long_mode)
        return fault(c, V_UD);
    return c->regs.rflags & FLAG_OF ? software_interrupt(c, V_OF, false) : COMPLETE_DONE;
}

/* n bytes of the stack, from `offset` bytes above its pointer. */
static enum outcome stack_read(struct completion *c, uint64_t offset, void *to, size_t n)
{
    const struct kvm_segment *ss = &c->sregs.ss;
    uint64_t linear = c->regs.rsp + offset;
    if (completion_mode(c) == CPU_64) {
        if (!canonical(linear) || !canonical(linear + n - 1))
            return fault_error(c, V_SS, 0);
    } else {
        linear &= ss->db ? 0xffffffff : 0xffff;
        if (ss->unusable || ss->type & 4)
            return COMPLETE_UNKNOWN; /* expand-down */
        if (linear > ss->limit || n - 1 > ss->limit - linear)
            return fault_error(c, V_SS, 0);
        linear = (uint32_t)(ss->base + linear);
    }
    struct span span;
    const enum outcome o = linear_span(c, linear, n, ACCESS_READ, &span);
    if (o == COMPLETE_DONE)
        span_read(&span, 0, to, n);
    return o;
}

/* `count` operands of `size` bytes each. */
static enum outcome stack_words(struct completion *c, uint64_t offset, unsigned size, unsigned count,
                                uint64_t *words)
{
    uint8_t raw[3 * 8];
    const enum outcome o = stack_read(c, offset, raw, (size_t)size * count);
    for (unsigned i = 0; o == COMPLETE_DONE && i < count; i++) {
        words[i] = 0;
        memcpy(&words[i], raw + (size_t)size * i, size);
    }
    return o;
}

/* The code segment returned to. */
static enum outcome return_code(struct completion *c, uint16_t selector, uint64_t rip, struct kvm_segment *cs)
{
    const unsigned rpl = selector & 3;
    const bool long_mode = c->sregs.efer & EFER_LMA;
    uint64_t descriptor;
    bool found;
    if (!(selector & ~3u))
        return fault_error(c, V_GP, 0);
    enum outcome o = descriptor_read(c, selector, &descriptor, &found);
    if (o != COMPLETE_DONE)
        return o;
    *cs = descriptor_segment(selector, descriptor);
    cs->l = cs->l && long_mode;
    const bool conforming = cs->type & 4;
    if (!found || !cs->s || !(cs->type & 8) || rpl < completion_cpl(c) || (cs->l && cs->db) ||
        (conforming ? cs->dpl > rpl : cs->dpl != rpl))
        return fault_error(c, V_GP, selector & ~3u);
    if (!cs->present)
        return fault_error(c, V_NP, selector & ~3u);
    if (cs->l ? !canonical(rip) : rip > cs->limit)
        return fault_error(c, V_GP, 0);
    return descriptor_mark_accessed(c, cs);
}

/* The stack segment returned to, beside that code segment. */
static enum outcome return_stack(struct completion *c, uint16_t selector, const struct kvm_segment *cs,
                                 struct kvm_segment *ss)
{
    const unsigned rpl = cs->selector & 3;
    uint64_t descriptor;
    bool found;
    if (!(selector & ~3u)) {
        if (!cs->l || rpl == 3)
            return fault_error(c, V_GP, 0);
        *ss = (struct kvm_segment){.selector = selector, .dpl = (uint8_t)rpl, .unusable = 1};
        return COMPLETE_DONE;
    }
    const enum outcome o = descriptor_read(c, selector, &descriptor, &found);
    if (o != COMPLETE_DONE)
        return o;
    *ss = descriptor_segment(selector, descriptor);
    ss->l = 0;
    if (!found || (selector & 3u) != rpl || !ss->s || ss->type & 8 || !(ss->type & 2) || ss->dpl != rpl)
        return fault_error(c, V_GP, selector & ~3u);
    if (!ss->present)
        return fault_error(c, V_SS, selector & ~3u);
    return descriptor_mark_accessed(c, ss);
}

/* Data segments that the outer level may not use are not left to it. */
static void drop_inner_segments(struct completion *c)
{
    struct kvm_segment *const segments[] = {&c->sregs.ds, &c->sregs.es, &c->sregs.fs, &c->sregs.gs};
    for (unsigned i = 0; i < sizeof segments / sizeof *segments; i++) {
        struct kvm_segment *s = segments[i];
        const bool conforming = (s->type & 12) == 12;
        if (!s->unusable && !conforming && s->dpl < completion_cpl(c)) {
            s->selector = 0;
            s->present = 0;
            s->unusable = 1;
        }
    }
}

static void set_stack_pointer(struct completion *c, uint64_t rsp)
{
    if (completion_mode(c) == CPU_64)
        c->regs.rsp = rsp;
    else if (c->sregs.ss.db)
        c->regs.rsp = (uint32_t)rsp;
    else
        c->regs.rsp = (c->regs.rsp & ~0xffffull) | (rsp & 0xffff);
}

/* What IRET makes of the flags it popped, at the level it was executed at. */
static uint64_t returned_flags(const struct completion *c, uint64_t popped, unsigned size, unsigned cpl)
{
    const unsigned iopl = c->regs.rflags >> 12 & 3;
    uint64_t taken = FLAG_ARITHMETIC | FLAG_TF | FLAG_DF | FLAG_NT;
    if (cpl <= iopl)
        taken |= FLAG_IF;
    if (cpl == 0)
        taken |= FLAG_IOPL;
    if (size > 2)
        taken |= FLAG_RF | FLAG_AC | FLAG_ID | (cpl == 0 ? FLAG_VIF | FLAG_VIP : 0);
    return (c->regs.rflags & ~taken) | (popped & taken) | 2;
}

/* IRET, or RETF where there are no flags: `release` bytes more are taken from both stacks. */
static enum outcome far_return(struct completion *c, unsigned size, bool interrupt, uint64_t release)
{
    const unsigned count = interrupt ? 3 : 2, cpl = completion_cpl(c);
    uint64_t words[3] = {0}, stack[2];
    struct kvm_segment cs, ss;
    if (!(c->sregs.cr0 & CR0_PE) || c->regs.rflags & FLAG_VM || c->sregs.cr4 & CR4_CET)
        return COMPLETE_UNKNOWN;
    if (interrupt && c->regs.rflags & FLAG_NT)
        return c->sregs.efer & EFER_LMA ? fault_error(c, V_GP, 0) : COMPLETE_UNKNOWN;
    enum outcome o = stack_words(c, 0, size, count, words);
    if (o != COMPLETE_DONE)
        return o;
    if (interrupt && size > 2 && words[2] & FLAG_VM && cpl == 0 && !(c->sregs.efer & EFER_LMA))
        return COMPLETE_UNKNOWN;
    o = return_code(c, (uint16_t)words[1], words[0], &cs);
    if (o != COMPLETE_DONE)
        return o;

    const bool outer = (cs.selector & 3u) > cpl;
    const bool switches = outer || (interrupt && completion_mode(c) == CPU_64);
    if (switches) {
        o = stack_words(c, (uint64_t)size * count + release, size, 2, stack);
        o = o == COMPLETE_DONE ? return_stack(c, (uint16_t)stack[1], &cs, &ss) : o;
        if (o != COMPLETE_DONE)
            return o;
    }
    if (interrupt)
        c->regs.rflags = returned_flags(c, words[2], size, cpl);
    const uint64_t rsp = switches ? stack[0] : c->regs.rsp + (uint64_t)size * count;
    c->sregs.cs = cs;
    c->sregs_changed = true;
    if (switches)
        c->sregs.ss = ss;
    set_stack_pointer(c, rsp + release);
    c->regs.rip = words[0];
    if (outer)
        drop_inner_segments(c);
    return COMPLETE_JUMPED;
}

enum outcome interrupt_return(struct completion *c, unsigned size)
{
    return far_return(c, size, true, 0);
}

enum outcome complete_iret(struct completion *c)
{
    const enum outcome o = interrupt_return(c, c->insn.operand_size);
    c->unmasks_nmi = o == COMPLETE_JUMPED;
    return o;
}

enum outcome complete_retf(struct completion *c)
{
    return far_return(c, c->insn.operand_size, false, c->insn.immediate & 0xffff);
}
