/* SPDX-License-Identifier: Apache-2.0 */
/* What every completion uses: general registers, the exception it ends in, mode, and CPUID. */
#include "compat.h"

uint64_t gpr_read(const struct completion *c, unsigned reg, unsigned size)
{
    const struct kvm_regs *r = &c->regs;
    const uint64_t values[16] = {r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi,
                                 r->r8,  r->r9,  r->r10, r->r11, r->r12, r->r13, r->r14, r->r15};
    return size == 8 ? values[reg] : values[reg] & ((1ull << (8 * size)) - 1);
}

static __u64 *gpr(struct kvm_regs *r, unsigned reg)
{
    __u64 *const at[16] = {&r->rax, &r->rcx, &r->rdx, &r->rbx, &r->rsp, &r->rbp, &r->rsi, &r->rdi,
                           &r->r8,  &r->r9,  &r->r10, &r->r11, &r->r12, &r->r13, &r->r14, &r->r15};
    return at[reg];
}

void gpr_write(struct completion *c, unsigned reg, unsigned size, uint64_t value)
{
    __u64 *at = gpr(&c->regs, reg);
    if (size >= 4)
        *at = size == 8 ? value : (uint32_t)value;
    else
        *at = (*at & ~((1ull << (8 * size)) - 1)) | (value & ((1ull << (8 * size)) - 1));
}

enum outcome fault(struct completion *c, uint8_t vector)
{
    c->event.vector = vector;
    c->event.has_error = false;
    return COMPLETE_FAULT;
}

enum outcome fault_error(struct completion *c, uint8_t vector, uint32_t error)
{
    c->event.vector = vector;
    c->event.has_error = true;
    c->event.error = error;
    return COMPLETE_FAULT;
}

enum cpu_mode completion_mode(const struct completion *c)
{
    if (c->sregs.efer & EFER_LMA && c->sregs.cs.l)
        return CPU_64;
    return c->sregs.cs.db && !(c->regs.rflags & FLAG_VM) ? CPU_32 : CPU_16;
}

uint64_t completion_linear_rip(const struct completion *c)
{
    return completion_mode(c) == CPU_64 ? c->regs.rip : (uint32_t)(c->sregs.cs.base + c->regs.rip);
}

bool offered(const struct completion *c, enum feature feature)
{
    return feature == NO_FEATURE || c->source->cpuid[feature >> 5] >> (feature & 31) & 1;
}
