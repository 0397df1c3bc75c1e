/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Floating-point state: FWAIT, MXCSR, and the XSAVE family (Intel SDM volume 1, chapter 13). The vCPU's own
 * state is an XSAVE area in standard format as KVM hands it out; a component whose XSTATE_BV bit is clear is
 * in its initial configuration.
 */
#include "compat.h"

#include <cpuid.h>
#include <string.h>

enum { AREA_SIZE = 4096, LEGACY_SIZE = 512, HEADER_SIZE = 64, EXTENDED_AT = LEGACY_SIZE + HEADER_SIZE };
enum { FSW_AT = 2, FTW_AT = 4, MXCSR_AT = 24, MXCSR_MASK_AT = 28, XSTATE_BV_AT = 512, XCOMP_BV_AT = 520 };
enum { COMPONENT_X87 = 1, COMPONENT_SSE = 2, COMPONENT_AVX = 4, N_COMPONENTS = 32 };
enum { MXCSR_INIT = 0x1f80, MSR_XSS = 0xda0 };
#define COMPACTED (1ull << 63)

void xsave_layout_init(struct xsave_layout *layout)
{
    memset(layout, 0, sizeof *layout);
    for (unsigned i = 2; i < N_COMPONENTS; i++) {
        uint32_t size = 0, offset = 0, ecx = 0, edx = 0;
        if (!__get_cpuid_count(0xd, i, &size, &offset, &ecx, &edx) || size > AREA_SIZE ||
            offset > AREA_SIZE - size)
            continue; /* does not fit KVM's area (AMX): stays absent, and refused below */
        layout->size[i] = size;
        layout->offset[i] = offset;
        if (ecx & 2)
            layout->aligned |= 1u << i;
    }
}

/* A component's place in an area that holds `present`; the bytes of the whole area for i = N_COMPONENTS. */
static size_t compacted_offset(const struct xsave_layout *layout, uint64_t present, unsigned i)
{
    size_t at = EXTENDED_AT;
    for (unsigned n = 2; n < N_COMPONENTS; n++) {
        if (!(present >> n & 1))
            continue;
        if (layout->aligned >> n & 1)
            at = (at + 63) & ~(size_t)63;
        if (n == i)
            return at;
        at += layout->size[n];
    }
    return at;
}

static size_t area_size(const struct xsave_layout *layout, uint64_t components, bool compacted)
{
    if (compacted)
        return compacted_offset(layout, components, N_COMPONENTS);
    size_t size = EXTENDED_AT;
    for (unsigned i = 2; i < N_COMPONENTS; i++)
        if (components >> i & 1 && layout->offset[i] + layout->size[i] > size)
            size = layout->offset[i] + layout->size[i];
    return size;
}

static size_t component_offset(const struct xsave_layout *layout, uint64_t components, bool compacted,
                               unsigned i)
{
    return compacted ? compacted_offset(layout, components, i) : layout->offset[i];
}

static bool known(const struct xsave_layout *layout, uint64_t components)
{
    for (unsigned i = 2; i < 63; i++)
        if (components >> i & 1 && (i >= N_COMPONENTS || !layout->size[i]))
            return false;
    return true;
}

static uint64_t load64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static void store64(uint8_t *at, uint64_t value)
{
    memcpy(at, &value, sizeof value);
}

static void store32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof value);
}

static bool fpu_get(struct completion *c, uint8_t *area)
{
    return c->source->get_xsave(c->source->opaque, area);
}

static enum outcome fpu_set(struct completion *c, const uint8_t *area)
{
    return c->source->set_xsave(c->source->opaque, area) ? COMPLETE_DONE : COMPLETE_UNKNOWN;
}

/* The bytes of an absent x87 component: what FNINIT leaves. */
static void x87_initial(uint8_t *area)
{
    memset(area, 0, MXCSR_AT);
    memset(area + 32, 0, 128);
    area[0] = 0x7f; /* FCW = 037f */
    area[1] = 0x03;
}

