/* SPDX-License-Identifier: Apache-2.0 */
/*
 * User-mode instruction prevention (Intel SDM vol. 3, 2.5, CR4.UMIP; vol. 2, SGDT, SIDT, SLDT, SMSW, STR): with CR4.UMIP
 * set the five instructions raise #GP(0) at CPL 3 and only there; with it clear they store the processor's own values.
 *
 * Where CPUID lacks UMIP, the line "SKIP: no UMIP" is printed in place of the checks of CR4.UMIP, after one that setting
 * it raises #GP.
 */
#include "cpu.h"

enum { CR4_UMIP = 1 << 11, LEAF_FEATURES = 7, ECX_UMIP = 1 << 2, VECTOR_GP = 13, DONE = 0x600d };

struct table {
    uint16_t limit;
    uint64_t base;
} __attribute__((packed));

static struct stored {
    struct table gdt, idt;
    uint64_t ldt, msw, task; /* by the forms that name a register */
    uint16_t ldt_word, msw_word, task_word;
} stored;

/* Where each instruction lies, so that a fault can be told from one of another instruction. */
extern char at_sgdt[], at_sidt[], at_sldt[], at_smsw[], at_str[], at_sldt_word[], at_smsw_word[],
    at_str_word[];

#define USER(name, assembly, place)                                                                          \
    static __attribute__((noinline, noclone)) uint64_t name(uint64_t unused)                                 \
    {                                                                                                        \
        (void)unused;                                                                                        \
        __asm__ volatile("at_" #name ": " assembly : "=m"(stored.place)::"rax", "memory");                   \
        return DONE;                                                                                         \
    }
USER(sgdt, "sgdt %0", gdt)
USER(sidt, "sidt %0", idt)
USER(sldt, "sldt %%rax; mov %%rax, %0", ldt)
USER(smsw, "smsw %%rax; mov %%rax, %0", msw)
USER(str, "str %%rax; mov %%rax, %0", task)
USER(sldt_word, "sldt %0", ldt_word)
USER(smsw_word, "smsw %0", msw_word)
USER(str_word, "str %0", task_word)

static const struct {
    const char *name;
    uint64_t (*run)(uint64_t);
    const char *at;
} instructions[] = {{"sgdt", sgdt, at_sgdt},
                    {"sidt", sidt, at_sidt},
                    {"sldt", sldt, at_sldt},
                    {"smsw", smsw, at_smsw},
                    {"str", str, at_str},
                    {"sldt to memory", sldt_word, at_sldt_word},
                    {"smsw to memory", smsw_word, at_smsw_word},
                    {"str to memory", str_word, at_str_word}};
enum { INSTRUCTIONS = sizeof(instructions) / sizeof(*instructions) };

static void check_stored(void)
{
    static struct stored here;
    __asm__ volatile("sgdt %0; sidt %1" : "=m"(here.gdt), "=m"(here.idt));
    CHECK(!memcmp(&stored.gdt, &here.gdt, sizeof(here.gdt)));
    CHECK(!memcmp(&stored.idt, &here.idt, sizeof(here.idt)));
    CHECK_EQ(stored.ldt & 0xffff, 0);
    CHECK_EQ(stored.ldt_word, 0);
    CHECK_EQ(stored.msw & 0xffff, read_cr0() & 0xffff);
    CHECK_EQ(stored.msw_word, read_cr0() & 0xffff);
    CHECK_EQ(stored.task & 0xffff, SELECTOR_TSS);
    CHECK_EQ(stored.task_word, SELECTOR_TSS);
}

static void forget(void)
{
    memset(&stored, 0xa5, sizeof(stored));
}

/* At CPL 3: each ends, or each raises #GP(0) where it stands. */
static void run_in_user(bool prevented)
{
    for (unsigned i = 0; i < INSTRUCTIONS; i++) {
        caught.vector = -1;
        const uint64_t answer = enter_user(instructions[i].run, 0, RFLAGS_FIXED);
        if (caught.vector != (prevented ? VECTOR_GP : -1))
            print("%s at CPL 3, CR4 %lx: vector %d\n", instructions[i].name, (unsigned long)read_cr4(),
                  caught.vector);
        CHECK_EQ(caught.vector, prevented ? VECTOR_GP : -1);
        if (prevented)
            CHECK(caught.error == 0 && caught.rip == (uintptr_t)instructions[i].at);
        else
            CHECK_EQ(answer, DONE);
    }
}

static void run_in_kernel(void)
{
    for (unsigned i = 0; i < INSTRUCTIONS; i++)
        CHECK_EQ(instructions[i].run(0), DONE);
    check_stored();
}

static bool has_umip(void)
{
    uint32_t eax = LEAF_FEATURES, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return ecx & ECX_UMIP;
}

static void check_unprevented(void)
{
    forget();
    run_in_user(false);
    check_stored();
}

void guest_main(void)
{
    cpu_init();
    trap_handlers[VECTOR_GP] = trap_user_exit;
    forget();
    run_in_kernel();
    check_unprevented();
    if (!has_umip()) {
        trap_handlers[VECTOR_GP] = 0;
        CHECK_EQ(TRAP("mov %0, %%cr4", read_cr4() | CR4_UMIP), VECTOR_GP);
        print("SKIP: no UMIP\n");
        return;
    }
    write_cr4(read_cr4() | CR4_UMIP);
    CHECK(read_cr4() & CR4_UMIP);
    run_in_user(true);
    forget();
    run_in_kernel();
    write_cr4(read_cr4() & ~(uint64_t)CR4_UMIP);
    check_unprevented();
    print("CR4.UMIP prevents\n");
}
