/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The completer on plain memory: instruction bytes, registers, control registers, page tables, descriptor tables and
 * the XSAVE area are all the guest's. Nothing may be read or written outside its memory, and an instruction that is
 * not completed leaves the registers as they were.
 */
#define COMPAT_MEMORY 0x20000
#include "compat_guest.h"

static struct input {
    const uint8_t *at, *end;
} in;

static uint64_t take(unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && in.at < in.end; i++)
        value |= (uint64_t)*in.at++ << 8 * i;
    return value;
}

/* Addresses where mistakes hide: ends of pages, of memory, of the canonical range, and the page tables. */
static uint64_t take_value(void)
{
    static const uint64_t edges[16] = {
        0,          0x10000,          0x10ff8, 0x10fff, 0x1fff8, 0x1ffff, 0x1f000, ~0ull,
        1ull << 47, (1ull << 47) - 8, 0x5000,  0x3000,  0x10040, 0x10fc0, 0x1ffc0, 7};
    uint8_t how = (uint8_t)take(1);
    return how & 0x80 ? take(8) : edges[how & 15] + (how & 0x40 ? (how >> 4 & 3) * 8u : 0);
}

/* A descriptor of any kind, often one that could be: any type and level, present or not, 32 or 64 bits, flat or small. */
static uint64_t take_descriptor(void)
{
    const uint64_t how = take(2);
    if (how & 0x8000)
        return take(8);
    const uint64_t type = how & 31, dpl = how >> 5 & 3, present = how >> 7 & 1, l = how >> 8 & 1,
                   db = how >> 9 & 1;
    return (how >> 10 & 1 ? 0x00f00000000000ull << 4 | 0xffffull | 1ull << 55 : 0x7fffull) |
           (type | dpl << 5 | present << 7) << 40 | l << 53 | db << 54;
}

static void take_mode(struct completion *c)
{
    enum {
        ODD_CR0 = 1,
        ODD_CR4 = 2,
        LEGACY_CODE = 4,
        LEGACY_MODE = 8,
        ODD_XCR0 = 16,
        ODD_FPU = 32,
        CODE_32 = 64,
        USER = 128
    };
    enum { PROTECTED = 1, ODD_SEGMENTS = 2, ODD_TABLES = 4 };
    uint8_t mode = (uint8_t)take(1), more = (uint8_t)take(1);
    bool legacy = mode & LEGACY_CODE;
    c->sregs.cr0 = 0x80000033 ^ (mode & ODD_CR0 ? take(4) : 0);
    c->sregs.cr4 = 0x40620 | (mode & ODD_CR4 ? take(4) : CR4_FSGSBASE);
    c->sregs.efer = legacy && mode & LEGACY_MODE ? 0x901 : 0xd01;
    if (legacy && mode & LEGACY_MODE && more & PROTECTED) {
        c->sregs.cr0 &= ~(uint64_t)CR0_PG;
        put_gates();
    }
    c->sregs.cs.l = !legacy;
    c->sregs.cs.db = legacy && mode & CODE_32;
    c->sregs.ss.dpl = mode & USER ? 3 : 0;
    c->sregs.ds = c->sregs.es = c->sregs.gs = c->sregs.ss;
    c->sregs.fs.base = take_value();
    struct kvm_segment *const segments[] = {&c->sregs.cs, &c->sregs.ss, &c->sregs.ds, &c->sregs.ldt};
    for (unsigned i = 0; i < 4 && more & ODD_SEGMENTS; i++) {
        *segments[i] = descriptor_segment((uint16_t)take(2), take_descriptor());
        segments[i]->unusable = take(1) & 1;
        segments[i]->base = i == 3 ? GDT : take_value();
    }
    for (unsigned i = 2; i < 12 && more & ODD_TABLES; i++)
        put64(GDT + 8 * i, take_descriptor());
    c->sregs.gdt.limit = (uint16_t)take(2);
    for (unsigned i = 0; i < 4 && more & ODD_TABLES; i++) {
        const uint8_t vector = (uint8_t)take(1), gate = (uint8_t)take(1);
        put_gate(vector, take_value(), gate & 15, gate >> 4 & 3, gate & 0x80);
    }
    c->sregs.idt.limit = more & ODD_TABLES ? (uint16_t)take(2) : 0xfff;
    f.xcr0 = mode & ODD_XCR0 ? take(8) : 0xe7;
    for (unsigned i = 0; i < 8 && mode & ODD_FPU; i++)
        f.fpu[take(2) % FPU] = (uint8_t)take(1);
}

/* A far return's frame, or an interrupt's, of the size that the mode has, or not. */
static void put_frame(struct completion *c)
{
    const uint8_t how = (uint8_t)take(1);
    const unsigned size = how & 1 ? 8 : how & 2 ? 2 : 4;
    for (unsigned i = 0; i < 6 && how & 0x80; i++) {
        const uint64_t value = how >> 2 & 1 ? take_value() : take(2), at = c->regs.rsp + (uint64_t)i * size;
        if (at <= MEMORY - 8)
            memcpy(f.memory + at, &value, size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    in = (struct input){data, data + size};
    fresh_guest();
    struct completion *c = &f.c;
    take_mode(c);
    uint64_t *registers = (uint64_t *)&c->regs;
    for (unsigned i = 0; i < 16; i++)
        registers[i] = take_value();
    c->regs.rip = CODE;
    c->regs.rflags = 2 | take(4);
    for (unsigned w = 0; w < N_CPUID_WORDS; w++)
        f.source.cpuid[w] = take(1) & 1 ? (uint32_t)take(4) : ~0u;
    unsigned pokes = take(1) & 15;
    for (unsigned i = 0; i < pokes; i++) {
        uint64_t at = take(2) * 8 % MEMORY;
        put64(at, take(8));
    }
    put_frame(c);
    size_t n = (size_t)(in.end - in.at);
    n = n < INSN_MAX ? n : INSN_MAX;
    uint8_t *bytes = malloc(n ? n : 1); /* of this very size: a byte read behind them is seen */
    if (!bytes)
        abort();
    memcpy(bytes, in.at, n);
    const struct completion before = *c;
    enum outcome outcome = complete(c, bytes, n);
    bool same_segments = memcmp(&before.sregs, &c->sregs, sizeof before.sregs) == 0;
    if (outcome == COMPLETE_UNKNOWN &&
        (memcmp(&before.regs, &c->regs, sizeof before.regs) != 0 || !same_segments))
        abort();
    if (outcome == COMPLETE_FAULT && (c->regs.rip != CODE || !same_segments))
        abort();
    if (!same_segments && !c->sregs_changed)
        abort();
    /* No instruction brings a program further in, or into virtual-8086 mode. */
    if (outcome == COMPLETE_JUMPED && completion_cpl(c) < completion_cpl(&before))
        abort();
    if ((c->regs.rflags ^ before.regs.rflags) & FLAG_VM)
        abort();
    /* Nor does it set IF or IOPL where it may not. */
    const uint64_t kept = (completion_cpl(&before) ? FLAG_IOPL : 0) |
                          (completion_cpl(&before) > (before.regs.rflags >> 12 & 3) ? FLAG_IF : 0);
    if ((c->regs.rflags ^ before.regs.rflags) & kept)
        abort();
    free(bytes);
    return 0;
}
