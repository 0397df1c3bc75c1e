/* SPDX-License-Identifier: Apache-2.0 */
/*
 * x87 arithmetic, done by the processor underneath: the guest's registers are loaded, the very instruction is
 * executed on them with its memory operand moved to a buffer of ours, and the registers are taken back.
 *
 * Only encodings of the two tables below get that far: every one is defined on every x86-64 processor, touches
 * nothing but x87 state, arithmetic flags and its operand, and cannot raise an exception while all are masked,
 * which is checked. The rest (FLDENV, FNSAVE ...) is not ours.
 */
#include "compat.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

enum { LEGACY_SIZE = 512, AREA_SIZE = 4096, MXCSR_AT = 24, FIP_AT = 8, FDP_AT = 16, XSTATE_BV_AT = 512 };
enum { FCW_ALL_MASKED = 0x3f, FSW_ES = 0x80, COMPONENT_X87 = 1, MXCSR_INIT = 0x1f80 };
enum { STUB_SIZE = 4, REGISTER_STUBS = 8 * 64, MEMORY_STUBS = 8 * 8, CODE_SIZE = 4096 };
_Static_assert((REGISTER_STUBS + MEMORY_STUBS) * STUB_SIZE <= CODE_SIZE, "the stubs fit their page");

/* Register forms by opcode - 0xd8: bit n stands for ModRM byte 0xc0 + n. FCMOVcc reads flags, (F)(U)COMI(P) sets them. */
static const uint64_t register_forms[8] = {
    0xffffffffffffffff, /* D8 FADD FMUL FCOM FCOMP FSUB FSUBR FDIV FDIVR */
    0xffff7f330001ffff, /* D9 FLD FXCH FNOP FCHS FABS FTST FXAM FLD1..FLDZ F2XM1..FCOS */
    0x00000200ffffffff, /* DA FCMOVB FCMOVE FCMOVBE FCMOVU FUCOMPP */
    0x00ffff08ffffffff, /* DB FCMOVNB FCMOVNE FCMOVNBE FCMOVNU FNINIT FUCOMI FCOMI */
    0xffffffff0000ffff, /* DC FADD FMUL FSUBR FSUB FDIVR FDIV */
    0x0000ffffffff00ff, /* DD FFREE FST FSTP FUCOM FUCOMP */
    0xffffffff0200ffff, /* DE FADDP FMULP FCOMPP FSUBRP FSUBP FDIVRP FDIVP */
    0x00ffff0000000000, /* DF FUCOMIP FCOMIP */
};

/* Memory forms by opcode - 0xd8 and ModRM.reg: bytes of the operand, negative where it is stored, 0: not ours. */
static const int8_t memory_forms[8][8] = {
    {4, 4, 4, 4, 4, 4, 4, 4},        /* D8 arithmetic, m32 */
    {4, 0, -4, -4, 0, 0, 0, -2},     /* D9 FLD FST FSTP m32, FNSTCW */
    {4, 4, 4, 4, 4, 4, 4, 4},        /* DA arithmetic, m32 integer */
    {4, -4, -4, -4, 0, 10, 0, -10},  /* DB FILD FISTTP FIST FISTP m32, FLD FSTP m80 */
    {8, 8, 8, 8, 8, 8, 8, 8},        /* DC arithmetic, m64 */
    {8, -8, -8, -8, 0, 0, 0, -2},    /* DD FLD FISTTP FST FSTP m64, FNSTSW */
    {2, 2, 2, 2, 2, 2, 2, 2},        /* DE arithmetic, m16 integer */
    {2, -2, -2, -2, 10, 8, -10, -8}, /* DF FILD FISTTP FIST FISTP m16, FBLD, FILD m64, FBSTP, FISTP m64 */
};

/* The page of stubs: the instruction (memory operand at RSI), then RET. Written once, then executable only. */
static uint8_t *stubs;

static void make_stubs(void)
{
    uint8_t *page = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return;
    for (unsigned n = 0; n < REGISTER_STUBS + MEMORY_STUBS; n++) {
        bool memory = n >= REGISTER_STUBS;
        unsigned opcode = memory ? (n - REGISTER_STUBS) / 8 : n / 64;
        unsigned modrm = memory ? (n % 8) << 3 | 6 : 0xc0 + n % 64; /* mod 0, r/m 6: (%rsi) */
        const uint8_t stub[STUB_SIZE] = {(uint8_t)(0xd8 + opcode), (uint8_t)modrm, 0xc3, 0xcc};
        memcpy(page + n * STUB_SIZE, stub, STUB_SIZE);
    }
    if (mprotect(page, CODE_SIZE, PROT_READ | PROT_EXEC) == 0)
        stubs = page;
    else
        munmap(page, CODE_SIZE);
}

