/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Instructions both compat tests run: each is executed by this processor and by the code under test from the
 * same registers and the same 64 bytes of memory at RSI, and must come to the same end.
 */
#ifndef VMM_TEST_COMPAT_CASES_H
#define VMM_TEST_COMPAT_CASES_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { CF = 1, PF = 4, AF = 0x10, ZF = 0x40, SF = 0x80, OF = 0x800 };

/* name, instruction, flags the architecture leaves undefined, the /proc/cpuinfo flag it needs */
#define COMPAT_CASES(X)                                                                                      \
    X(popcnt, "popcnt %rax, %rbx", 0, "popcnt")                                                              \
    X(popcnt_32, "popcnt %eax, %r9d", 0, "popcnt")                                                           \
    X(popcnt_16, "popcnt %ax, %r9w", 0, "popcnt")                                                            \
    X(popcnt_memory, "popcnt 8(%rsi), %r15", 0, "popcnt")                                                    \
    X(andn, "andn %rax, %rbx, %rcx", AF | PF, "bmi1")                                                        \
    X(andn_32, "andn (%rsi), %r10d, %r11d", AF | PF, "bmi1")                                                 \
    X(bextr, "bextr %rax, %rbx, %rcx", AF | PF | SF, "bmi1")                                                 \
    X(bextr_32, "bextr %eax, (%rsi), %ecx", AF | PF | SF, "bmi1")                                            \
    X(blsi, "blsi %rax, %rcx", AF | PF, "bmi1")                                                              \
    X(blsi_32, "blsi %eax, %ecx", AF | PF, "bmi1")                                                           \
    X(blsr, "blsr %rax, %r8", AF | PF, "bmi1")                                                               \
    X(blsr_32, "blsr 4(%rsi), %r8d", AF | PF, "bmi1")                                                        \
    X(blsmsk, "blsmsk %rax, %rcx", AF | PF, "bmi1")                                                          \
    X(blsmsk_32, "blsmsk %r12d, %ecx", AF | PF, "bmi1")                                                      \
    X(bzhi, "bzhi %rax, %rbx, %rcx", AF | PF, "bmi2")                                                        \
    X(bzhi_32, "bzhi %eax, (%rsi), %ecx", AF | PF, "bmi2")                                                   \
    X(pdep, "pdep %rax, %rbx, %rcx", 0, "bmi2")                                                              \
    X(pdep_32, "pdep %eax, %ebx, %ecx", 0, "bmi2")                                                           \
    X(pext, "pext %rax, %rbx, %rcx", 0, "bmi2")                                                              \
    X(pext_memory, "pext 16(%rsi), %rbx, %r13", 0, "bmi2")                                                   \
    X(mulx, "mulx %rax, %rbx, %rcx", 0, "bmi2")                                                              \
    X(mulx_same, "mulx %rax, %rbx, %rbx", 0, "bmi2")                                                         \
    X(mulx_32, "mulx (%rsi), %ebx, %ecx", 0, "bmi2")                                                         \
    X(rorx, "rorx $13, %rax, %rcx", 0, "bmi2")                                                               \
    X(rorx_none, "rorx $64, %rax, %rcx", 0, "bmi2")                                                          \
    X(rorx_32, "rorx $45, (%rsi), %ecx", 0, "bmi2")                                                          \
    X(sarx, "sarx %rax, %rbx, %rcx", 0, "bmi2")                                                              \
    X(sarx_32, "sarx %eax, %ebx, %ecx", 0, "bmi2")                                                           \
    X(shlx, "shlx %rax, %rbx, %rcx", 0, "bmi2")                                                              \
    X(shlx_32, "shlx %eax, %ebx, %ecx", 0, "bmi2")                                                           \
    X(shrx, "shrx %rax, %rbx, %rcx", 0, "bmi2")                                                              \
    X(shrx_32, "shrx %eax, (%rsi), %ecx", 0, "bmi2")                                                         \
    X(adcx, "adcx %rax, %rcx", 0, "adx")                                                                     \
    X(adcx_32, "adcx %eax, %ecx", 0, "adx")                                                                  \
    X(adox, "adox %rax, %rcx", 0, "adx")                                                                     \
    X(adox_32, "adox (%rsi), %ecx", 0, "adx")                                                                \
    X(crc32_8, "crc32b %al, %ecx", 0, "sse4_2")                                                              \
    X(crc32_high, "crc32b %ah, %ecx", 0, "sse4_2")                                                           \
    X(crc32_rex_8, "crc32b %dil, %ecx", 0, "sse4_2")                                                         \
    X(crc32_16, "crc32w (%rsi), %ecx", 0, "sse4_2")                                                          \
    X(crc32_32, "crc32l %eax, %ecx", 0, "sse4_2")                                                            \
    X(crc32_64, "crc32q %rax, %rcx", 0, "sse4_2")                                                            \
    X(cmpxchg16b, "lock cmpxchg16b 16(%rsi)", 0, "cx16")                                                     \
    X(cmpxchg16b_plain, "cmpxchg16b 32(%rsi)", 0, "cx16")                                                    \
    X(sib, "popcnt 8(%rsi,%rbp,4), %rax", 0, "popcnt")                                                       \
    X(fwait, "fwait", 0, "fpu")                                                                              \
    X(clwb, "clwb (%rsi)", 0, "clwb")                                                                        \
    X(long_nop, "nopw 0x200(%rax,%rax)", 0, "fpu")

