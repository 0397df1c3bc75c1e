/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decoding, page walks and completions on plain memory, without KVM. What this processor can execute, it is
 * asked: a completion has to come to the processor's own registers, flags and bytes.
 */
#include "check.h"
#include "compat_cases.h"
#include "compat_guest.h"

#include <cpuid.h>

static uint64_t get64(uint64_t at)
{
    uint64_t value;
    memcpy(&value, f.memory + at, 8);
    return value;
}

static void map(uint64_t linear, uint64_t entry)
{
    put64(PT + (linear >> 12) * 8, entry);
}

#define COMPLETE(...) complete(&f.c, (const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}))

static void every_case_agrees_with_the_processor(void)
{
    uint64_t seed = 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < N_COMPAT_CASES; i++) {
        const struct compat_case *test = &compat_cases[i];
        size_t n = (size_t)(test->end - test->bytes);
        if (!processor_has(test->needs)) {
            printf("not on this processor: %s\n", test->name);
            continue;
        }
        fresh_guest();
        for (int trial = 0; trial < 2000; trial++) {
            struct native_state native, completed;
            _Alignas(64) uint8_t memory[64];
            random_start(&seed, &native, memory);
            memcpy(f.memory + DATA, memory, 64);
            state_to_regs(&native, &f.c.regs);
            f.c.regs.rip = CODE;
            f.c.regs.rsi = DATA;
            native.gpr[6] = (uintptr_t)memory;
            uint64_t dirty = native.rflags;
            native_execute(&native, test->bytes, n);
            enum outcome outcome = complete(&f.c, test->bytes, n);
            regs_to_state(&f.c.regs, &completed);
            /* Flags no definition covers have to stay as they were. */
            bool kept = ((completed.rflags ^ dirty) & test->undefined) == 0;
            if (outcome != COMPLETE_DONE || f.c.regs.rip != CODE + n ||
                !same_end(test, &native, &completed) || !kept || memcmp(memory, f.memory + DATA, 64) != 0) {
                fprintf(stderr, "%s: trial %d, outcome %d\n", test->name, trial, outcome);
                print_state("processor", &native);
                print_state("completed", &completed);
                exit(1);
            }
        }
    }
}

static void lengths_and_operands_are_decoded(void)
{
    static const struct {
        uint8_t bytes[INSN_MAX], n;
        enum cpu_mode mode;
        uint8_t opcode, size, base, index, segment;
        int32_t displacement;
    } tests[] = {
        {{0xf3, 0x48, 0x0f, 0xb8, 0x44, 0x8d, 0x10}, 7, CPU_64, 0xb8, 8, 5, 1, SEG_SS, 0x10},
        {{0xf3, 0x4a, 0x0f, 0xb8, 0x04, 0x25, 1, 0, 0, 0x80},
         10,
         CPU_64,
         0xb8,
         8,
         REG_NONE,
         12,
         SEG_DS,
         INT32_MIN + 1},
        {{0xf3, 0x0f, 0xb8, 0x04, 0x25, 1, 0, 0, 0}, 9, CPU_64, 0xb8, 4, REG_NONE, REG_NONE, SEG_DS, 1},
        {{0x65, 0xf3, 0x0f, 0xb8, 0x04, 0x24}, 6, CPU_64, 0xb8, 4, 4, REG_NONE, SEG_GS, 0},
        {{0x65, 0x2e, 0xf3, 0x0f, 0xb8, 0x01}, 6, CPU_64, 0xb8, 4, 1, REG_NONE, SEG_GS, 0},
        {{0xf3, 0x0f, 0xb8, 0x42, 0xff}, 5, CPU_16, 0xb8, 2, 5, 6, SEG_SS, -1},
        {{0xf3, 0x0f, 0xb8, 0x06, 0x34, 0x12}, 6, CPU_16, 0xb8, 2, REG_NONE, REG_NONE, SEG_DS, 0x1234},
        {{0x67, 0x66, 0xf3, 0x0f, 0xb8, 0x00}, 6, CPU_16, 0xb8, 4, 0, REG_NONE, SEG_DS, 0},
        {{0xf3, 0x0f, 0xb8, 0x05, 1, 0, 0, 0}, 8, CPU_32, 0xb8, 4, REG_NONE, REG_NONE, SEG_DS, 1},
        {{0x48, 0x66, 0xf3, 0x0f, 0xb8, 0x00}, 6, CPU_64, 0xb8, 2, 0, REG_NONE, SEG_DS, 0}, /* a stale REX */
        {{0xc4, 0xc2, 0xf8, 0xf7, 0x18}, 5, CPU_64, 0xf7, 8, 8, REG_NONE, SEG_DS, 0},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        struct insn insn;
        CHECK(insn_decode(&insn, tests[i].bytes, tests[i].n, tests[i].mode));
        CHECK_EQUAL(insn.length, tests[i].n);
        CHECK_EQUAL(insn.opcode, tests[i].opcode);
        CHECK_EQUAL(insn.operand_size, tests[i].size);
        CHECK_EQUAL(insn.base, tests[i].base);
        CHECK_EQUAL(insn.index, tests[i].index);
        CHECK_EQUAL(insn.segment, tests[i].segment);
        CHECK_EQUAL(insn.displacement, tests[i].displacement);
        for (uint8_t n = 0; n < tests[i].n; n++) /* cut short anywhere it is no instruction */
            CHECK(!insn_decode(&insn, tests[i].bytes, n, tests[i].mode));
    }
    struct insn insn;
    uint8_t prefixes[16];
    memset(prefixes, 0x66, sizeof prefixes);
    CHECK(!insn_decode(&insn, prefixes, sizeof prefixes, CPU_64));
    memcpy(prefixes + 12, (const uint8_t[]){0xf3, 0x0f, 0xb8, 0xc0}, 4); /* sixteen bytes: one too many */
    CHECK(!insn_decode(&insn, prefixes, sizeof prefixes, CPU_64));
    CHECK(insn_decode(&insn, prefixes + 1, 15, CPU_64));
    CHECK(!insn_decode(&insn, (const uint8_t[]){0x62, 0xf1, 0x7c, 0x48, 0x10, 0x00}, 6, CPU_64)); /* EVEX */
}