/* `area` and `ours` are FXSAVE images. Our own x87 and SSE registers are put back before this returns. */
static void execute(uint8_t *area, uint8_t *ours, const uint8_t *stub, uint8_t *operand, uint64_t *flags)
{
    /* The stack pointer is moved clear of the red zone, which pushes would overwrite. */
    __asm__ volatile("lea -128(%%rsp), %%rsp\n\t"
                     "fxsave64 (%[ours])\n\t"
                     "fxrstor64 (%[area])\n\t"
                     "pushq %[flags]\n\t"
                     "popfq\n\t"
                     "call *%[stub]\n\t"
                     "pushfq\n\t"
                     "popq %[flags]\n\t"
                     "fxsave64 (%[area])\n\t"
                     "fxrstor64 (%[ours])\n\t"
                     "lea 128(%%rsp), %%rsp\n\t"
                     : [flags] "+r"(*flags)
                     : [area] "r"(area), [ours] "r"(ours), [stub] "r"(stub), "S"(operand)
                     : "memory", "cc");
}

/* The guest's x87 state as an FXSAVE image, or false where executing it here would not be safe. */
static bool load_state(const uint8_t *area, uint8_t *image)
{
    uint64_t in_use;
    memcpy(&in_use, area + XSTATE_BV_AT, sizeof in_use);
    memset(image, 0, LEGACY_SIZE);
    if (in_use & COMPONENT_X87) {
        memcpy(image, area, MXCSR_AT);
        memcpy(image + 32, area + 32, 128);
    } else {
        memcpy(image, &(uint16_t){0x037f}, 2);
    }
    memcpy(image + MXCSR_AT, &(uint32_t){MXCSR_INIT}, 4);
    return (image[0] & FCW_ALL_MASKED) == FCW_ALL_MASKED && !(image[2] & FSW_ES);
}

enum outcome complete_x87(struct completion *c)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_stubs);
    const struct insn *i = &c->insn;
    unsigned opcode = i->opcode - 0xd8u, reg = i->reg & 7, form = reg << 3 | (i->rm & 7);
    int size = i->memory ? memory_forms[opcode][reg] : 0;
    if (!stubs || (i->memory ? !size : !(register_forms[opcode] >> form & 1)))
        return COMPLETE_UNKNOWN;
    if (c->sregs.cr0 & (CR0_EM | CR0_TS))
        return fault(c, V_NM);

    _Alignas(64) uint8_t area[AREA_SIZE], image[LEGACY_SIZE], ours[LEGACY_SIZE];
    if (!c->source->get_xsave(c->source->opaque, area) || !load_state(area, image))
        return COMPLETE_UNKNOWN;
    uint8_t operand[16] = {0};
    struct span span;
    uint64_t linear = 0;
    if (size) {
        const enum access access = size < 0 ? ACCESS_WRITE : ACCESS_READ;
        const size_t n = (size_t)(size < 0 ? -size : size);
        enum outcome o = operand_linear(c, n, access, &linear);
        if (o == COMPLETE_DONE)
            o = linear_span(c, linear, n, access, &span);
        if (o != COMPLETE_DONE)
            return o;
        if (size > 0)
            span_read(&span, 0, operand, n);
    }

    uint64_t flags = 2 | (c->regs.rflags & FLAG_ARITHMETIC);
    const uint8_t *stub =
        stubs + STUB_SIZE * (i->memory ? REGISTER_STUBS + opcode * 8 + reg : opcode * 64 + form);
    execute(image, ours, stub, operand, &flags);

    c->regs.rflags = (c->regs.rflags & ~(uint64_t)FLAG_ARITHMETIC) | (flags & FLAG_ARITHMETIC);
    memcpy(image + FIP_AT, &c->regs.rip, 8); /* never an address of ours */
    memcpy(image + FDP_AT, &linear, 8);
    memcpy(area, image, MXCSR_AT);
    memcpy(area + 32, image + 32, 128);
    area[XSTATE_BV_AT] |= COMPONENT_X87;
    if (!c->source->set_xsave(c->source->opaque, area))
        return COMPLETE_UNKNOWN;
    if (size < 0)
        span_write(&span, 0, operand, (size_t)-size);
    return COMPLETE_DONE;
}