/* Left out of the KVM test where the emulator decodes them as something older and answers wrongly. */
#define COMPAT_CASES_MISREAD(X)                                                                              \
    X(lzcnt, "lzcnt %rax, %rbx", OF | SF | PF | AF, "abm")                                                   \
    X(lzcnt_32, "lzcnt %eax, %ebx", OF | SF | PF | AF, "abm")                                                \
    X(lzcnt_16, "lzcnt %ax, %bx", OF | SF | PF | AF, "abm")                                                  \
    X(tzcnt, "tzcnt %rax, %rbx", OF | SF | PF | AF, "bmi1")                                                  \
    X(tzcnt_32, "tzcnt (%rsi), %ebx", OF | SF | PF | AF, "bmi1")                                             \
    X(tzcnt_16, "tzcnt %ax, %bx", OF | SF | PF | AF, "bmi1")                                                 \
    X(movbe_load, "movbe (%rsi), %rax", 0, "movbe")                                                          \
    X(movbe_load_16, "movbe (%rsi), %ax", 0, "movbe")                                                        \
    X(movbe_store, "movbe %eax, 4(%rsi)", 0, "movbe")                                                        \
    X(cmpxchg8b, "lock cmpxchg8b 8(%rsi)", 0, "cx8")                                                         \
    X(cmpxchg8b_plain, "cmpxchg8b (%rsi)", 0, "cx8")                                                         \
    X(cld, "cld", 0, "fpu")

#define COMPAT_BYTES(name, text, undefined, needs)                                                           \
    extern const uint8_t compat_case_##name[], compat_case_end_##name[];                                     \
    __asm__(".pushsection .rodata\ncompat_case_" #name ": " text "\ncompat_case_end_" #name ":\n."           \
            "popsection");
COMPAT_CASES(COMPAT_BYTES)
COMPAT_CASES_MISREAD(COMPAT_BYTES)

struct compat_case {
    const char *name, *needs;
    const uint8_t *bytes, *end;
    uint64_t undefined;
    bool misread;
};