/* No bytes whatever may crash, read too far, or touch the guest and then say that they did not. */
static void any_bytes_are_safe(void)
{
    uint64_t seed = 2463534242ull;
    fresh_guest();
    for (int i = 0; i < 300000; i++) {
        uint8_t *bytes = malloc(INSN_MAX); /* on the heap: a read past them is seen */
        uint64_t noise[2] = {next_random(&seed), next_random(&seed)};
        memcpy(bytes, noise, INSN_MAX);
        if (i & 1) {
            static const uint8_t starts[][3] = {
                {0x0f, 0xae}, {0x0f, 0xc7}, {0xf3, 0x0f}, {0xc4, 0xe2}, {0x0f, 0x01}};
            memcpy(bytes, starts[noise[1] % 5], 2);
        }
        size_t n = 1 + (noise[0] >> 60) % INSN_MAX;
        uint8_t *exact = malloc(n);
        memcpy(exact, bytes, n);
        f.c.sregs.cs.l = i % 3 != 0;
        f.c.sregs.cs.db = i % 3 == 1;
        struct kvm_regs before = f.c.regs;
        enum outcome outcome = complete(&f.c, exact, n);
        if (outcome == COMPLETE_UNKNOWN)
            CHECK(memcmp(&before, &f.c.regs, sizeof before) == 0);
        f.c.regs = (struct kvm_regs){.rip = CODE,
                                     .rflags = 2,
                                     .rsi = noise[1] % (2 * MEMORY),
                                     .rax = noise[0],
                                     .rdx = 7,
                                     .rcx = noise[1],
                                     .rbx = DATA,
                                     .rsp = DATA + 0x8000};
        free(exact);
        free(bytes);
    }
}

static void page_rights_become_the_right_faults(void)
{
    static const struct {
        uint64_t entry;
        uint32_t cr4;
        bool user, write, ac;
        int64_t error; /* -1: allowed */
    } tests[] = {
        {DATA | 7, 0, false, false, false, -1},        {DATA | 7, CR4_SMAP, false, false, false, 1},
        {DATA | 7, CR4_SMAP, false, false, true, -1},  {DATA | 7, CR4_SMAP, true, true, false, -1},
        {DATA | 5, 0, false, true, false, 3},          {DATA | 5, 0, true, true, false, 7},
        {DATA | 3, 0, true, false, false, 5},          {DATA | 3, 0, false, true, false, -1},
        {DATA | 6, 0, false, true, false, 2},          {DATA | 6, 0, true, false, false, 4},
        {DATA | 7 | PTE_NX, 0, true, true, false, -1},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        fresh_guest();
        map(DATA, tests[i].entry);
        f.c.sregs.cr4 |= tests[i].cr4;
        f.c.sregs.ss.dpl = tests[i].user ? 3 : 0;
        f.c.regs.rflags |= tests[i].ac ? FLAG_AC : 0;
        f.c.regs.rcx = 0x0102030405060708;
        /* movbe %rcx, (%rsi) or movbe (%rsi), %rcx */
        enum outcome outcome =
            tests[i].write ? COMPLETE(0x48, 0x0f, 0x38, 0xf1, 0x0e) : COMPLETE(0x48, 0x0f, 0x38, 0xf0, 0x0e);
        if (tests[i].error < 0) {
            CHECK_EQUAL(outcome, COMPLETE_DONE);
            CHECK_EQUAL(get64(PT + (DATA >> 12) * 8) & 0x60, tests[i].write ? 0x60 : 0x20);
            CHECK_EQUAL(get64(PML4) & 0x60, 0x20);
            continue;
        }
        CHECK_EQUAL(outcome, COMPLETE_FAULT);
        CHECK_EQUAL(f.c.event.vector, V_PF);
        CHECK_EQUAL(f.c.event.error, tests[i].error);
        CHECK_EQUAL(f.c.event.address, DATA);
        CHECK_EQUAL(f.c.regs.rip, CODE);
        CHECK_EQUAL(f.c.regs.rcx, 0x0102030405060708);
    }
}

