/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest for the completer in plain memory: page tables, descriptor tables, registers and an XSAVE area, without KVM.
 * Shared by test_compat_decode.c and fuzz_compat.c. Memory and area are heap blocks of their exact size, so that the
 * sanitizers see an access outside them.
 */
#ifndef VMM_TESTS_COMPAT_GUEST_H
#define VMM_TESTS_COMPAT_GUEST_H

#include "compat/compat.h"

#include <stdlib.h>
#include <string.h>

#ifndef COMPAT_MEMORY
#define COMPAT_MEMORY 0x40000
#endif

enum {
    MEMORY = COMPAT_MEMORY,
    PML4 = 0x1000,
    PDPT = 0x2000,
    PD = 0x3000,
    PT = 0x4000,
    GDT = 0x5000,
    IDT = 0x6000,
    CODE = 0x8000,
    DATA = 0x10000, /* linear and physical */
    FPU = 4096,
};
#define PTE_NX (1ull << 63)

/* Selectors of the GDT below: flat 32-bit segments, and 64-bit code of CPL 3. */
enum { KERNEL_CODE = 0x10, KERNEL_DATA = 0x18, USER_CODE = 0x23, USER_DATA = 0x2b, USER_CODE_64 = 0x33 };

static struct {
    uint8_t *memory, *fpu;
    uint64_t xcr0, xss;
    unsigned flushes;
    struct completion_source source;
    struct completion c;
} f;

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

static bool get_xcr0(void *opaque, uint64_t *xcr0)
{
    (void)opaque;
    *xcr0 = f.xcr0;
    return true;
}

static bool get_msr(void *opaque, uint32_t index, uint64_t *value)
{
    (void)opaque;
    *value = index == 0xda0 ? f.xss : 0x1122334455667788;
    return true;
}

static bool flush_tlb(void *opaque)
{
    (void)opaque;
    f.flushes++;
    return true;
}

static inline void put64(uint64_t at, uint64_t value)
{
    memcpy(f.memory + at, &value, 8);
}

static inline void put_gate(unsigned vector, uint64_t entry, unsigned type, unsigned dpl, bool present)
{
    const unsigned size = f.c.sregs.efer & EFER_LMA ? 16 : 8;
    put64(IDT + (uint64_t)vector * size, (entry & 0xffff) | KERNEL_CODE << 16 |
                                             (uint64_t)((present ? 0x80u : 0) | dpl << 5 | type) << 40 |
                                             (entry >> 16 & 0xffff) << 48);
    if (size == 16)
        put64(IDT + (uint64_t)vector * size + 8, entry >> 32);
}

static inline void put_gates(void)
{
    f.c.sregs.idt.base = IDT;
    f.c.sregs.idt.limit = 0xfff;
    for (unsigned vector = 0; vector < 256; vector++)
        put_gate(vector, CODE, GATE_INTERRUPT, 3, true);
}

/* Long mode at CPL 0 with all memory mapped one to one, user and writable, in 4 KiB pages, and a gate of DPL 3 for every
 * vector. */
static inline void fresh_guest(void)
{
    static const uint64_t gdt[] = {0,
                                   0,
                                   0x00cf9b000000ffff,
                                   0x00cf93000000ffff,
                                   0x00cffb000000ffff,
                                   0x00cff3000000ffff,
                                   0x00affb000000ffff};
    if (!f.memory) {
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
    memset(f.memory, 0, MEMORY);
    memset(f.fpu, 0, FPU);
    memset(f.source.cpuid, 0xff, sizeof f.source.cpuid);
    f.xcr0 = 7;
    f.xss = f.flushes = 0;
    put64(PML4, PDPT | 7);
    put64(PDPT, PD | 7);
    put64(PD, PT | 7);
    for (uint64_t page = 0; page < MEMORY / 4096; page++)
        put64(PT + 8 * page, page << 12 | 7);
    memcpy(f.memory + GDT, gdt, sizeof gdt);
    f.c = (struct completion){.source = &f.source};
    f.c.regs = (struct kvm_regs){.rip = CODE, .rflags = 2, .rsi = DATA, .rsp = DATA + 0x8000};
    f.c.sregs.cr0 = 0x80010033;
    f.c.sregs.cr3 = PML4;
    f.c.sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXSAVE;
    f.c.sregs.efer = 0xd01;
    f.c.sregs.cs = (struct kvm_segment){.type = 11, .present = 1, .s = 1, .l = 1, .limit = 0xffffffff};
    f.c.sregs.ss = (struct kvm_segment){.type = 3, .present = 1, .s = 1, .db = 1, .limit = 0xffffffff};
    f.c.sregs.ds = f.c.sregs.es = f.c.sregs.fs = f.c.sregs.gs = f.c.sregs.ss;
    f.c.sregs.gdt.base = GDT;
    f.c.sregs.gdt.limit = sizeof gdt - 1;
    put_gates();
}

/* 32-bit protected mode without paging, the rest as it is. */
static inline void make_protected(void)
{
    f.c.sregs.cr0 = 0x33;
    f.c.sregs.cr4 = f.c.sregs.efer = 0;
    f.c.sregs.cs.l = 0;
    f.c.sregs.cs.db = 1;
    put_gates();
}

#endif
