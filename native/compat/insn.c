/* SPDX-License-Identifier: Apache-2.0 */
/* Decoding of x86 instructions (Intel SDM volume 2, chapter 2): legacy, REX and VEX encodings; EVEX is
 * refused. */
#include "compat.h"

struct reader {
    const uint8_t *bytes;
    size_t n, at;
    bool short_of_bytes;
};

static uint64_t take(struct reader *r, unsigned size)
{
    if (r->n - r->at < size) {
        r->short_of_bytes = true;
        return 0;
    }
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++)
        value |= (uint64_t)r->bytes[r->at++] << (8 * i);
    return value;
}

static int64_t take_signed(struct reader *r, unsigned size)
{
    unsigned unused = 64 - 8 * size;
    return (int64_t)(take(r, size) << unused) >> unused;
}

/* The primary map's opcodes that take part in a remedy; every other is refused. */
static bool primary_form(uint8_t opcode, unsigned operand_size, bool *modrm, uint8_t *immediate)
{
    *modrm = false;
    *immediate = 0;
    if ((opcode & 0xf8) == 0x50) /* PUSH r */
        return true;
    if ((opcode & 0xf8) == 0xd8) /* x87 */
        return *modrm = true;
    switch (opcode) {
    case 0x68: /* PUSH imm16/imm32 */
        *immediate = operand_size == 2 ? 2 : 4;
        return true;
    case 0x6a: /* PUSH imm8 */
    case 0xcd: /* INT n */
        *immediate = 1;
        return true;
    case 0xca: /* RETF imm16 */
        *immediate = 2;
        return true;
    case 0x90: /* NOP */
    case 0x9b: /* FWAIT */
    case 0xcb: /* RETF */
    case 0xcc: /* INT3 */
    case 0xce: /* INTO */
    case 0xcf: /* IRET */
    case 0xf1: /* INT1 */
    case 0xfc: /* CLD */
        return true;
    default:
        return false;
    }
}

/* SDM volume 2, table A-3: two-byte opcodes without ModRM, and those with an immediate byte. */
static void two_byte_form(uint8_t opcode, bool *modrm, uint8_t *immediate)
{
    *modrm = !((opcode >= 0x05 && opcode <= 0x09) || opcode == 0x0b || opcode == 0x0e ||
               (opcode >= 0x30 && opcode <= 0x37) || opcode == 0x77 || (opcode >= 0x80 && opcode <= 0x8f) ||
               (opcode >= 0xa0 && opcode <= 0xa2) || (opcode >= 0xa8 && opcode <= 0xaa) ||
               (opcode >= 0xc8 && opcode <= 0xcf));
    bool byte = (opcode >= 0x70 && opcode <= 0x73) || opcode == 0xa4 || opcode == 0xac || opcode == 0xba ||
                opcode == 0xc2 || (opcode >= 0xc4 && opcode <= 0xc6);
    *immediate = byte ? 1 : opcode >= 0x80 && opcode <= 0x8f ? 4 : 0;
}

static void memory_operand_16(struct insn *insn, struct reader *r, uint8_t rm)
{
    static const uint8_t bases[8] = {3, 3, 5, 5, 6, 7, 5, 3};
    static const uint8_t indexes[8] = {6, 7, 6, 7, REG_NONE, REG_NONE, REG_NONE, REG_NONE};
    insn->base = bases[rm];
    insn->index = indexes[rm];
    if (insn->mod == 0 && rm == 6) {
        insn->base = REG_NONE;
        insn->displacement = (int32_t)take_signed(r, 2);
    } else if (insn->mod != 0) {
        insn->displacement = (int32_t)take_signed(r, insn->mod);
    }
}

static void memory_operand_32(struct insn *insn, struct reader *r, uint8_t rm, uint8_t rex_x, uint8_t rex_b)
{
    unsigned displacement_size = insn->mod == 1 ? 1 : insn->mod == 2 ? 4 : 0;
    insn->base = rm | rex_b;
    if (rm == 4) {
        uint8_t sib = (uint8_t)take(r, 1);
        insn->scale = sib >> 6;
        insn->index = (uint8_t)((sib >> 3 & 7) | rex_x);
        if (insn->index == 4)
            insn->index = REG_NONE;
        insn->base = (sib & 7) | rex_b;
        if ((sib & 7) == 5 && insn->mod == 0) {
            insn->base = REG_NONE;
            displacement_size = 4;
        }
    } else if (rm == 5 && insn->mod == 0) {
        insn->base = REG_NONE;
        insn->rip_relative = insn->long_mode;
        displacement_size = 4;
    }
    if (displacement_size)
        insn->displacement = (int32_t)take_signed(r, displacement_size);
}

static uint8_t default_segment(const struct insn *insn)
{
    return insn->base == REG_RSP || insn->base == REG_RBP ? SEG_SS : SEG_DS;
}

