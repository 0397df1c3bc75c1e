/* SPDX-License-Identifier: Apache-2.0 */
/* System instructions, and hints that need no more than being stepped over. */
#include "compat.h"

enum { MSR_IA32_TSC = 0x10 };
#define MSR_TSC_AUX 0xc0000103u

enum outcome complete_nop(struct completion *c)
{
    (void)c;
    return COMPLETE_DONE;
}

/* CLFLUSHOPT, CLWB: nothing to flush, but an address that may not be read still faults. */
enum outcome complete_memory_nop(struct completion *c)
{
    struct span span;
    return operand_span(c, 1, ACCESS_READ, &span);
}

enum outcome complete_undefined(struct completion *c)
{
    return fault(c, V_UD);
}

static enum outcome set_ac(struct completion *c, uint64_t ac)
{
    if (completion_cpl(c) != 0)
        return fault(c, V_UD);
    c->regs.rflags = (c->regs.rflags & ~(uint64_t)FLAG_AC) | ac;
    return COMPLETE_DONE;
}

enum outcome complete_clac(struct completion *c)
{
    return set_ac(c, 0);
}

enum outcome complete_stac(struct completion *c)
{
    return set_ac(c, FLAG_AC);
}

enum outcome complete_cld(struct completion *c)
{
    c->regs.rflags &= ~(uint64_t)FLAG_DF;
    return COMPLETE_DONE;
}

/* PUSH of a register or an immediate, in 64-bit mode: what exception handlers begin with. */
enum outcome complete_push(struct completion *c)
{
    if (!c->insn.long_mode || c->insn.operand_size == 2)
        return COMPLETE_UNKNOWN;
    uint64_t value = c->insn.immediate_size ? c->insn.immediate : gpr_read(c, c->insn.rm, 8);
    struct span span;
    enum outcome o = linear_span(c, c->regs.rsp - 8, 8, ACCESS_WRITE, &span);
    if (o != COMPLETE_DONE)
        return o == COMPLETE_FAULT ? COMPLETE_UNKNOWN : o;
    span_write(&span, 0, &value, sizeof value);
    c->regs.rsp -= 8;
    return COMPLETE_DONE;
}

/* Types 0 (one address), 1 (one PCID), 2 (everything), 3 (everything but global): each may flush more than
 * asked. */
enum outcome complete_invpcid(struct completion *c)
{
    if (completion_cpl(c) != 0)
        return fault_error(c, V_GP, 0);
    uint64_t type = gpr_read(c, c->insn.reg, c->insn.long_mode ? 8 : 4), descriptor[2];
    struct span span;
    enum outcome o = operand_span(c, sizeof descriptor, ACCESS_READ, &span);
    if (o != COMPLETE_DONE)
        return o;
    span_read(&span, 0, descriptor, sizeof descriptor);
    bool pcid_used = type < 2, canonical = (int64_t)(descriptor[1] << 16) >> 16 == (int64_t)descriptor[1];
    if (type > 3 || descriptor[0] >> 12 || (pcid_used && descriptor[0] && !(c->sregs.cr4 & CR4_PCIDE)) ||
        (type == 0 && !canonical))
        return fault_error(c, V_GP, 0);
    return c->source->flush_tlb(c->source->opaque) ? COMPLETE_DONE : COMPLETE_UNKNOWN;
}

enum outcome complete_xgetbv(struct completion *c)
{
    if (!(c->sregs.cr4 & CR4_OSXSAVE))
        return fault(c, V_UD);
    uint64_t xcr0;
    switch ((uint32_t)c->regs.rcx) {
    case 0:
        if (!c->source->get_xcr0(c->source->opaque, &xcr0))
            return COMPLETE_UNKNOWN;
        break;
    case 1: { /* XCR0 & XINUSE */
        if (!offered(c, XGETBV1))
            return fault_error(c, V_GP, 0);
        uint64_t area[512];
        if (!c->source->get_xcr0(c->source->opaque, &xcr0) || !c->source->get_xsave(c->source->opaque, area))
            return COMPLETE_UNKNOWN;
        xcr0 &= area[512 / 8];
        break;
    }
    default:
        return fault_error(c, V_GP, 0);
    }
    gpr_write(c, 0, 4, (uint32_t)xcr0);
    gpr_write(c, 2, 4, xcr0 >> 32);
    return COMPLETE_DONE;
}

/* RDFSBASE (/0), RDGSBASE (/1), WRFSBASE (/2), WRGSBASE (/3). */
enum outcome complete_fsgsbase(struct completion *c)
{
    if (!c->insn.long_mode || !(c->sregs.cr4 & CR4_FSGSBASE))
        return fault(c, V_UD);
    unsigned which = c->insn.reg & 7, size = c->insn.w ? 8 : 4;
    struct kvm_segment *segment = which & 1 ? &c->sregs.gs : &c->sregs.fs;
    if (which < 2) {
        gpr_write(c, c->insn.rm, size, size == 8 ? segment->base : (uint32_t)segment->base);
        return COMPLETE_DONE;
    }
    uint64_t base = gpr_read(c, c->insn.rm, size);
    if ((int64_t)(base << 16) >> 16 != (int64_t)base)
        return fault_error(c, V_GP, 0);
    segment->base = base;
    c->sregs_changed = true;
    return COMPLETE_DONE;
}

