/* SPDX-License-Identifier: Apache-2.0 */
/* Which instructions are completed, and what their completions have in common: operands, registers,
 * exceptions. */
#include "compat.h"

#include <string.h>

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

enum outcome rm_read(struct completion *c, unsigned size, uint64_t *value)
{
    const struct insn *i = &c->insn;
    if (!i->memory) {
        bool high_byte = size == 1 && !i->rex && i->rm >= 4 && i->rm < 8; /* AH, CH, DH, BH */
        *value = high_byte ? gpr_read(c, i->rm - 4u, 2) >> 8 : gpr_read(c, i->rm, size);
        return COMPLETE_DONE;
    }
    struct span span;
    enum outcome o = operand_span(c, size, ACCESS_READ, &span);
    if (o != COMPLETE_DONE)
        return o;
    *value = 0;
    span_read(&span, 0, value, size);
    return COMPLETE_DONE;
}

enum outcome rm_write(struct completion *c, unsigned size, uint64_t value)
{
    if (!c->insn.memory) {
        gpr_write(c, c->insn.rm, size, value);
        return COMPLETE_DONE;
    }
    struct span span;
    enum outcome o = operand_span(c, size, ACCESS_WRITE, &span);
    if (o == COMPLETE_DONE)
        span_write(&span, 0, &value, size);
    return o;
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

/*
 * The table. `prefix` is the mandatory prefix (NP: none of 66, F3, F2), `extension` ModRM.reg where it is
 * part of the opcode, `form` what else must hold. The first row that matches is the instruction.
 */
enum { NP = 0, ANY_PREFIX = 1, ANY = 8 };

enum form {
    LEGACY = 0,
    VEX = 1,      /* encoded with VEX, L = 0 */
    REGISTER = 2, /* r/m must be a register */
    MEMORY = 4,   /* r/m must be in memory */
    LOCKABLE = 8, /* LOCK is not #UD */
};

static const struct {
    uint8_t map, opcode, mask, prefix, extension, form;
    completer *complete;
} instructions[] = {
    {MAP_PRIMARY, 0x50, 0xf8, NP, ANY, LEGACY, complete_push},
    {MAP_PRIMARY, 0x68, 0xff, NP, ANY, LEGACY, complete_push},
    {MAP_PRIMARY, 0x6a, 0xff, NP, ANY, LEGACY, complete_push},
    {MAP_PRIMARY, 0x90, 0xff, NP, ANY, LEGACY, complete_nop},
    {MAP_PRIMARY, 0x9b, 0xff, ANY_PREFIX, ANY, LEGACY, complete_fwait},
    {MAP_PRIMARY, 0xcc, 0xff, ANY_PREFIX, ANY, LEGACY, complete_int3},
    {MAP_PRIMARY, 0xcd, 0xff, ANY_PREFIX, ANY, LEGACY, complete_int},
    {MAP_PRIMARY, 0xce, 0xff, ANY_PREFIX, ANY, LEGACY, complete_into},
    {MAP_PRIMARY, 0xfc, 0xff, ANY_PREFIX, ANY, LEGACY, complete_cld},

    {MAP_0F, 0x77, 0xff, NP, ANY, LEGACY, complete_x87_control}, /* EMMS */

    {MAP_0F, 0x00, 0xff, ANY_PREFIX, 4, LEGACY, complete_segment_query},   /* VERR */
    {MAP_0F, 0x00, 0xff, ANY_PREFIX, 5, LEGACY, complete_segment_query},   /* VERW */
    {MAP_0F, 0x02, 0xff, ANY_PREFIX, ANY, LEGACY, complete_segment_query}, /* LAR */
    {MAP_0F, 0x03, 0xff, ANY_PREFIX, ANY, LEGACY, complete_segment_query}, /* LSL */
    {MAP_0F, 0x0b, 0xff, ANY_PREFIX, ANY, LEGACY, complete_undefined},     /* UD2 */
    {MAP_0F, 0xb9, 0xff, ANY_PREFIX, ANY, LEGACY, complete_undefined},     /* UD1 */
    {MAP_0F, 0xff, 0xff, ANY_PREFIX, ANY, LEGACY, complete_undefined},     /* UD0 */
    {MAP_0F, 0x18, 0xff, ANY_PREFIX, ANY, LEGACY | MEMORY, complete_nop},  /* PREFETCHh */
    {MAP_0F, 0x0d, 0xff, ANY_PREFIX, ANY, LEGACY | MEMORY, complete_nop},  /* PREFETCHW */
    {MAP_0F, 0x1e, 0xff, 0xf3, ANY, LEGACY | REGISTER, complete_nop},      /* ENDBR, RDSSP without CET */
    {MAP_0F, 0x1f, 0xff, ANY_PREFIX, ANY, LEGACY, complete_nop},           /* NOP r/m */
    {MAP_0F, 0xae, 0xff, NP, 2, LEGACY | MEMORY, complete_mxcsr},          /* LDMXCSR */
    {MAP_0F, 0xae, 0xff, NP, 3, LEGACY | MEMORY, complete_mxcsr},          /* STMXCSR */
    {MAP_0F, 0xae, 0xff, NP, 4, LEGACY | MEMORY, complete_xsave},          /* XSAVE */
    {MAP_0F, 0xae, 0xff, NP, 5, LEGACY | MEMORY, complete_xrstor},         /* XRSTOR */
    {MAP_0F, 0xae, 0xff, NP, 6, LEGACY | MEMORY, complete_xsave},          /* XSAVEOPT */
    {MAP_0F, 0xae, 0xff, NP, 7, LEGACY | MEMORY, complete_memory_nop},     /* CLFLUSH */
    {MAP_0F, 0xae, 0xff, 0x66, 6, LEGACY | MEMORY, complete_memory_nop},   /* CLWB */
    {MAP_0F, 0xae, 0xff, 0x66, 7, LEGACY | MEMORY, complete_memory_nop},   /* CLFLUSHOPT */
    {MAP_0F, 0xae, 0xff, 0xf3, 0, LEGACY | REGISTER, complete_fsgsbase},
    {MAP_0F, 0xae, 0xff, 0xf3, 1, LEGACY | REGISTER, complete_fsgsbase},
    {MAP_0F, 0xae, 0xff, 0xf3, 2, LEGACY | REGISTER, complete_fsgsbase},
    {MAP_0F, 0xae, 0xff, 0xf3, 3, LEGACY | REGISTER, complete_fsgsbase},
    {MAP_0F, 0xb8, 0xff, 0xf3, ANY, LEGACY, complete_popcnt},
    {MAP_0F, 0xbc, 0xff, 0xf3, ANY, LEGACY, complete_tzcnt},
    {MAP_0F, 0xbd, 0xff, 0xf3, ANY, LEGACY, complete_lzcnt},
    {MAP_0F, 0xc7, 0xff, NP, 1, LEGACY | MEMORY | LOCKABLE, complete_cmpxchg8b16b},
    {MAP_0F, 0xc7, 0xff, NP, 3, LEGACY | MEMORY, complete_xrstor}, /* XRSTORS */
    {MAP_0F, 0xc7, 0xff, NP, 4, LEGACY | MEMORY, complete_xsave},  /* XSAVEC */
    {MAP_0F, 0xc7, 0xff, NP, 5, LEGACY | MEMORY, complete_xsave},  /* XSAVES */
    {MAP_0F, 0xc7, 0xff, NP, 6, LEGACY | REGISTER, complete_rdrand},
    {MAP_0F, 0xc7, 0xff, 0x66, 6, LEGACY | REGISTER, complete_rdrand},
    {MAP_0F, 0xc7, 0xff, NP, 7, LEGACY | REGISTER, complete_rdrand}, /* RDSEED */
    {MAP_0F, 0xc7, 0xff, 0x66, 7, LEGACY | REGISTER, complete_rdrand},
    {MAP_0F, 0xc7, 0xff, 0xf3, 7, LEGACY | REGISTER, complete_rdpid},

    {MAP_0F38, 0x82, 0xff, 0x66, ANY, LEGACY | MEMORY, complete_invpcid},
    {MAP_0F38, 0xf0, 0xff, NP, ANY, LEGACY | MEMORY, complete_movbe_load},
    {MAP_0F38, 0xf0, 0xff, 0x66, ANY, LEGACY | MEMORY, complete_movbe_load},
    {MAP_0F38, 0xf1, 0xff, NP, ANY, LEGACY | MEMORY, complete_movbe_store},
    {MAP_0F38, 0xf1, 0xff, 0x66, ANY, LEGACY | MEMORY, complete_movbe_store},
    {MAP_0F38, 0xf0, 0xfe, 0xf2, ANY, LEGACY, complete_crc32},
    {MAP_0F38, 0xf6, 0xff, 0x66, ANY, LEGACY, complete_adcx},
    {MAP_0F38, 0xf6, 0xff, 0xf3, ANY, LEGACY, complete_adox},
    {MAP_0F38, 0xf2, 0xff, NP, ANY, VEX, complete_andn},
    {MAP_0F38, 0xf3, 0xff, NP, 1, VEX, complete_bls},
    {MAP_0F38, 0xf3, 0xff, NP, 2, VEX, complete_bls},
    {MAP_0F38, 0xf3, 0xff, NP, 3, VEX, complete_bls},
    {MAP_0F38, 0xf5, 0xff, NP, ANY, VEX, complete_bzhi},
    {MAP_0F38, 0xf5, 0xff, 0xf3, ANY, VEX, complete_pext},
    {MAP_0F38, 0xf5, 0xff, 0xf2, ANY, VEX, complete_pdep},
    {MAP_0F38, 0xf6, 0xff, 0xf2, ANY, VEX, complete_mulx},
    {MAP_0F38, 0xf7, 0xff, NP, ANY, VEX, complete_bextr},
    {MAP_0F38, 0xf7, 0xff, 0x66, ANY, VEX, complete_shiftx}, /* SHLX */
    {MAP_0F38, 0xf7, 0xff, 0xf3, ANY, VEX, complete_shiftx}, /* SARX */
    {MAP_0F38, 0xf7, 0xff, 0xf2, ANY, VEX, complete_shiftx}, /* SHRX */
    {MAP_0F3A, 0xf0, 0xff, 0xf2, ANY, VEX, complete_rorx},
};

/* 0F 01 with a register form: the whole ModRM byte is opcode. */
static const struct {
    uint8_t modrm;
    completer *complete;
} group_0f01[] = {
    {0xc8, complete_idle_hint}, /* MONITOR */
    {0xc9, complete_idle_hint}, /* MWAIT */
    {0xca, complete_clac},      {0xcb, complete_stac},      {0xd0, complete_xgetbv},
    {0xf9, complete_rdtscp},    {0xfa, complete_idle_hint}, /* MONITORX */
    {0xfb, complete_idle_hint},                             /* MWAITX */
};

static completer *find_x87(const struct insn *i)
{
    if (i->memory)
        return i->opcode == 0xd9 && (i->reg & 7) == 5 ? complete_x87_control : complete_x87; /* FLDCW */
    uint8_t modrm = (uint8_t)(0xc0 | (i->reg & 7) << 3 | (i->rm & 7));
    bool known =
        (i->opcode == 0xdf && modrm == 0xe0) || (i->opcode == 0xdb && modrm == 0xe2); /* FNSTSW, FNCLEX */
    return known ? complete_x87_control : complete_x87;
}

static completer *find_0f01(const struct insn *i)
{
    uint8_t modrm = (uint8_t)(0xc0 | (i->reg & 7) << 3 | (i->rm & 7));
    for (size_t n = 0; n < sizeof group_0f01 / sizeof *group_0f01; n++)
        if (group_0f01[n].modrm == modrm && !i->prefix)
            return group_0f01[n].complete;
    return NULL;
}

static completer *find(const struct insn *i, uint8_t *form)
{
    *form = LEGACY;
    if (i->map == MAP_0F && i->opcode == 0x01 && !i->memory && !i->vex)
        return find_0f01(i);
    if (i->map == MAP_PRIMARY && (i->opcode & 0xf8) == 0xd8)
        return find_x87(i);
    for (size_t n = 0; n < sizeof instructions / sizeof *instructions; n++) {
        *form = instructions[n].form;
        if (instructions[n].map == i->map && instructions[n].opcode == (i->opcode & instructions[n].mask) &&
            (instructions[n].prefix == ANY_PREFIX || instructions[n].prefix == i->prefix) &&
            (instructions[n].extension == ANY || instructions[n].extension == (i->reg & 7)) &&
            (*form & VEX) == (i->vex ? VEX : 0) && !(*form & VEX && i->vector_256) &&
            !(*form & REGISTER && i->memory) && !(*form & MEMORY && !i->memory))
            return instructions[n].complete;
    }
    *form = LEGACY;
    return NULL;
}

enum outcome complete(struct completion *c, const uint8_t *bytes, size_t n)
{
    memset(&c->event, 0, sizeof c->event);
    if (!insn_decode(&c->insn, bytes, n, completion_mode(c)))
        return COMPLETE_UNKNOWN;
    uint8_t form;
    completer *completer = find(&c->insn, &form);
    if (!completer)
        return COMPLETE_UNKNOWN;
    if (c->insn.lock && !(form & LOCKABLE))
        return fault(c, V_UD);

    enum outcome o = completer(c);
    if (o == COMPLETE_DONE || o == COMPLETE_TRAP) {
        c->regs.rip += c->insn.length;
        if (completion_mode(c) != CPU_64)
            c->regs.rip &= 0xffffffff;
        c->regs.rflags &= ~(uint64_t)FLAG_RF;
    }
    return o;
}
