/* SPDX-License-Identifier: Apache-2.0 */
/* Which instructions are completed: the table, and the one path through it. */
#include "compat.h"

#include <string.h>

/*
 * The table. `prefix` is the mandatory prefix (NP: none of 66, F3, F2), `extension` and `rm` ModRM's fields where they
 * are part of the opcode, `form` what else must hold. The first row that matches is the instruction; without a
 * completer it is one that is not done here where CPUID offers it.
 */
const struct instruction instructions[] = {
    {MAP_PRIMARY, 0x50, 0xf8, NP, ANY, ANY, LEGACY, NO_FEATURE, complete_push},
    {MAP_PRIMARY, 0x68, 0xff, NP, ANY, ANY, LEGACY, NO_FEATURE, complete_push},
    {MAP_PRIMARY, 0x6a, 0xff, NP, ANY, ANY, LEGACY, NO_FEATURE, complete_push},
    {MAP_PRIMARY, 0x90, 0xff, NP, ANY, ANY, LEGACY, NO_FEATURE, complete_nop},
    {MAP_PRIMARY, 0x9b, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_fwait},
    {MAP_PRIMARY, 0xca, 0xfe, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_retf}, /* RETF imm16, RETF */
    {MAP_PRIMARY, 0xcc, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_int3},
    {MAP_PRIMARY, 0xcd, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_int},
    {MAP_PRIMARY, 0xce, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_into},
    {MAP_PRIMARY, 0xcf, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_iret},
    {MAP_PRIMARY, 0xf1, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_int1},
    {MAP_PRIMARY, 0xfc, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_cld},
    {MAP_0F, 0x77, 0xff, NP, ANY, ANY, LEGACY, MMX, complete_x87_control},                  /* EMMS */
    {MAP_0F, 0x00, 0xff, ANY_PREFIX, 4, ANY, LEGACY, NO_FEATURE, complete_segment_query},   /* VERR */
    {MAP_0F, 0x00, 0xff, ANY_PREFIX, 5, ANY, LEGACY, NO_FEATURE, complete_segment_query},   /* VERW */
    {MAP_0F, 0x02, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_segment_query}, /* LAR */
    {MAP_0F, 0x03, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_segment_query}, /* LSL */
    {MAP_0F, 0x0b, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_undefined},     /* UD2 */
    {MAP_0F, 0xb9, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_undefined},     /* UD1 */
    {MAP_0F, 0xff, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_undefined},     /* UD0 */
    {MAP_0F, 0x18, 0xff, ANY_PREFIX, ANY, ANY, RM_MEMORY, NO_FEATURE, complete_nop},        /* PREFETCHh */
    {MAP_0F, 0x0d, 0xff, ANY_PREFIX, ANY, ANY, RM_MEMORY, NO_FEATURE, complete_nop},        /* PREFETCHW */
    {MAP_0F, 0x1e, 0xff, 0xf3, ANY, ANY, RM_REGISTER, NO_FEATURE,
     complete_nop}, /* ENDBR, RDSSP without CET */
    {MAP_0F, 0x1f, 0xff, ANY_PREFIX, ANY, ANY, LEGACY, NO_FEATURE, complete_nop},   /* NOP r/m */
    {MAP_0F, 0xae, 0xff, NP, 2, ANY, RM_MEMORY | ELSE_UD, SSE, complete_mxcsr},     /* LDMXCSR */
    {MAP_0F, 0xae, 0xff, NP, 3, ANY, RM_MEMORY | ELSE_UD, SSE, complete_mxcsr},     /* STMXCSR */
    {MAP_0F, 0xae, 0xff, NP, 4, ANY, RM_MEMORY | ELSE_UD, XSAVE, complete_xsave},   /* XSAVE */
    {MAP_0F, 0xae, 0xff, NP, 5, ANY, RM_MEMORY, XSAVE, complete_xrstor},            /* XRSTOR */
    {MAP_0F, 0xae, 0xff, NP, 6, ANY, RM_MEMORY, XSAVEOPT, complete_xsave},          /* XSAVEOPT */
    {MAP_0F, 0xae, 0xff, NP, 7, ANY, RM_MEMORY, CLFSH, complete_memory_nop},        /* CLFLUSH */
    {MAP_0F, 0xae, 0xff, 0x66, 6, ANY, RM_MEMORY, CLWB, complete_memory_nop},       /* CLWB */
    {MAP_0F, 0xae, 0xff, 0x66, 7, ANY, RM_MEMORY, CLFLUSHOPT, complete_memory_nop}, /* CLFLUSHOPT */
    {MAP_0F, 0xae, 0xff, 0xf3, 0, ANY, RM_REGISTER, FSGSBASE, complete_fsgsbase},
    {MAP_0F, 0xae, 0xff, 0xf3, 1, ANY, RM_REGISTER, FSGSBASE, complete_fsgsbase},
    {MAP_0F, 0xae, 0xff, 0xf3, 2, ANY, RM_REGISTER, FSGSBASE, complete_fsgsbase},
    {MAP_0F, 0xae, 0xff, 0xf3, 3, ANY, RM_REGISTER, FSGSBASE, complete_fsgsbase},
    {MAP_0F, 0xb8, 0xff, 0xf3, ANY, ANY, LEGACY, POPCNT, complete_popcnt},
    {MAP_0F, 0xbc, 0xff, 0xf3, ANY, ANY, LEGACY, NO_FEATURE, complete_tzcnt},
    {MAP_0F, 0xbd, 0xff, 0xf3, ANY, ANY, LEGACY, NO_FEATURE, complete_lzcnt},
    {MAP_0F, 0xc7, 0xff, NP, 1, ANY, RM_MEMORY | LOCKABLE | ELSE_UD | W1, CX16,
     complete_cmpxchg8b16b}, /* CMPXCHG16B */
    {MAP_0F, 0xc7, 0xff, NP, 1, ANY, RM_MEMORY | LOCKABLE | ELSE_UD, CX8,
     complete_cmpxchg8b16b},                                                        /* CMPXCHG8B */
    {MAP_0F, 0xc7, 0xff, NP, 3, ANY, RM_MEMORY | ELSE_UD, XSAVES, complete_xrstor}, /* XRSTORS */
    {MAP_0F, 0xc7, 0xff, NP, 4, ANY, RM_MEMORY | ELSE_UD, XSAVEC, complete_xsave},  /* XSAVEC */
    {MAP_0F, 0xc7, 0xff, NP, 5, ANY, RM_MEMORY | ELSE_UD, XSAVES, complete_xsave},  /* XSAVES */
    {MAP_0F, 0xc7, 0xff, NP, 6, ANY, RM_REGISTER, RDRAND, complete_rdrand},
    {MAP_0F, 0xc7, 0xff, 0x66, 6, ANY, RM_REGISTER, RDRAND, complete_rdrand},
    {MAP_0F, 0xc7, 0xff, NP, 7, ANY, RM_REGISTER, RDSEED, complete_rdrand}, /* RDSEED */
    {MAP_0F, 0xc7, 0xff, 0x66, 7, ANY, RM_REGISTER, RDSEED, complete_rdrand},
    {MAP_0F, 0xc7, 0xff, 0xf3, 7, ANY, RM_REGISTER, RDPID, complete_rdpid},
    {MAP_0F38, 0x82, 0xff, 0x66, ANY, ANY, RM_MEMORY | ELSE_UD, INVPCID, complete_invpcid},
    {MAP_0F38, 0xf0, 0xff, NP, ANY, ANY, RM_MEMORY | ELSE_UD, MOVBE, complete_movbe_load},
    {MAP_0F38, 0xf0, 0xff, 0x66, ANY, ANY, RM_MEMORY | ELSE_UD, MOVBE, complete_movbe_load},
    {MAP_0F38, 0xf1, 0xff, NP, ANY, ANY, RM_MEMORY | ELSE_UD, MOVBE, complete_movbe_store},
    {MAP_0F38, 0xf1, 0xff, 0x66, ANY, ANY, RM_MEMORY | ELSE_UD, MOVBE, complete_movbe_store},
    {MAP_0F38, 0xf0, 0xfe, 0xf2, ANY, ANY, LEGACY, SSE42, complete_crc32},
    {MAP_0F38, 0xf6, 0xff, 0x66, ANY, ANY, LEGACY, ADX, complete_adcx},
    {MAP_0F38, 0xf6, 0xff, 0xf3, ANY, ANY, LEGACY, ADX, complete_adox},
    {MAP_0F38, 0xf2, 0xff, NP, ANY, ANY, VEX | ELSE_UD, BMI1, complete_andn},
    {MAP_0F38, 0xf3, 0xff, NP, 1, ANY, VEX | ELSE_UD, BMI1, complete_bls},
    {MAP_0F38, 0xf3, 0xff, NP, 2, ANY, VEX | ELSE_UD, BMI1, complete_bls},
    {MAP_0F38, 0xf3, 0xff, NP, 3, ANY, VEX | ELSE_UD, BMI1, complete_bls},
    {MAP_0F38, 0xf5, 0xff, NP, ANY, ANY, VEX | ELSE_UD, BMI2, complete_bzhi},
    {MAP_0F38, 0xf5, 0xff, 0xf3, ANY, ANY, VEX | ELSE_UD, BMI2, complete_pext},
    {MAP_0F38, 0xf5, 0xff, 0xf2, ANY, ANY, VEX | ELSE_UD, BMI2, complete_pdep},
    {MAP_0F38, 0xf6, 0xff, 0xf2, ANY, ANY, VEX | ELSE_UD, BMI2, complete_mulx},
    {MAP_0F38, 0xf7, 0xff, NP, ANY, ANY, VEX | ELSE_UD, BMI1, complete_bextr},
    {MAP_0F38, 0xf7, 0xff, 0x66, ANY, ANY, VEX | ELSE_UD, BMI2, complete_shiftx}, /* SHLX */
    {MAP_0F38, 0xf7, 0xff, 0xf3, ANY, ANY, VEX | ELSE_UD, BMI2, complete_shiftx}, /* SARX */
    {MAP_0F38, 0xf7, 0xff, 0xf2, ANY, ANY, VEX | ELSE_UD, BMI2, complete_shiftx}, /* SHRX */
    {MAP_0F3A, 0xf0, 0xff, 0xf2, ANY, ANY, VEX | ELSE_UD, BMI2, complete_rorx},
    {MAP_0F, 0x01, 0xff, NP, 0, 0, RM_REGISTER, SGX, NULL},                   /* ENCLV */
    {MAP_0F, 0x01, 0xff, NP, 0, 5, RM_REGISTER, PCONFIG, NULL},               /* PCONFIG */
    {MAP_0F, 0x01, 0xff, NP, 1, 0, RM_REGISTER, MONITOR, complete_idle_hint}, /* MONITOR */
    {MAP_0F, 0x01, 0xff, NP, 1, 1, RM_REGISTER, MONITOR, complete_idle_hint}, /* MWAIT */
    {MAP_0F, 0x01, 0xff, NP, 1, 2, RM_REGISTER, SMAP, complete_clac},
    {MAP_0F, 0x01, 0xff, NP, 1, 3, RM_REGISTER, SMAP, complete_stac},
    {MAP_0F, 0x01, 0xff, NP, 1, 7, RM_REGISTER, SGX, NULL}, /* ENCLS */
    {MAP_0F, 0x01, 0xff, NP, 2, 0, RM_REGISTER, XSAVE, complete_xgetbv},
    {MAP_0F, 0x01, 0xff, NP, 2, 5, RM_REGISTER, RTM, NULL},       /* XEND */
    {MAP_0F, 0x01, 0xff, NP, 2, 6, RM_REGISTER, RTM, NULL},       /* XTEST */
    {MAP_0F, 0x01, 0xff, NP, 2, 7, RM_REGISTER, SGX, NULL},       /* ENCLU */
    {MAP_0F, 0x01, 0xff, NP, 5, 0, RM_REGISTER, SERIALIZE, NULL}, /* SERIALIZE */
    {MAP_0F, 0x01, 0xff, NP, 5, 6, RM_REGISTER, PKU, NULL},       /* RDPKRU */
    {MAP_0F, 0x01, 0xff, NP, 5, 7, RM_REGISTER, PKU, NULL},       /* WRPKRU */
    {MAP_0F, 0x01, 0xff, NP, 7, 1, RM_REGISTER, RDTSCP, complete_rdtscp},
    {MAP_0F, 0x01, 0xff, NP, 7, 2, RM_REGISTER, MONITORX, complete_idle_hint}, /* MONITORX */
    {MAP_0F, 0x01, 0xff, NP, 7, 3, RM_REGISTER, MONITORX, complete_idle_hint}, /* MWAITX */
    {MAP_0F, 0x01, 0xff, NP, 7, 4, RM_REGISTER, CLZERO, NULL},                 /* CLZERO */
    {MAP_0F, 0x01, 0xff, NP, 7, 5, RM_REGISTER, RDPRU, NULL},                  /* RDPRU */
    {MAP_0F, 0x01, 0xff, NP, 7, 6, RM_REGISTER, INVLPGB, NULL},                /* INVLPGB */
    {MAP_0F, 0x01, 0xff, NP, 7, 7, RM_REGISTER, INVLPGB, NULL},                /* TLBSYNC */
};
const size_t n_instructions = sizeof instructions / sizeof *instructions;

