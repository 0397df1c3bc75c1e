/* SPDX-License-Identifier: Apache-2.0 */
/*
 * General-register instructions (Intel SDM volume 2). Flags the architecture leaves undefined keep their
 * value.
 */
#include "compat.h"

#include <errno.h>
#include <sys/random.h>

static uint64_t width_mask(unsigned size)
{
    return size == 8 ? ~0ull : (1ull << (8 * size)) - 1;
}

static void set_flags(struct completion *c, uint64_t changed, uint64_t set)
{
    c->regs.rflags = (c->regs.rflags & ~changed) | set;
}

static uint64_t sign_zero(uint64_t value, unsigned size)
{
    return (value ? 0 : FLAG_ZF) | (value >> (8 * size - 1) & 1 ? FLAG_SF : 0);
}

enum outcome complete_popcnt(struct completion *c)
{
    uint64_t value;
    enum outcome o = rm_read(c, c->insn.operand_size, &value);
    if (o != COMPLETE_DONE)
        return o;
    gpr_write(c, c->insn.reg, c->insn.operand_size, (unsigned)__builtin_popcountll(value));
    set_flags(c, FLAG_ARITHMETIC, value ? 0 : FLAG_ZF);
    return COMPLETE_DONE;
}

static enum outcome count_zeros(struct completion *c, bool leading)
{
    unsigned size = c->insn.operand_size, bits = 8 * size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    unsigned n = bits;
    if (value)
        n = leading ? (unsigned)__builtin_clzll(value) - (64 - bits) : (unsigned)__builtin_ctzll(value);
    gpr_write(c, c->insn.reg, size, n);
    set_flags(c, FLAG_CF | FLAG_ZF, (value ? 0 : FLAG_CF) | (n ? 0 : FLAG_ZF));
    return COMPLETE_DONE;
}

/* BSF, BSR: what the same bytes are without the feature, which ignore F3. A source of zero leaves the register. */
static enum outcome scan_bits(struct completion *c, bool reverse)
{
    unsigned size = c->insn.operand_size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    set_flags(c, FLAG_ZF, value ? 0 : FLAG_ZF);
    if (value)
        gpr_write(c, c->insn.reg, size,
                  reverse ? 63 - (unsigned)__builtin_clzll(value) : (unsigned)__builtin_ctzll(value));
    return COMPLETE_DONE;
}

enum outcome complete_lzcnt(struct completion *c)
{
    return offered(c, LZCNT) ? count_zeros(c, true) : scan_bits(c, true);
}

enum outcome complete_tzcnt(struct completion *c)
{
    return offered(c, BMI1) ? count_zeros(c, false) : scan_bits(c, false);
}

enum outcome complete_andn(struct completion *c)
{
    unsigned size = c->insn.operand_size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    value &= ~gpr_read(c, c->insn.vvvv, size);
    gpr_write(c, c->insn.reg, size, value);
    set_flags(c, FLAG_SF | FLAG_ZF | FLAG_OF | FLAG_CF, sign_zero(value, size));
    return COMPLETE_DONE;
}

enum outcome complete_bextr(struct completion *c)
{
    unsigned size = c->insn.operand_size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    uint64_t control = gpr_read(c, c->insn.vvvv, size);
    unsigned start = control & 0xff, n = control >> 8 & 0xff;
    value = start < 64 ? value >> start : 0;
    if (n < 64)
        value &= (1ull << n) - 1;
    gpr_write(c, c->insn.reg, size, value);
    set_flags(c, FLAG_ZF | FLAG_OF | FLAG_CF, value ? 0 : FLAG_ZF);
    return COMPLETE_DONE;
}

/* BLSR (/1), BLSMSK (/2), BLSI (/3): the destination is vvvv. */
enum outcome complete_bls(struct completion *c)
{
    unsigned size = c->insn.operand_size, which = c->insn.reg & 7;
    uint64_t source;
    enum outcome o = rm_read(c, size, &source);
    if (o != COMPLETE_DONE)
        return o;
    uint64_t value = which == 1   ? source & (source - 1)
                     : which == 2 ? source ^ (source - 1)
                                  : source & -source;
    value &= width_mask(size);
    gpr_write(c, c->insn.vvvv, size, value);
    bool carry = which == 3 ? source != 0 : source == 0;
    set_flags(c, FLAG_SF | FLAG_ZF | FLAG_OF | FLAG_CF, sign_zero(value, size) | (carry ? FLAG_CF : 0));
    return COMPLETE_DONE;
}