bool insn_decode(struct insn *insn, const uint8_t *bytes, size_t n, enum cpu_mode mode)
{
    static const uint8_t segment_prefixes[6] = {0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65};
    struct reader r = {bytes, n < INSN_MAX ? n : INSN_MAX, 0, false};
    uint8_t rex = 0, override = SEG_NONE;
    bool addrsize = false;

    *insn = (struct insn){.index = REG_NONE, .base = REG_NONE, .long_mode = mode == CPU_64};

    uint8_t byte;
    for (;;) { /* bounded by INSN_MAX: take() runs dry */
        byte = (uint8_t)take(&r, 1);
        if (r.short_of_bytes)
            return false;
        uint8_t segment = 0;
        while (segment < 6 && segment_prefixes[segment] != byte)
            segment++;
        if (segment < 6) {
            /* In 64-bit mode the four old overrides are ignored, and do not undo FS or GS. */
            if (mode != CPU_64 || segment >= SEG_FS)
                override = segment;
        } else if (byte == 0x66) {
            insn->opsize = true;
        } else if (byte == 0x67) {
            addrsize = true;
        } else if (byte == 0xf0) {
            insn->lock = true;
        } else if (byte == 0xf2 || byte == 0xf3) {
            insn->prefix = byte;
        } else if (mode == CPU_64 && (byte & 0xf0) == 0x40) {
            rex = byte; /* counts only when it comes last */
            continue;
        } else {
            break;
        }
        rex = 0;
    }
    if (!insn->prefix && insn->opsize)
        insn->prefix = 0x66;
    insn->rex = rex != 0;
    insn->w = rex & 8;
    uint8_t rex_r = rex & 4 ? 8 : 0, rex_x = rex & 2 ? 8 : 0, rex_b = rex & 1 ? 8 : 0;

    bool vex = byte == 0xc4 || byte == 0xc5;
    if (vex) {
        /* Outside 64-bit mode C4 and C5 are LES and LDS unless the next byte's top bits would be mod = 3. */
        uint8_t first = (uint8_t)take(&r, 1), second = first;
        if ((mode != CPU_64 && first < 0xc0) || insn->prefix || rex || insn->lock)
            return false;
        rex_r = first & 0x80 ? 0 : 8;
        insn->map = MAP_0F;
        if (byte == 0xc4) {
            second = (uint8_t)take(&r, 1);
            rex_x = first & 0x40 ? 0 : 8;
            rex_b = first & 0x20 ? 0 : 8;
            insn->map = first & 0x1f;
            insn->w = second & 0x80;
        }
        static const uint8_t implied[4] = {0, 0x66, 0xf3, 0xf2};
        insn->prefix = implied[second & 3];
        insn->vex = true;
        insn->vvvv = ~second >> 3 & 15;
        insn->vector_256 = second >> 2 & 1;
        if (mode != CPU_64) { /* eight registers only: the extension bits are not extensions there */
            rex_r = rex_x = rex_b = 0;
            insn->vvvv &= 7;
            insn->w = false;
        }
        if (insn->map < MAP_0F || insn->map > MAP_0F3A)
            return false;
        byte = (uint8_t)take(&r, 1);
    } else if (byte == 0x0f) {
        insn->map = MAP_0F;
        byte = (uint8_t)take(&r, 1);
        if (byte == 0x38 || byte == 0x3a) {
            insn->map = byte == 0x38 ? MAP_0F38 : MAP_0F3A;
            byte = (uint8_t)take(&r, 1);
        }
    }
    insn->opcode = byte;

    bool narrow = (mode == CPU_16) != insn->opsize;
    insn->operand_size = insn->w ? 8 : narrow && !vex ? 2 : 4;
    insn->address_size = mode == CPU_64 ? (addrsize ? 4 : 8) : (mode == CPU_16) != addrsize ? 2 : 4;

    insn->has_modrm = true;
    if (insn->map == MAP_PRIMARY) {
        if (!primary_form(byte, insn->operand_size, &insn->has_modrm, &insn->immediate_size))
            return false;
        insn->rm = (byte & 7) | rex_b; /* PUSH r */
    } else if (insn->map == MAP_0F) {
        two_byte_form(byte, &insn->has_modrm, &insn->immediate_size);
    } else if (insn->map == MAP_0F3A) {
        insn->immediate_size = 1;
    }

    if (insn->has_modrm) {
        uint8_t modrm = (uint8_t)take(&r, 1);
        insn->mod = modrm >> 6;
        insn->reg = (uint8_t)((modrm >> 3 & 7) | rex_r);
        insn->memory = insn->mod != 3;
        if (!insn->memory)
            insn->rm = (modrm & 7) | rex_b;
        else if (insn->address_size == 2)
            memory_operand_16(insn, &r, modrm & 7);
        else
            memory_operand_32(insn, &r, modrm & 7, rex_x, rex_b);
    }
    if (insn->immediate_size)
        insn->immediate = (uint64_t)take_signed(&r, insn->immediate_size);
    insn->segment = override != SEG_NONE ? override : default_segment(insn);
    insn->length = (uint8_t)r.at;
    return !r.short_of_bytes;
}