static void a_write_across_pages_is_whole_or_not_at_all(void)
{
    fresh_guest();
    map(DATA + 0x1000, 0x30000 | 7); /* physically elsewhere */
    f.c.regs.rsi = DATA + 0xffd;
    f.c.regs.rcx = 0x1122334455667788;
    CHECK_EQUAL(COMPLETE(0x48, 0x0f, 0x38, 0xf1, 0x0e), COMPLETE_DONE);
    CHECK_EQUAL(f.memory[DATA + 0xffd], 0x11);
    CHECK_EQUAL(f.memory[DATA + 0xfff], 0x33);
    CHECK_EQUAL(f.memory[0x30000], 0x44);
    CHECK_EQUAL(f.memory[0x30004], 0x88);
    map(DATA + 0x1000, 0);
    f.c.regs.rcx = 0;
    CHECK_EQUAL(COMPLETE(0x48, 0x0f, 0x38, 0xf1, 0x0e), COMPLETE_FAULT);
    CHECK_EQUAL(f.c.event.address, DATA + 0x1000);
    CHECK_EQUAL(f.c.event.error, 2);
    CHECK_EQUAL(f.memory[DATA + 0xffd], 0x11);
}

static void large_pages_and_other_paging_modes_are_walked(void)
{
    fresh_guest();
    put64(PD + 8, 0x0 | 0x87); /* 2 MiB at linear 2 MiB */
    f.c.regs.rsi = 0x200000 + DATA;
    put64(DATA, 0xff);
    CHECK_EQUAL(COMPLETE(0xf3, 0x48, 0x0f, 0xb8, 0x06), COMPLETE_DONE);
    CHECK_EQUAL(f.c.regs.rax, 8);

    fresh_guest(); /* 32-bit, two levels, linear 4 MiB onto 0 */
    f.c.sregs.efer = 0;
    f.c.sregs.cs.l = 0;
    f.c.sregs.cs.db = 1;
    f.c.sregs.cr4 = CR4_PSE;
    memset(f.memory + PML4, 0, 4096);
    f.memory[PML4 + 4] = 0x87;
    f.c.regs.rsi = 0x400000 + DATA;
    put64(DATA, 0xffff);
    CHECK_EQUAL(COMPLETE(0xf3, 0x0f, 0xb8, 0x06), COMPLETE_DONE);
    CHECK_EQUAL(f.c.regs.rax, 16);

    fresh_guest(); /* 32-bit PAE: the PDPT is at CR3 */
    f.c.sregs.efer = 0;
    f.c.sregs.cs.l = 0;
    f.c.sregs.cs.db = 1;
    f.c.sregs.cr3 = PDPT;
    put64(PDPT, PD | 1);
    put64(DATA, 7);
    CHECK_EQUAL(COMPLETE(0xf3, 0x0f, 0xb8, 0x06), COMPLETE_DONE);
    CHECK_EQUAL(f.c.regs.rax, 3);
}

static void what_is_not_ram_or_not_modelled_is_left_alone(void)
{
    fresh_guest();
    map(DATA, 0x10000000 | 7);
    CHECK_EQUAL(COMPLETE(0xf3, 0x48, 0x0f, 0xb8, 0x06), COMPLETE_UNKNOWN);
    fresh_guest();
    put64(PD, 0x7ffffff000 | 7);
    CHECK_EQUAL(COMPLETE(0xf3, 0x48, 0x0f, 0xb8, 0x06), COMPLETE_UNKNOWN);
    fresh_guest();
    f.c.sregs.cr4 |= CR4_LA57;
    CHECK_EQUAL(COMPLETE(0xf3, 0x48, 0x0f, 0xb8, 0x06), COMPLETE_UNKNOWN);
    fresh_guest();
    CHECK_EQUAL(COMPLETE(0x66, 0x0f, 0xef, 0xc8), COMPLETE_UNKNOWN); /* pxor */
    CHECK_EQUAL(COMPLETE(0x90 ^ 0x91), COMPLETE_UNKNOWN);            /* add */
}

static void segments_have_limits_and_bases(void)
{
    fresh_guest();
    f.c.sregs.gs.base = DATA;
    f.c.regs.rsi = 8;
    put64(DATA + 8, 1);
    CHECK_EQUAL(COMPLETE(0x65, 0xf3, 0x48, 0x0f, 0xb8, 0x06), COMPLETE_DONE);
    CHECK_EQUAL(f.c.regs.rax, 1);

    fresh_guest();
    f.c.sregs.efer = 0;
    f.c.sregs.cr0 = 1;
    f.c.sregs.cs.l = 0;
    f.c.sregs.cs.db = 1;
    f.c.sregs.ds.limit = DATA + 2;
    CHECK_EQUAL(COMPLETE(0xf3, 0x0f, 0xb8, 0x06), COMPLETE_FAULT);
    CHECK_EQUAL(f.c.event.vector, V_GP);
    f.c.sregs.ds.limit = DATA + 3;
    CHECK_EQUAL(COMPLETE(0xf3, 0x0f, 0xb8, 0x06), COMPLETE_DONE);
}