static completer *find_x87(const struct insn *i)
{
    if (i->memory)
        return i->opcode == 0xd9 && (i->reg & 7) == 5 ? complete_x87_control : complete_x87; /* FLDCW */
    uint8_t modrm = (uint8_t)(0xc0 | (i->reg & 7) << 3 | (i->rm & 7));
    bool known =
        (i->opcode == 0xdf && modrm == 0xe0) || (i->opcode == 0xdb && modrm == 0xe2); /* FNSTSW, FNCLEX */
    return known ? complete_x87_control : complete_x87;
}

static bool opcode_matches(const struct instruction *row, const struct insn *i)
{
    return row->map == i->map && row->opcode == (i->opcode & row->mask) &&
           (row->prefix == ANY_PREFIX || row->prefix == i->prefix) &&
           (row->extension == ANY || row->extension == (i->reg & 7)) &&
           (row->form & VEX) == (i->vex ? VEX : 0);
}

static bool form_matches(const struct instruction *row, const struct insn *i)
{
    return !(row->form & VEX && i->vector_256) && !(row->form & RM_REGISTER && i->memory) &&
           !(row->form & RM_MEMORY && !i->memory) && !(row->form & W1 && !i->w) &&
           (row->rm == ANY || row->rm == (i->rm & 7));
}

