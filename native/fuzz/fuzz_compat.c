/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The completer on plain memory: instruction bytes, registers, control registers, page tables, descriptor tables and
 * the XSAVE area are all the guest's. Nothing may be read or written outside its memory, and an instruction that is
 * not completed leaves the registers as they were.
 */
#include "compat/compat.h"

#include <stdlib.h>
#include <string.h>

enum { MEMORY = 0x20000, PML4 = 0x1000, PT = 0x4000, GDT = 0x5000, CODE = 0x8000, FPU = 4096 };

static struct {
    uint8_t *memory, *fpu;
    uint64_t xcr0;
    struct completion_source source;
} f;

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

static void *memory_at(void *opaque, uint64_t gpa, uint64_t size)
{
    (void)opaque;
    return gpa <= MEMORY && size <= MEMORY - gpa ? f.memory + gpa : NULL;
}

static void wrote(void *opaque, const void *at, size_t n)
{
    (void)opaque;
    const uint8_t *first = at;
    if (first < f.memory || n > MEMORY || first > f.memory + MEMORY - n)
        abort();
}

static bool get_xsave(void *opaque, void *area)
{
    (void)opaque;
    memcpy(area, f.fpu, FPU);
    return true;
}

static bool set_xsave(void *opaque, const void *area)
{
    (void)opaque;
    memcpy(f.fpu, area, FPU);
    return true;
}

static bool get_xcr0(void *opaque, uint64_t *value)
{
    (void)opaque;
    *value = f.xcr0;
    return true;
}

static bool get_msr(void *opaque, uint32_t index, uint64_t *value)
{
    (void)opaque;
    *value = index;
    return true;
}

static bool flush_tlb(void *opaque)
{
    (void)opaque;
    return true;
}

static void setup(void)
{
    f.memory = malloc(MEMORY);
    f.fpu = malloc(FPU);
    if (!f.memory || !f.fpu)
        abort();
    f.source = (struct completion_source){.memory = memory_at,
                                          .wrote = wrote,
                                          .get_xsave = get_xsave,
                                          .set_xsave = set_xsave,
                                          .get_xcr0 = get_xcr0,
                                          .get_msr = get_msr,
                                          .flush_tlb = flush_tlb};
    xsave_layout_init(&f.source.layout);
}

static void put64(uint64_t at, uint64_t value)
{
    memcpy(f.memory + at, &value, sizeof value);
}

/* 128 KiB mapped one to one for everybody, which the input then pokes into. */
static void fresh_memory(void)
{
    memset(f.memory, 0, MEMORY);
    memset(f.fpu, 0, FPU);
    for (uint64_t table = PML4; table < PT; table += 0x1000)
        put64(table, (table + 0x1000) | 7);
    for (uint64_t page = 0; page < MEMORY / 4096; page++)
        put64(PT + 8 * page, page << 12 | 7);
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
    uint8_t mode = (uint8_t)take(1);
    c->sregs.cr0 = 0x80000033 ^ (mode & ODD_CR0 ? take(4) : 0);
    c->sregs.cr3 = PML4;
    c->sregs.cr4 = 0x40620 | (mode & ODD_CR4 ? take(4) : CR4_FSGSBASE);
    c->sregs.efer = mode & LEGACY_CODE && mode & LEGACY_MODE ? 0x901 : 0xd01;
    bool legacy = mode & LEGACY_CODE;
    c->sregs.cs = (struct kvm_segment){.type = 11, .present = 1, .s = 1, .l = !legacy, .limit = 0xffffffff};
    c->sregs.cs.db = legacy && mode & CODE_32;
    c->sregs.ss = (struct kvm_segment){.type = 3, .present = 1, .s = 1, .db = 1, .limit = 0xffffffff};
    c->sregs.ss.dpl = mode & USER ? 3 : 0;
    c->sregs.ds = c->sregs.es = c->sregs.fs = c->sregs.gs = c->sregs.ss;
    c->sregs.fs.base = take_value();
    c->sregs.gdt.base = GDT;
    c->sregs.gdt.limit = (uint16_t)take(2);
    f.xcr0 = mode & ODD_XCR0 ? take(8) : 0xe7;
    for (unsigned i = 0; i < 8 && mode & ODD_FPU; i++)
        f.fpu[take(2) % FPU] = (uint8_t)take(1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!f.memory)
        setup();
    in = (struct input){data, data + size};
    fresh_memory();
    struct completion c = {.source = &f.source};
    take_mode(&c);
    uint64_t *registers = (uint64_t *)&c.regs;
    for (unsigned i = 0; i < 16; i++)
        registers[i] = take_value();
    c.regs.rip = CODE;
    c.regs.rflags = 2 | (take(4) & ~(uint64_t)FLAG_VM);
    for (unsigned w = 0; w < N_CPUID_WORDS; w++)
        f.source.cpuid[w] = take(1) & 1 ? (uint32_t)take(4) : ~0u;
    unsigned pokes = take(1) & 15;
    for (unsigned i = 0; i < pokes; i++) {
        uint64_t at = take(2) * 8 % MEMORY;
        put64(at, take(8));
    }
    size_t n = (size_t)(in.end - in.at);
    n = n < INSN_MAX ? n : INSN_MAX;
    uint8_t *bytes = malloc(n ? n : 1); /* of this very size: a byte read behind them is seen */
    if (!bytes)
        abort();
    memcpy(bytes, in.at, n);
    const struct kvm_regs before = c.regs;
    enum outcome outcome = complete(&c, bytes, n);
    if (outcome == COMPLETE_UNKNOWN && memcmp(&before, &c.regs, sizeof before) != 0)
        abort();
    if (outcome == COMPLETE_FAULT && c.regs.rip != CODE)
        abort();
    free(bytes);
    return 0;
}