static void exceptions_and_privilege(void)
{
    fresh_guest();
    CHECK_EQUAL(COMPLETE(0xcc), COMPLETE_TRAP);
    CHECK_EQUAL(f.c.event.vector, V_BP);
    CHECK_EQUAL(f.c.regs.rip, CODE + 1);
    fresh_guest();
    CHECK_EQUAL(COMPLETE(0xcd, 0x80), COMPLETE_TRAP);
    CHECK_EQUAL(f.c.event.vector, 0x80);
    CHECK(f.c.event.software);
    fresh_guest();
    CHECK_EQUAL(COMPLETE(0xce), COMPLETE_FAULT); /* INTO in 64-bit mode */
    CHECK_EQUAL(f.c.event.vector, V_UD);
    fresh_guest();
    f.c.sregs.ss.dpl = 3;
    CHECK_EQUAL(COMPLETE(0x0f, 0x01, 0xca), COMPLETE_FAULT); /* CLAC */
    CHECK_EQUAL(f.c.event.vector, V_UD);
    CHECK_EQUAL(COMPLETE(0x66, 0x0f, 0x38, 0x82, 0x06), COMPLETE_FAULT); /* INVPCID */
    CHECK_EQUAL(f.c.event.vector, V_GP);
    fresh_guest();
    CHECK_EQUAL(COMPLETE(0xf0, 0xf3, 0x48, 0x0f, 0xb8, 0xc0), COMPLETE_FAULT); /* LOCK POPCNT */
    CHECK_EQUAL(f.c.event.vector, V_UD);
    CHECK_EQUAL(COMPLETE(0x48, 0x0f, 0xc7, 0x4e, 0x08), COMPLETE_FAULT); /* CMPXCHG16B off its alignment */
    CHECK_EQUAL(f.c.event.vector, V_GP);
}

static void no_address_that_is_not_canonical_is_taken_for_another(void)
{
    fresh_guest();
    const uint64_t before = get64(DATA);
    f.c.regs.rsp = (1ull << 47) + DATA + 8;
    CHECK_EQUAL(COMPLETE(0x50), COMPLETE_UNKNOWN); /* PUSH, at whose fault the run ends */
    CHECK_EQUAL(get64(DATA), before);
    f.c.sregs.idt.base = (1ull << 47) + IDT;
    CHECK_EQUAL(COMPLETE(0xcd, 0x80), COMPLETE_FAULT);
    CHECK_EQUAL(f.c.event.vector, V_GP);
    CHECK_EQUAL(COMPLETE(0x48, 0xcf), COMPLETE_FAULT);
    CHECK_EQUAL(f.c.event.vector, V_SS);
}

static void a_gate_decides_whether_a_software_interrupt_may_use_it(void)
{
    static const struct {
        uint8_t instruction[2], vector;
        uint16_t limit;
        uint8_t type, dpl, present;
        int error; /* of #GP or #NP; -1: delivered */
        uint8_t fault;
    } tests[] = {
        {{0xcd, 0x80}, 0x80, 0xfff, GATE_TRAP, 3, true, -1, 0},
        {{0xcd, 0x80}, 0x80, 0xfff, GATE_INTERRUPT, 0, true, 0x402, V_GP},
        {{0xcd, 0x80}, 0x80, 0xfff, GATE_INTERRUPT, 3, false, 0x402, V_NP},
        {{0xcd, 0x80}, 0x80, 0x80e, GATE_INTERRUPT, 3, true, 0x402, V_GP},
        {{0xcd, 0x80}, 0x80, 0xfff, 12, 3, true, 0x402, V_GP},
        {{0xcc}, V_BP, 0xfff, GATE_INTERRUPT, 0, true, 0x1a, V_GP},
        {{0xcc}, V_BP, 0xfff, GATE_INTERRUPT, 3, true, -1, 0},
        {{0xf1}, V_DB, 0xfff, GATE_INTERRUPT, 0, true, -1, 0},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        fresh_guest();
        f.c.sregs.ss.dpl = 3;
        f.c.sregs.idt.limit = tests[i].limit;
        put_gate(tests[i].vector, CODE, tests[i].type, tests[i].dpl, tests[i].present);
        const enum outcome outcome = complete(&f.c, tests[i].instruction, tests[i].instruction[1] ? 2 : 1);
        CHECK_EQUAL(outcome, tests[i].error < 0 ? COMPLETE_TRAP : COMPLETE_FAULT);
        CHECK_EQUAL(f.c.event.vector, tests[i].error < 0 ? tests[i].vector : tests[i].fault);
        if (tests[i].error >= 0) {
            CHECK_EQUAL(f.c.event.error, tests[i].error);
            CHECK_EQUAL(f.c.regs.rip, CODE);
        }
    }
    fresh_guest(); /* of 32 bits, a gate has 8 bytes */
    make_protected();
    f.c.sregs.ss.dpl = 3;
    CHECK_EQUAL(COMPLETE(0xcd, 0x80), COMPLETE_TRAP);
    put_gate(0x80, CODE, GATE_TRAP_16, 2, true);
    CHECK_EQUAL(COMPLETE(0xcd, 0x80), COMPLETE_FAULT);
    f.c.regs.rflags |= FLAG_VM;
    CHECK_EQUAL(COMPLETE(0xcd, 0x80), COMPLETE_UNKNOWN);
}

/* ---- far returns ---- */

static void push32(uint32_t value)
{
    f.c.regs.rsp -= 4;
    memcpy(f.memory + f.c.regs.rsp, &value, 4);
}

/* IRET in protected mode, over this frame; the last two only where they are not 0. */
static enum outcome iret(uint32_t eip, uint32_t cs, uint32_t flags, uint32_t esp, uint32_t ss)
{
    if (ss) {
        push32(ss);
        push32(esp);
    }
    push32(flags);
    push32(cs);
    push32(eip);
    return COMPLETE(0xcf);
}