/* The instruction's row, or NULL; *illegal: nothing but another form of it is known, and that is #UD. */
static const struct instruction *find(const struct insn *i, bool *illegal)
{
    *illegal = false;
    for (size_t n = 0; n < n_instructions; n++) {
        if (!opcode_matches(&instructions[n], i))
            continue;
        if (form_matches(&instructions[n], i)) {
            *illegal = false;
            return &instructions[n];
        }
        *illegal |= instructions[n].form & ELSE_UD;
    }
    return NULL;
}

enum outcome complete(struct completion *c, const uint8_t *bytes, size_t n)
{
    memset(&c->event, 0, sizeof c->event);
    if (!insn_decode(&c->insn, bytes, n, completion_mode(c)))
        return COMPLETE_UNKNOWN;
    completer *completer;
    if (c->insn.map == MAP_PRIMARY && (c->insn.opcode & 0xf8) == 0xd8) {
        if (c->insn.lock)
            return fault(c, V_UD);
        completer = find_x87(&c->insn);
    } else {
        bool illegal;
        const struct instruction *row = find(&c->insn, &illegal);
        if (!row && !illegal)
            return COMPLETE_UNKNOWN;
        if (illegal || !offered(c, row->feature) || (c->insn.lock && !(row->form & LOCKABLE)))
            return fault(c, V_UD);
        completer = row->complete;
        if (!completer)
            return COMPLETE_UNKNOWN;
    }

    enum outcome o = completer(c);
    if (o == COMPLETE_DONE || o == COMPLETE_TRAP) {
        c->regs.rip += c->insn.length;
        if (completion_mode(c) != CPU_64)
            c->regs.rip &= 0xffffffff;
        c->regs.rflags &= ~(uint64_t)FLAG_RF;
    }
    return o;
}