enum outcome complete_bzhi(struct completion *c)
{
    unsigned size = c->insn.operand_size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    unsigned n = gpr_read(c, c->insn.vvvv, size) & 0xff;
    bool beyond = n >= 8 * size;
    if (!beyond)
        value &= (1ull << n) - 1;
    gpr_write(c, c->insn.reg, size, value);
    set_flags(c, FLAG_SF | FLAG_ZF | FLAG_OF | FLAG_CF, sign_zero(value, size) | (beyond ? FLAG_CF : 0));
    return COMPLETE_DONE;
}

enum outcome complete_pdep(struct completion *c)
{
    uint64_t mask, source = gpr_read(c, c->insn.vvvv, c->insn.operand_size), value = 0;
    enum outcome o = rm_read(c, c->insn.operand_size, &mask);
    if (o != COMPLETE_DONE)
        return o;
    for (; mask; mask &= mask - 1, source >>= 1)
        if (source & 1)
            value |= mask & -mask;
    gpr_write(c, c->insn.reg, c->insn.operand_size, value);
    return COMPLETE_DONE;
}

enum outcome complete_pext(struct completion *c)
{
    uint64_t mask, source = gpr_read(c, c->insn.vvvv, c->insn.operand_size), value = 0;
    enum outcome o = rm_read(c, c->insn.operand_size, &mask);
    if (o != COMPLETE_DONE)
        return o;
    for (unsigned at = 0; mask; mask &= mask - 1, at++)
        if (source & mask & -mask)
            value |= 1ull << at;
    gpr_write(c, c->insn.reg, c->insn.operand_size, value);
    return COMPLETE_DONE;
}

enum outcome complete_mulx(struct completion *c)
{
    unsigned size = c->insn.operand_size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    unsigned __int128 product = (unsigned __int128)value * gpr_read(c, 2, size);
    /* Low half first: where both name one register it gets the high half. */
    gpr_write(c, c->insn.vvvv, size, (uint64_t)product & width_mask(size));
    gpr_write(c, c->insn.reg, size, (uint64_t)(product >> (8 * size)) & width_mask(size));
    return COMPLETE_DONE;
}

enum outcome complete_rorx(struct completion *c)
{
    if (c->insn.vvvv != 0)
        return fault(c, V_UD);
    unsigned size = c->insn.operand_size, bits = 8 * size, n = c->insn.immediate & (bits - 1);
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    if (n)
        value = (value >> n | value << (bits - n)) & width_mask(size);
    gpr_write(c, c->insn.reg, size, value);
    return COMPLETE_DONE;
}

/* SHLX, SARX, SHRX: the mandatory prefix says which. */
enum outcome complete_shiftx(struct completion *c)
{
    unsigned size = c->insn.operand_size, bits = 8 * size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    unsigned n = gpr_read(c, c->insn.vvvv, size) & (bits - 1);
    if (c->insn.prefix == 0x66)
        value <<= n;
    else if (c->insn.prefix == 0xf2)
        value >>= n;
    else
        value = (uint64_t)((size == 8 ? (int64_t)value : (int64_t)(int32_t)value) >> n);
    gpr_write(c, c->insn.reg, size, value & width_mask(size));
    return COMPLETE_DONE;
}

static enum outcome add_with(struct completion *c, uint64_t flag)
{
    unsigned size = c->insn.w ? 8 : 4; /* 66 selects ADCX here, not a size */
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    unsigned __int128 sum =
        (unsigned __int128)value + gpr_read(c, c->insn.reg, size) + (c->regs.rflags & flag ? 1 : 0);
    gpr_write(c, c->insn.reg, size, (uint64_t)sum & width_mask(size));
    set_flags(c, flag, sum >> (8 * size) & 1 ? flag : 0);
    return COMPLETE_DONE;
}

enum outcome complete_adcx(struct completion *c)
{
    return add_with(c, FLAG_CF);
}

enum outcome complete_adox(struct completion *c)
{
    return add_with(c, FLAG_OF);
}