static void protected_guest(void)
{
    fresh_guest();
    make_protected();
}

static void iret_returns_within_a_level_and_to_an_outer_one(void)
{
    protected_guest();
    CHECK_EQUAL(iret(0x1234, KERNEL_CODE, 0x3202, 0, 0), COMPLETE_JUMPED);
    CHECK_EQUAL(f.c.regs.rip, 0x1234);
    CHECK_EQUAL(f.c.regs.rsp, DATA + 0x8000);
    CHECK_EQUAL(f.c.regs.rflags, 0x3202);
    CHECK(f.c.unmasks_nmi);
    CHECK_EQUAL(completion_cpl(&f.c), 0);

    protected_guest();
    f.c.sregs.fs.dpl = 3;
    CHECK_EQUAL(iret(0x1234, USER_CODE, 0x202, 0x9000, USER_DATA), COMPLETE_JUMPED);
    CHECK_EQUAL(f.c.regs.rip, 0x1234);
    CHECK_EQUAL(f.c.regs.rsp, 0x9000);
    CHECK_EQUAL(completion_cpl(&f.c), 3);
    CHECK_EQUAL(f.c.sregs.cs.selector, USER_CODE);
    CHECK_EQUAL(f.c.sregs.ss.selector, USER_DATA);
    CHECK(f.c.sregs.ds.unusable); /* the kernel's */
    CHECK(!f.c.sregs.fs.unusable);

    f.c.regs.rsp = DATA; /* at CPL 3: IF and IOPL are not the program's to set */
    CHECK_EQUAL(iret(0x1000, USER_CODE, 0x3002 | FLAG_CF, 0, 0), COMPLETE_JUMPED);
    CHECK_EQUAL(f.c.regs.rflags, 0x202 | FLAG_CF);

    protected_guest(); /* RETF, which takes eight bytes of both stacks */
    push32(USER_DATA);
    push32(0x9000);
    f.c.regs.rsp -= 8;
    push32(USER_CODE);
    push32(0x1234);
    CHECK_EQUAL(COMPLETE(0xca, 8, 0), COMPLETE_JUMPED);
    CHECK_EQUAL(f.c.regs.rsp, 0x9008);
    CHECK_EQUAL(completion_cpl(&f.c), 3);

    fresh_guest(); /* RETF of 64 bits */
    f.c.regs.rsp -= 32;
    put64(f.c.regs.rsp, 0x1234);
    put64(f.c.regs.rsp + 8, USER_CODE_64);
    put64(f.c.regs.rsp + 16, 0x9000);
    put64(f.c.regs.rsp + 24, USER_DATA);
    CHECK_EQUAL(COMPLETE(0x48, 0xcb), COMPLETE_JUMPED);
    CHECK_EQUAL(f.c.sregs.cs.l, 1);
    CHECK_EQUAL(f.c.regs.rsp, 0x9000);
}

static void an_iret_to_what_is_no_segment_for_it_faults_where_it_is(void)
{
    enum { NOT_PRESENT = 0x38, NARROW = 0x40, GONE = 0x48, CONFORMING = 0x50 };
    static const struct {
        uint32_t eip, cs, esp, ss;
        uint8_t vector;
        uint32_t error;
    } tests[] = {
        {0x1000, 0, 0, 0, V_GP, 0},
        {0x1000, KERNEL_DATA, 0, 0, V_GP, KERNEL_DATA},
        {0x1000, KERNEL_CODE | 3, 0x9000, USER_DATA, V_GP, KERNEL_CODE},
        {0x1000, 0x1000, 0, 0, V_GP, 0x1000},
        {0x1000, 0x14, 0, 0, V_GP, 0x14}, /* the LDT, which there is not */
        {0x1000, NOT_PRESENT, 0, 0, V_NP, NOT_PRESENT},
        {0x10000, NARROW, 0, 0, V_GP, 0},
        {0x1000, USER_CODE, 0x9000, KERNEL_DATA, V_GP, KERNEL_DATA},
        {0x1000, USER_CODE, 0x9000, USER_CODE, V_GP, USER_CODE & ~3u},
        {0x1000, USER_CODE, 0x9000, 3, V_GP, 0},
        {0x1000, USER_CODE, 0x9000, GONE | 3, V_SS, GONE},
        {0x1000, CONFORMING, 0, 0, V_GP, CONFORMING},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        protected_guest();
        put64(GDT + NOT_PRESENT, 0x00cf1b000000ffff);
        put64(GDT + NARROW, 0x00409b000000ffff);
        put64(GDT + GONE, 0x00cf73000000ffff);
        put64(GDT + CONFORMING, 0x00cfff000000ffff); /* of DPL 3: not for CPL 0 */
        f.c.sregs.gdt.limit = 0x57;
        const struct kvm_sregs before = f.c.sregs;
        CHECK_EQUAL(iret(tests[i].eip, tests[i].cs, 2, tests[i].esp, tests[i].ss), COMPLETE_FAULT);
        CHECK_EQUAL(f.c.event.vector, tests[i].vector);
        CHECK_EQUAL(f.c.event.error, tests[i].error);
        CHECK_EQUAL(f.c.regs.rip, CODE);
        CHECK(memcmp(&before, &f.c.sregs, sizeof before) == 0);
    }
    protected_guest();
    f.c.sregs.ss.dpl = 3; /* no return inwards */
    CHECK_EQUAL(iret(0x1000, KERNEL_CODE, 2, 0, 0), COMPLETE_FAULT);
    CHECK_EQUAL(f.c.event.vector, V_GP);
    protected_guest();
    f.c.sregs.ss.limit = DATA;
    CHECK_EQUAL(iret(0x1000, KERNEL_CODE, 2, 0, 0), COMPLETE_FAULT);
    CHECK_EQUAL(f.c.event.vector, V_SS);
    protected_guest();
    CHECK_EQUAL(iret(0x1000, KERNEL_CODE, FLAG_VM | 2, 0, 0), COMPLETE_UNKNOWN);
    f.c.regs.rflags |= FLAG_NT; /* a task switch */
    CHECK_EQUAL(iret(0x1000, KERNEL_CODE, 2, 0, 0), COMPLETE_UNKNOWN);
    protected_guest();
    f.c.sregs.cr0 = 0; /* real mode's is KVM's */
    CHECK_EQUAL(COMPLETE(0xcf), COMPLETE_UNKNOWN);
}