enum outcome complete_rdpid(struct completion *c)
{
    uint64_t aux;
    if (!c->source->get_msr(c->source->opaque, MSR_TSC_AUX, &aux))
        return COMPLETE_UNKNOWN;
    gpr_write(c, c->insn.rm, c->insn.long_mode ? 8 : 4, (uint32_t)aux);
    return COMPLETE_DONE;
}

enum outcome complete_rdtscp(struct completion *c)
{
    uint64_t aux, tsc;
    if (c->sregs.cr4 & CR4_TSD && completion_cpl(c) != 0)
        return fault_error(c, V_GP, 0);
    if (!c->source->get_msr(c->source->opaque, MSR_TSC_AUX, &aux) ||
        !c->source->get_msr(c->source->opaque, MSR_IA32_TSC, &tsc))
        return COMPLETE_UNKNOWN;
    gpr_write(c, 0, 4, (uint32_t)tsc);
    gpr_write(c, 2, 4, tsc >> 32);
    gpr_write(c, 1, 4, (uint32_t)aux);
    return COMPLETE_DONE;
}

/* MONITOR, MWAIT: a wait may end at any time, so it ends at once. */
enum outcome complete_idle_hint(struct completion *c)
{
    return completion_cpl(c) == 0 ? COMPLETE_DONE : fault(c, V_UD);
}

/*
 * LAR, LSL, VERR, VERW: ZF says whether the selector's descriptor exists and CPL and RPL may see it (SDM
 * volume 3, 5.10). A NULL selector, one beyond its table, or a type the instruction does not know clears ZF.
 */
enum query { QUERY_LAR, QUERY_LSL, QUERY_VERR, QUERY_VERW };

static bool query_allowed(const struct completion *c, enum query query, uint64_t descriptor, unsigned rpl)
{
    unsigned type = descriptor >> 40 & 15, dpl = descriptor >> 45 & 3, cpl = completion_cpl(c);
    bool ordinary = descriptor >> 44 & 1, code = type & 8, conforming = code && type & 4;
    if (!ordinary) {
        /* TSS, LDT, gates: LAR knows call and task gates as well; neither exists in 16-bit form in long mode.
         */
        bool long_mode = c->sregs.efer & EFER_LMA;
        uint16_t limits = long_mode ? 1 << 2 | 1 << 9 | 1 << 11 : 1 << 1 | 1 << 2 | 1 << 3 | 1 << 9 | 1 << 11;
        uint16_t gates = long_mode ? 1 << 12 : 1 << 4 | 1 << 5 | 1 << 12;
        uint16_t known = query == QUERY_LAR ? limits | gates : query == QUERY_LSL ? limits : 0;
        if (!(known >> type & 1))
            return false;
    } else if (query == QUERY_VERR && code && !(type & 2)) {
        return false;
    } else if (query == QUERY_VERW && (code || !(type & 2))) {
        return false;
    }
    return (ordinary && conforming) || (cpl <= dpl && rpl <= dpl);
}

enum outcome complete_segment_query(struct completion *c)
{
    if (!(c->sregs.cr0 & CR0_PE) || c->regs.rflags & FLAG_VM)
        return fault(c, V_UD);
    enum query query = c->insn.opcode == 0x02   ? QUERY_LAR
                       : c->insn.opcode == 0x03 ? QUERY_LSL
                       : (c->insn.reg & 7) == 4 ? QUERY_VERR
                                                : QUERY_VERW;
    uint64_t selector, descriptor = 0;
    enum outcome o = rm_read(c, 2, &selector);
    if (o != COMPLETE_DONE)
        return o;
    bool found;
    o = descriptor_read(c, (uint16_t)selector, &descriptor, &found);
    if (o != COMPLETE_DONE)
        return o;
    found = found && query_allowed(c, query, descriptor, selector & 3);
    c->regs.rflags = (c->regs.rflags & ~(uint64_t)FLAG_ZF) | (found ? FLAG_ZF : 0);
    if (!found || query == QUERY_VERR || query == QUERY_VERW)
        return COMPLETE_DONE;
    const uint32_t limit = descriptor_segment((uint16_t)selector, descriptor).limit;
    uint32_t rights = (uint32_t)(descriptor >> 32) & 0x00f0ff00; /* SDM volume 2, LAR: bits 19:16 undefined */
    gpr_write(c, c->insn.reg, c->insn.operand_size, query == QUERY_LSL ? limit : rights);
    return COMPLETE_DONE;
}