static uint64_t reversed(uint64_t value, unsigned size)
{
    return __builtin_bswap64(value) >> (64 - 8 * size);
}

enum outcome complete_movbe_load(struct completion *c)
{
    uint64_t value;
    enum outcome o = rm_read(c, c->insn.operand_size, &value);
    if (o == COMPLETE_DONE)
        gpr_write(c, c->insn.reg, c->insn.operand_size, reversed(value, c->insn.operand_size));
    return o;
}

enum outcome complete_movbe_store(struct completion *c)
{
    unsigned size = c->insn.operand_size;
    return rm_write(c, size, reversed(gpr_read(c, c->insn.reg, size), size));
}

/* CRC-32C, reflected polynomial 0x82f63b78. F0 takes a byte, F1 a word as the operand size has it. */
enum outcome complete_crc32(struct completion *c)
{
    unsigned size = c->insn.opcode == 0xf0 ? 1 : c->insn.operand_size;
    uint64_t value;
    enum outcome o = rm_read(c, size, &value);
    if (o != COMPLETE_DONE)
        return o;
    uint32_t crc = (uint32_t)gpr_read(c, c->insn.reg, 4);
    for (unsigned bit = 0; bit < 8 * size; bit++)
        crc = crc >> 1 ^ ((crc ^ (uint32_t)(value >> bit)) & 1 ? 0x82f63b78u : 0);
    gpr_write(c, c->insn.reg, 4, crc); /* clears bits 63:32 for every source size */
    return COMPLETE_DONE;
}

static bool exchange_16(void *at, uint64_t expected[2], const uint64_t desired[2])
{
    bool equal;
    __asm__ volatile("lock cmpxchg16b %1"
                     : "=@ccz"(equal), "+m"(*(unsigned __int128 *)at), "+a"(expected[0]), "+d"(expected[1])
                     : "b"(desired[0]), "c"(desired[1])
                     : "memory");
    return equal;
}

/*
 * CMPXCHG8B and CMPXCHG16B, done as one locked access to the guest's own bytes: other vCPUs see all of it or
 * nothing, whether or not the guest wrote LOCK.
 */
enum outcome complete_cmpxchg8b16b(struct completion *c)
{
    unsigned size = c->insn.w ? 16 : 8;
    uint64_t linear;
    struct span span;
    enum outcome o = operand_linear(c, size, ACCESS_WRITE, &linear);
    if (o != COMPLETE_DONE)
        return o;
    if (size == 16 && linear & 15)
        return fault_error(c, V_GP, 0);
    o = linear_span(c, linear, size, ACCESS_WRITE, &span);
    if (o != COMPLETE_DONE)
        return o;
    if (linear & (size - 1))
        return COMPLETE_UNKNOWN; /* a split 8-byte lock: no guest is known to use one */

    struct kvm_regs *r = &c->regs;
    bool equal;
    if (size == 16) {
        uint64_t expected[2] = {r->rax, r->rdx};
        const uint64_t desired[2] = {r->rbx, r->rcx};
        equal = exchange_16(span.part[0], expected, desired);
        if (!equal) {
            r->rax = expected[0];
            r->rdx = expected[1];
        }
    } else {
        uint64_t expected = (uint32_t)r->rax | r->rdx << 32;
        const uint64_t desired = (uint32_t)r->rbx | r->rcx << 32;
        equal = __atomic_compare_exchange_n((uint64_t *)(void *)span.part[0], &expected, desired, false,
                                            __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        if (!equal) {
            r->rax = (uint32_t)expected;
            r->rdx = expected >> 32;
        }
    }
    completion_wrote(c->source, span.part[0], size);
    set_flags(c, FLAG_ZF, equal ? FLAG_ZF : 0);
    return COMPLETE_DONE;
}

/* RDRAND (/6) and RDSEED (/7). CF = 0, "try again", is a legal answer when the host's pool has none to give. */
enum outcome complete_rdrand(struct completion *c)
{
    uint64_t value = 0;
    bool filled = getrandom(&value, sizeof value, GRND_NONBLOCK) == sizeof value;
    unsigned size = c->insn.operand_size;
    gpr_write(c, c->insn.rm, size, filled ? value & width_mask(size) : 0);
    set_flags(c, FLAG_ARITHMETIC, filled ? FLAG_CF : 0);
    return COMPLETE_DONE;
}