static void invpcid_flushes_and_checks_its_descriptor(void)
{
    for (uint64_t type = 0; type < 5; type++) {
        fresh_guest();
        f.c.regs.rax = type;
        CHECK_EQUAL(COMPLETE(0x66, 0x0f, 0x38, 0x82, 0x06), type < 4 ? COMPLETE_DONE : COMPLETE_FAULT);
        CHECK_EQUAL(f.flushes, type < 4);
    }
    fresh_guest();
    put64(DATA, 1); /* a PCID without CR4.PCIDE */
    CHECK_EQUAL(COMPLETE(0x66, 0x0f, 0x38, 0x82, 0x06), COMPLETE_FAULT);
    fresh_guest();
    put64(DATA + 8, 1ull << 63);
    CHECK_EQUAL(COMPLETE(0x66, 0x0f, 0x38, 0x82, 0x06), COMPLETE_FAULT);
}

/* ---- the XSAVE family, against this processor's own ---- */

#define NATIVE(instruction, area, features)                                                                  \
    __asm__ volatile(instruction " %0"                                                                       \
                     : "+m"(*(uint8_t(*)[4096])(area))                                                       \
                     : "a"((uint32_t)(features)), "d"(0)                                                     \
                     : "memory")

static const struct {
    const char *name, *needs;
    uint8_t bytes[4];
} save_forms[] = {
    {"xsave64", "xsave", {0x48, 0x0f, 0xae, 0x26}},
    {"xsaveopt64", "xsaveopt", {0x48, 0x0f, 0xae, 0x36}},
    {"xsavec64", "xsavec", {0x48, 0x0f, 0xc7, 0x26}},
};

static void native_save(size_t form, uint8_t *area, uint32_t features)
{
    if (form == 0)
        NATIVE("xsave64", area, features);
    else if (form == 1)
        NATIVE("xsaveopt64", area, features);
    else
        NATIVE("xsavec64", area, features);
}

/*
 * A random state in standard format whose header says `in_use`; x87 without pending exceptions, MXCSR legal
 * and, as KVM has it, initial while SSE is not in use.
 */
static void random_fpu(uint64_t *seed, uint8_t *area, uint64_t in_use)
{
    memset(area, 0, 4096);
    for (int i = 32; i < 416; i += 8) {
        uint64_t value = next_random(seed);
        memcpy(area + i, &value, 8);
    }
    for (int i = 0; i < 8; i++) /* upper bytes of the x87 registers are reserved */
        memset(area + 32 + 16 * i + 10, 0, 6);
    for (int i = 576; i < 832; i += 8) {
        uint64_t value = next_random(seed);
        memcpy(area + i, &value, 8);
    }
    const uint16_t fcw = 0x037f;
    const uint32_t mxcsr = in_use & 2 && next_random(seed) & 1 ? 0x1fa1 : 0x1f80;
    memcpy(area, &fcw, 2);
    area[4] = (uint8_t)next_random(seed); /* abridged tag word */
    memcpy(area + 24, &mxcsr, 4);
    memcpy(area + 512, &in_use, 8);
}

static void saves_agree_with_the_processor(void)
{
    static _Alignas(64) uint8_t mine[4096], state[4096], native[4096];
    uint64_t seed = 1234567;
    NATIVE("xsave64", mine, ~0u);
    for (size_t form = 0; form < 3; form++) {
        int compared = 0;
        bool has = processor_has(save_forms[form].needs);
        for (int trial = 0; has && trial < 500; trial++) {
            fresh_guest();
            uint32_t features = next_random(&seed) & 7;
            uint64_t in_use = next_random(&seed) & 7;
            random_fpu(&seed, state, in_use);
            uint8_t fill = (uint8_t)next_random(&seed);
            memset(native, fill, sizeof native);
            memset(native + 512, 0, 64);
            memcpy(f.memory + DATA, native, sizeof native);

            NATIVE("xrstor64", state, 7);
            NATIVE("xsave64", f.fpu, 7); /* as KVM would hand it out */
            NATIVE("xrstor64", state, 7);
            native_save(form, native, features);
            NATIVE("xrstor64", mine, ~0u);
            /* What is in use is the processor's to say: this thread was preempted between the two saves. */
            if ((native[512] ^ f.fpu[512]) & features)
                continue;
            compared++;

            f.c.regs.rax = features;
            CHECK_EQUAL(complete(&f.c, save_forms[form].bytes, 4), COMPLETE_DONE);
            /* MXCSR_MASK is the processor's to write; KVM's area has the same. */
            for (int i = 0; i < 4096; i++)
                if (native[i] != f.memory[DATA + i]) {
                    fprintf(stderr, "%s features %x in use %x: byte %d is %02x, not %02x\n",
                            save_forms[form].name, features, (unsigned)in_use, i, f.memory[DATA + i],
                            native[i]);
                    exit(1);
                }
        }
        CHECK(!has || compared > 400);
    }
}