enum outcome complete_fwait(struct completion *c)
{
    if ((c->sregs.cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
        return fault(c, V_NM);
    uint8_t area[AREA_SIZE];
    if (!fpu_get(c, area))
        return COMPLETE_UNKNOWN;
    bool pending = load64(area + XSTATE_BV_AT) & COMPONENT_X87 && area[FSW_AT] & 0x80;
    if (!pending)
        return COMPLETE_DONE;
    return c->sregs.cr0 & CR0_NE ? fault(c, V_MF) : COMPLETE_UNKNOWN; /* else FERR# and IRQ 13 */
}

/*
 * The x87 control instructions a kernel uses outside arithmetic: FNSTSW AX (DF E0), FNCLEX (DB E2), FLDCW (D9
 * /5), and EMMS (0F 77).
 */
enum outcome complete_x87_control(struct completion *c)
{
    enum { FCW_RESERVED_ONE = 0x40, FSW_EXCEPTIONS = 0xff, FSW_ES = 0x80, FSW_B = 0x8000 };
    const struct insn *i = &c->insn;
    bool emms = i->map == MAP_0F, fldcw = i->opcode == 0xd9 && i->memory, fnstsw = i->opcode == 0xdf;
    if (emms && c->sregs.cr0 & CR0_EM)
        return fault(c, V_UD);
    if (c->sregs.cr0 & (CR0_EM | CR0_TS))
        return fault(c, V_NM);
    uint8_t area[AREA_SIZE];
    if (!fpu_get(c, area))
        return COMPLETE_UNKNOWN;
    if (!(load64(area + XSTATE_BV_AT) & COMPONENT_X87))
        x87_initial(area);
    uint16_t fcw = (uint16_t)load32(area), fsw = (uint16_t)(load32(area) >> 16);
    if (fnstsw) {
        gpr_write(c, 0, 2, fsw);
        return COMPLETE_DONE;
    }
    if ((emms || fldcw) && fsw & FSW_ES)
        return c->sregs.cr0 & CR0_NE ? fault(c, V_MF) : COMPLETE_UNKNOWN;
    if (emms) {
        area[FTW_AT] = 0; /* every register empty */
    } else if (fldcw) {
        uint64_t value;
        enum outcome o = rm_read(c, 2, &value);
        if (o != COMPLETE_DONE)
            return o;
        fcw = (uint16_t)((value & 0x1f3f) | FCW_RESERVED_ONE);
        bool unmasked = fsw & ~fcw & 0x3f;
        fsw = (uint16_t)(unmasked ? fsw | FSW_ES | FSW_B : fsw & ~(FSW_ES | FSW_B));
    } else {
        fsw &= (uint16_t) ~(FSW_EXCEPTIONS | FSW_B);
    }
    store32(area, fcw | (uint32_t)fsw << 16);
    store64(area + XSTATE_BV_AT, load64(area + XSTATE_BV_AT) | COMPONENT_X87);
    return fpu_set(c, area);
}

static uint32_t mxcsr_mask(const uint8_t *area)
{
    uint32_t mask = load32(area + MXCSR_MASK_AT);
    return mask ? mask : 0xffbf; /* SDM volume 1, 11.6.6 */
}

/* LDMXCSR (/2), STMXCSR (/3). */
enum outcome complete_mxcsr(struct completion *c)
{
    if (c->sregs.cr0 & CR0_EM || !(c->sregs.cr4 & CR4_OSFXSR))
        return fault(c, V_UD);
    if (c->sregs.cr0 & CR0_TS)
        return fault(c, V_NM);
    uint8_t area[AREA_SIZE];
    if (!fpu_get(c, area))
        return COMPLETE_UNKNOWN;
    bool sse_in_use = load64(area + XSTATE_BV_AT) & (COMPONENT_SSE | COMPONENT_AVX);
    if ((c->insn.reg & 7) == 3)
        return rm_write(c, 4, sse_in_use ? load32(area + MXCSR_AT) : MXCSR_INIT);

    uint64_t value;
    enum outcome o = rm_read(c, 4, &value);
    if (o != COMPLETE_DONE)
        return o;
    if (value & ~(uint64_t)mxcsr_mask(area))
        return fault_error(c, V_GP, 0);
    if (!(load64(area + XSTATE_BV_AT) & COMPONENT_SSE))
        memset(area + 160, 0, 256); /* initial XMM registers, which setting the bit makes count */
    store32(area + MXCSR_AT, (uint32_t)value);
    store64(area + XSTATE_BV_AT, load64(area + XSTATE_BV_AT) | COMPONENT_SSE);
    return fpu_set(c, area);
}

/* Which of the family: 0F AE has XSAVE, XSAVEOPT, XRSTOR; 0F C7 has XSAVEC, XSAVES, XRSTORS. */
static bool compacting(const struct insn *i)
{
    return i->opcode == 0xc7;
}

static bool supervisor(const struct insn *i)
{
    return i->opcode == 0xc7 && (i->reg & 7) != 4;
}

/* What the family checks before it looks at memory. *components is the requested-feature bitmap. */
static enum outcome xsave_enter(struct completion *c, uint64_t *linear, uint64_t *components, uint64_t *xcr0)
{
    uint64_t xss = 0;
    if (!(c->sregs.cr4 & CR4_OSXSAVE))
        return fault(c, V_UD);
    if (supervisor(&c->insn) && completion_cpl(c) != 0)
        return fault_error(c, V_GP, 0);
    if (c->sregs.cr0 & CR0_TS)
        return fault(c, V_NM);
    if (!c->source->get_xcr0(c->source->opaque, xcr0))
        return COMPLETE_UNKNOWN;
    if (supervisor(&c->insn) && c->source->get_msr(c->source->opaque, MSR_XSS, &xss) && xss)
        return COMPLETE_UNKNOWN; /* supervisor components: KVM's area has none */
    *components = ((uint64_t)(uint32_t)c->regs.rdx << 32 | (uint32_t)c->regs.rax) & *xcr0;
    enum outcome o = operand_linear(c, EXTENDED_AT, ACCESS_READ, linear);
    if (o != COMPLETE_DONE)
        return o;
    if (*linear & 63)
        return fault_error(c, V_GP, 0);
    return known(&c->source->layout, *components) ? COMPLETE_DONE : COMPLETE_UNKNOWN;
}

static size_t xmm_bytes(const struct completion *c)
{
    return c->insn.long_mode ? 256 : 128;
}

enum outcome complete_xsave(struct completion *c)
{
    const struct xsave_layout *layout = &c->source->layout;
    bool compact = compacting(&c->insn), optimize = compact || (c->insn.reg & 7) == 6;
    uint64_t linear, components, xcr0;
    enum outcome o = xsave_enter(c, &linear, &components, &xcr0);
    if (o != COMPLETE_DONE)
        return o;
    struct span to;
    o = linear_span(c, linear, area_size(layout, components, compact), ACCESS_WRITE, &to);
    if (o != COMPLETE_DONE)
        return o;
    uint8_t area[AREA_SIZE];
    if (!fpu_get(c, area))
        return COMPLETE_UNKNOWN;

    uint64_t in_use = load64(area + XSTATE_BV_AT);
    if (!(in_use & COMPONENT_X87))
        x87_initial(area);
    if (!(in_use & (COMPONENT_SSE | COMPONENT_AVX)))
        store32(area + MXCSR_AT, MXCSR_INIT);
    if (!(in_use & COMPONENT_SSE))
        memset(area + 160, 0, 256);
    if (!c->insn
             .w) { /* the 32-bit form has selectors, zero on every processor with XSAVEC, above FIP and FDP */
        store32(area + 12, 0);
        store32(area + 20, 0);
    }
    if (compact && load32(area + MXCSR_AT) != MXCSR_INIT)
        in_use |= COMPONENT_SSE; /* MXCSR belongs to SSE there: SDM volume 1, 13.6 */

    uint64_t written = optimize ? components & in_use : components;
    if (written & COMPONENT_X87) {
        span_write(&to, 0, area, MXCSR_AT);
        span_write(&to, 32, area + 32, 128);
    }
    if (written & COMPONENT_SSE)
        span_write(&to, 160, area + 160, xmm_bytes(c));
    if (compact ? written & COMPONENT_SSE : components & (COMPONENT_SSE | COMPONENT_AVX))
        span_write(&to, MXCSR_AT, area + MXCSR_AT, 8);
    for (unsigned i = 2; i < N_COMPONENTS; i++) {
        if (!(written >> i & 1))
            continue;
        if (!(in_use >> i & 1))
            memset(area + layout->offset[i], 0, layout->size[i]);
        span_write(&to, component_offset(layout, components, compact, i), area + layout->offset[i],
                   layout->size[i]);
    }
    uint8_t header[16];
    span_read(&to, XSTATE_BV_AT, header, sizeof header);
    uint64_t kept = compact ? 0 : load64(header) & ~components;
    store64(header, kept | (components & in_use));
    store64(header + 8, components | COMPACTED);
    span_write(&to, XSTATE_BV_AT, header, compact ? 16 : 8);
    return COMPLETE_DONE;
}

/* SDM volume 1, 13.8 and 13.12: a header no processor of this kind could have written is #GP. */
static bool header_legal(const uint8_t *header, uint64_t xcr0, bool must_be_compact)
{
    uint64_t xstate_bv = load64(header), xcomp_bv = load64(header + 8);
    bool compact = xcomp_bv & COMPACTED;
    if (xstate_bv & ~xcr0 || (must_be_compact && !compact))
        return false;
    if (compact ? xcomp_bv & ~xcr0 & ~COMPACTED || xstate_bv & ~xcomp_bv : xcomp_bv != 0)
        return false;
    for (unsigned i = 16; i < (compact ? HEADER_SIZE : 24u); i++)
        if (header[i])
            return false;
    return true;
}

enum outcome complete_xrstor(struct completion *c)
{
    const struct xsave_layout *layout = &c->source->layout;
    uint64_t linear, components, xcr0;
    enum outcome o = xsave_enter(c, &linear, &components, &xcr0);
    if (o != COMPLETE_DONE)
        return o;
    struct span from;
    o = linear_span(c, linear, EXTENDED_AT, ACCESS_READ, &from);
    if (o != COMPLETE_DONE)
        return o;
    /* Copied once: what another vCPU writes meanwhile cannot come between a check and its use. */
    uint8_t source[AREA_SIZE];
    span_read(&from, 0, source, EXTENDED_AT);
    if (!header_legal(source + LEGACY_SIZE, xcr0, supervisor(&c->insn)))
        return fault_error(c, V_GP, 0);
    uint64_t present = load64(source + XSTATE_BV_AT), held = load64(source + XCOMP_BV_AT) & ~COMPACTED;
    bool compact = load64(source + XCOMP_BV_AT) & COMPACTED;
    if (!known(layout, held))
        return COMPLETE_UNKNOWN;
    size_t size = area_size(layout, compact ? held : components & present, compact);
    if (size > AREA_SIZE)
        return COMPLETE_UNKNOWN;
    o = linear_span(c, linear, size, ACCESS_READ, &from);
    if (o != COMPLETE_DONE)
        return o;
    span_read(&from, EXTENDED_AT, source + EXTENDED_AT, size - EXTENDED_AT);

    uint8_t area[AREA_SIZE];
    if (!fpu_get(c, area))
        return COMPLETE_UNKNOWN;
    uint64_t in_use = load64(area + XSTATE_BV_AT);
    uint32_t mxcsr = in_use & (COMPONENT_SSE | COMPONENT_AVX) ? load32(area + MXCSR_AT) : MXCSR_INIT;
    if (compact ? components & COMPONENT_SSE : components & (COMPONENT_SSE | COMPONENT_AVX))
        mxcsr = compact && !(present & COMPONENT_SSE) ? MXCSR_INIT : load32(source + MXCSR_AT);
    if (mxcsr & ~mxcsr_mask(area))
        return fault_error(c, V_GP, 0);

    uint64_t loaded = components & present;
    if (loaded & COMPONENT_X87) {
        memcpy(area, source, MXCSR_AT);
        memcpy(area + 32, source + 32, 128);
        if (!c->insn.w) {
            store32(area + 12, 0);
            store32(area + 20, 0);
        }
    }
    if (loaded & COMPONENT_SSE)
        memcpy(area + 160, source + 160, xmm_bytes(c));
    for (unsigned i = 2; i < N_COMPONENTS; i++)
        if (loaded >> i & 1)
            memcpy(area + layout->offset[i], source + component_offset(layout, held, compact, i),
                   layout->size[i]);
    in_use = (in_use & ~components) | loaded;
    if (mxcsr != MXCSR_INIT && !(in_use & COMPONENT_SSE)) {
        memset(area + 160, 0, 256);
        in_use |= COMPONENT_SSE; /* or KVM would not take MXCSR */
    }
    store32(area + MXCSR_AT, mxcsr);
    store64(area + XSTATE_BV_AT, in_use);
    return fpu_set(c, area);
}