#define COMPAT_ROW(id, text, undefined, needs)                                                               \
    {#id, needs, compat_case_##id, compat_case_end_##id, undefined, false},
#define COMPAT_ROW_MISREAD(id, text, undefined, needs)                                                       \
    {#id, needs, compat_case_##id, compat_case_end_##id, undefined, true},
static const struct compat_case compat_cases[] = {COMPAT_CASES(COMPAT_ROW)
                                                      COMPAT_CASES_MISREAD(COMPAT_ROW_MISREAD)};
enum { N_COMPAT_CASES = sizeof compat_cases / sizeof *compat_cases };

/* ---- this processor's answer ---- */

/* Registers in encoding order; RSP is left alone. */
struct native_state {
    uint64_t gpr[16], rflags;
};

extern void compat_native_run(struct native_state *state, const void *code);
extern void compat_native_return(void);
__asm__(".pushsection .bss\n"
        "compat_native_state: .zero 16\n"
        ".popsection\n"
        ".text\n"
        "compat_native_run:\n"
        "    push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "    mov %rdi, compat_native_state(%rip)\n"
        "    mov %rsi, compat_native_state+8(%rip)\n"
        "    pushq 128(%rdi)\n popfq\n"
        "    mov 0(%rdi), %rax\n mov 8(%rdi), %rcx\n mov 16(%rdi), %rdx\n mov 24(%rdi), %rbx\n"
        "    mov 40(%rdi), %rbp\n mov 48(%rdi), %rsi\n mov 64(%rdi), %r8\n mov 72(%rdi), %r9\n"
        "    mov 80(%rdi), %r10\n mov 88(%rdi), %r11\n mov 96(%rdi), %r12\n mov 104(%rdi), %r13\n"
        "    mov 112(%rdi), %r14\n mov 120(%rdi), %r15\n mov 56(%rdi), %rdi\n"
        "    jmp *compat_native_state+8(%rip)\n"
        "compat_native_return:\n"
        "    pushfq\n"
        "    push %rdi\n"
        "    mov compat_native_state(%rip), %rdi\n"
        "    mov %rax, 0(%rdi)\n mov %rcx, 8(%rdi)\n mov %rdx, 16(%rdi)\n mov %rbx, 24(%rdi)\n"
        "    mov %rbp, 40(%rdi)\n mov %rsi, 48(%rdi)\n mov %r8, 64(%rdi)\n mov %r9, 72(%rdi)\n"
        "    mov %r10, 80(%rdi)\n mov %r11, 88(%rdi)\n mov %r12, 96(%rdi)\n mov %r13, 104(%rdi)\n"
        "    mov %r14, 112(%rdi)\n mov %r15, 120(%rdi)\n"
        "    popq 56(%rdi)\n popq 128(%rdi)\n cld\n"
        "    pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
        "    ret\n");

/* Run `n` bytes of code on this processor; they must fall through at their end. */
static inline void native_execute(struct native_state *state, const uint8_t *bytes, size_t n)
{
    static uint8_t *page;
    if (!page)
        page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        perror("an executable page");
        exit(1);
    }
    static const uint8_t jump_through_next_quad[6] = {0xff, 0x25, 0, 0, 0, 0};
    void (*back)(void) = compat_native_return;
    memcpy(page, bytes, n);
    memcpy(page + n, jump_through_next_quad, 6);
    memcpy(page + n + 6, &back, 8);
    __builtin___clear_cache((char *)page, (char *)page + n + 14);
    compat_native_run(state, page);
}

static inline bool processor_has(const char *flag)
{
    static char flags[16384];
    if (!flags[0]) {
        FILE *f = fopen("/proc/cpuinfo", "r");
        while (f && fgets(flags, sizeof flags, f) && strncmp(flags, "flags", 5) != 0)
            ;
        if (f)
            fclose(f);
    }
    size_t n = strlen(flag);
    for (const char *at = strstr(flags, flag); at; at = strstr(at + 1, flag))
        if (at[-1] == ' ' && (at[n] == ' ' || at[n] == '\n'))
            return true;
    return false;
}

static inline void state_to_regs(const struct native_state *s, struct kvm_regs *r)
{
    const uint64_t *g = s->gpr;
    *r = (struct kvm_regs){.rax = g[0],
                           .rcx = g[1],
                           .rdx = g[2],
                           .rbx = g[3],
                           .rsp = g[4],
                           .rbp = g[5],
                           .rsi = g[6],
                           .rdi = g[7],
                           .r8 = g[8],
                           .r9 = g[9],
                           .r10 = g[10],
                           .r11 = g[11],
                           .r12 = g[12],
                           .r13 = g[13],
                           .r14 = g[14],
                           .r15 = g[15],
                           .rflags = s->rflags};
}

static inline void regs_to_state(const struct kvm_regs *r, struct native_state *s)
{
    *s = (struct native_state){{r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi, r->r8, r->r9,
                                r->r10, r->r11, r->r12, r->r13, r->r14, r->r15},
                               r->rflags};
}

/* xorshift64*: the same sequence every run, so that a failure can be repeated. */
static inline uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed >> 12;
    *seed ^= *seed << 25;
    *seed ^= *seed >> 27;
    return *seed * 0x2545f4914f6cdd1dull;
}

/* Operands where mistakes hide: zero, ones, single bits, small numbers, and noise. */
static inline uint64_t next_operand(uint64_t *seed)
{
    uint64_t r = next_random(seed);
    switch (r & 7) {
    case 0:
        return 0;
    case 1:
        return ~0ull;
    case 2:
        return 1ull << (r >> 8 & 63);
    case 3:
        return r >> 8 & 0xff;
    case 4:
        return next_random(seed) & 0xffffffff;
    default:
        return next_random(seed);
    }
}

/* One trial's start: random registers and memory; RSI is for the caller to set, RBP a small index. */
static inline void random_start(uint64_t *seed, struct native_state *state, uint8_t memory[64])
{
    for (int i = 0; i < 16; i++)
        state->gpr[i] = next_operand(seed);
    state->gpr[5] = next_random(seed) & 7;
    state->rflags = 2 | (next_random(seed) & (CF | PF | AF | ZF | SF | OF));
    for (int i = 0; i < 8; i++) {
        uint64_t value = next_operand(seed);
        memcpy(memory + 8 * i, &value, 8);
    }
    if (next_random(seed) & 1) /* let CMPXCHG succeed half the time, wherever it looks */
        for (int i = 0; i < 4; i++) {
            memcpy(memory + 16 * i, &state->gpr[0], 8);
            memcpy(memory + 16 * i + 8, &state->gpr[2], 8);
        }
}

/* What two runs of a case may differ in: RSI, which is an address, and flags without a definition. */
static inline bool same_end(const struct compat_case *test, const struct native_state *a,
                            const struct native_state *b)
{
    const uint64_t flags = (CF | PF | AF | ZF | SF | OF) & ~test->undefined;
    bool same = ((a->rflags ^ b->rflags) & flags) == 0;
    for (int i = 0; i < 16; i++)
        same &= i == 4 || i == 6 || a->gpr[i] == b->gpr[i];
    return same;
}

static inline void print_state(const char *who, const struct native_state *s)
{
    fprintf(stderr, "  %s: rflags %llx", who, (unsigned long long)s->rflags);
    for (int i = 0; i < 16; i++)
        fprintf(stderr, " %llx", (unsigned long long)s->gpr[i]);
    fprintf(stderr, "\n");
}

#endif