static void restores_agree_with_the_processor(void)
{
    static _Alignas(64) uint8_t mine[4096], before[4096], image[4096], native[4096], completed[4096];
    uint64_t seed = 7654321;
    NATIVE("xsave64", mine, ~0u);
    for (int compact = 0; compact < (processor_has("xsavec") ? 2 : 1); compact++)
        for (int trial = 0; trial < 500; trial++) {
            fresh_guest();
            uint32_t features = next_random(&seed) & 7;
            random_fpu(&seed, before, next_random(&seed) & 7);
            random_fpu(&seed, image, next_random(&seed) & 7);
            if (next_random(&seed) & 1) /* the standard format's MXCSR counts whether or not SSE is in use */
                memcpy(image + 24, &(const uint32_t){0x1fa1}, 4);
            if (compact) {
                NATIVE("xrstor64", image, 7);
                memset(image, 0, sizeof image);
                NATIVE("xsavec64", image, 7);
            }
            NATIVE("xrstor64", before, 7);
            NATIVE("xsave64", f.fpu, 7);
            memcpy(f.memory + DATA, image, sizeof image);
            NATIVE("xrstor64", before, 7);
            NATIVE("xrstor64", image, features);
            memset(native, 0, sizeof native);
            NATIVE("xsave64", native, 7);
            NATIVE("xrstor64", mine, ~0u);

            f.c.regs.rax = features;
            CHECK_EQUAL(COMPLETE(0x48, 0x0f, 0xae, 0x2e), COMPLETE_DONE);
            NATIVE("xrstor64", f.fpu, 7); /* what KVM would load */
            memset(completed, 0, sizeof completed);
            NATIVE("xsave64", completed, 7);
            NATIVE("xrstor64", mine, ~0u);
            for (int i = 0; i < 4096; i++)
                if (native[i] != completed[i] && i / 8 != 512 / 8) {
                    fprintf(stderr, "xrstor compact %d features %x: byte %d is %02x, not %02x\n", compact,
                            features, i, completed[i], native[i]);
                    exit(1);
                }
        }
}

static void bad_restore_headers_are_refused(void)
{
    static const struct {
        unsigned at;
        uint8_t value;
    } tests[] = {{512, 8}, {520, 1}, {527, 0x40}, {528, 1}, {24 + 3, 0x80}};
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        fresh_guest();
        f.memory[DATA + 512] = 3;
        f.memory[DATA + 24 + 1] = 0x1f;
        f.memory[DATA + tests[i].at] = tests[i].value;
        f.c.regs.rax = 7;
        CHECK_EQUAL(COMPLETE(0x48, 0x0f, 0xae, 0x2e), COMPLETE_FAULT);
        CHECK_EQUAL(f.c.event.vector, V_GP);
    }
    fresh_guest(); /* XRSTORS takes the compacted format only */
    CHECK_EQUAL(COMPLETE(0x48, 0x0f, 0xc7, 0x1e), COMPLETE_FAULT);
    fresh_guest();
    f.c.sregs.cr0 |= CR0_TS;
    CHECK_EQUAL(COMPLETE(0x48, 0x0f, 0xae, 0x2e), COMPLETE_FAULT);
    CHECK_EQUAL(f.c.event.vector, V_NM);
}

/* ---- only what CPUID offers ---- */

/* A row's encoding, with a memory operand at DATA or register RAX where it takes either. */
static size_t encode_row(const struct instruction *row, bool memory, bool wide, uint8_t bytes[INSN_MAX])
{
    static const uint8_t implied[] = {[0] = 0, [1] = 0x66, [2] = 0xf3, [3] = 0xf2};
    uint8_t prefix = row->prefix == ANY_PREFIX ? NP : row->prefix;
    uint8_t reg = row->extension == ANY ? 0 : row->extension, rm = row->rm == ANY ? memory ? 6 : 0 : row->rm;
    size_t n = 0;
    if (row->form & VEX) {
        uint8_t pp = 0;
        while (implied[pp] != prefix)
            pp++;
        bytes[n++] = 0xc4;
        bytes[n++] = 0xe0 | row->map;
        bytes[n++] = (uint8_t)(0x78 | pp | (wide ? 0x80 : 0));
    } else {
        if (prefix)
            bytes[n++] = prefix;
        if (wide)
            bytes[n++] = 0x48;
        if (row->map != MAP_PRIMARY)
            bytes[n++] = 0x0f;
        if (row->map >= MAP_0F38)
            bytes[n++] = row->map == MAP_0F38 ? 0x38 : 0x3a;
    }
    bytes[n++] = row->opcode;
    bytes[n++] = (uint8_t)((memory ? 0 : 0xc0) | reg << 3 | rm);
    return n + 4; /* an immediate that one or the other takes, of zeros */
}

static enum outcome complete_row(const struct instruction *row, bool memory, uint32_t offered_words)
{
    uint8_t bytes[INSN_MAX] = {0};
    size_t n = encode_row(row, memory, row->form & W1, bytes);
    fresh_guest();
    memset(f.source.cpuid, 0xff, sizeof f.source.cpuid);
    if (row->feature != NO_FEATURE)
        f.source.cpuid[row->feature >> 5] ^= offered_words & 1u << (row->feature & 31);
    return complete(&f.c, bytes, n);
}

static void without_its_feature_every_row_is_undefined(void)
{
    unsigned checked = 0;
    for (size_t i = 0; i < n_instructions; i++) {
        const struct instruction *row = &instructions[i];
        if (row->feature == NO_FEATURE)
            continue;
        bool memory = row->form & RM_MEMORY;
        enum outcome without = complete_row(row, memory, ~0u);
        if (without != COMPLETE_FAULT || f.c.event.vector != V_UD)
            fprintf(stderr, "row %zu (%x %02x /%u): %d, vector %u\n", i, row->map, row->opcode,
                    row->extension, without, f.c.event.vector);
        CHECK_EQUAL(without, COMPLETE_FAULT);
        CHECK_EQUAL(f.c.event.vector, V_UD);
        CHECK_EQUAL(f.c.regs.rip, CODE);
        enum outcome with = complete_row(row, memory, 0);
        CHECK(with != COMPLETE_FAULT || f.c.event.vector != V_UD || !row->complete ||
              row->complete == complete_fsgsbase); /* which asks CR4 as well */
        CHECK(row->complete || with == COMPLETE_UNKNOWN);
        checked++;
    }
    CHECK(checked > 50);
}

static void the_other_form_of_a_row_that_has_one_is_undefined(void)
{
    for (size_t i = 0; i < n_instructions; i++) {
        const struct instruction *row = &instructions[i];
        uint8_t bytes[INSN_MAX] = {0};
        if (!(row->form & ELSE_UD))
            continue;
        size_t n = encode_row(row, false, row->form & W1, bytes);
        if (row->form & VEX)
            bytes[2] |= 4; /* L = 1 */
        fresh_guest();
        CHECK_EQUAL(complete(&f.c, bytes, n), COMPLETE_FAULT);
        CHECK_EQUAL(f.c.event.vector, V_UD);
    }
    fresh_guest(); /* fences share an opcode with XRSTOR, XSAVEOPT and CLFLUSH */
    CHECK_EQUAL(COMPLETE(0x0f, 0xae, 0xe8), COMPLETE_UNKNOWN);
}

static void tzcnt_and_lzcnt_without_their_features_are_the_older_scans(void)
{
    fresh_guest();
    memset(f.source.cpuid, 0, sizeof f.source.cpuid);
    f.c.regs.rax = 0x10100;
    CHECK_EQUAL(COMPLETE(0xf3, 0x48, 0x0f, 0xbc, 0xc8), COMPLETE_DONE); /* bsf %rax, %rcx */
    CHECK_EQUAL(f.c.regs.rcx, 8);
    CHECK_EQUAL(COMPLETE(0xf3, 0x48, 0x0f, 0xbd, 0xc8), COMPLETE_DONE); /* bsr %rax, %rcx */
    CHECK_EQUAL(f.c.regs.rcx, 16);
    CHECK_EQUAL(f.c.regs.rflags & FLAG_ZF, 0);
    f.c.regs.rax = 0;
    CHECK_EQUAL(COMPLETE(0xf3, 0x48, 0x0f, 0xbc, 0xc8), COMPLETE_DONE);
    CHECK_EQUAL(f.c.regs.rcx, 16);
    CHECK_EQUAL(f.c.regs.rflags & FLAG_ZF, FLAG_ZF);
}

int main(void)
{
    without_its_feature_every_row_is_undefined();
    the_other_form_of_a_row_that_has_one_is_undefined();
    tzcnt_and_lzcnt_without_their_features_are_the_older_scans();
    lengths_and_operands_are_decoded();
    every_case_agrees_with_the_processor();
    any_bytes_are_safe();
    page_rights_become_the_right_faults();
    a_write_across_pages_is_whole_or_not_at_all();
    large_pages_and_other_paging_modes_are_walked();
    what_is_not_ram_or_not_modelled_is_left_alone();
    segments_have_limits_and_bases();
    exceptions_and_privilege();
    no_address_that_is_not_canonical_is_taken_for_another();
    a_gate_decides_whether_a_software_interrupt_may_use_it();
    iret_returns_within_a_level_and_to_an_outer_one();
    an_iret_to_what_is_no_segment_for_it_faults_where_it_is();
    invpcid_flushes_and_checks_its_descriptor();
    if (processor_has("xsave") && processor_has("avx")) {
        saves_agree_with_the_processor();
        restores_agree_with_the_processor();
    }
    bad_restore_headers_are_refused();
    return 0;
}
