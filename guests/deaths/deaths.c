/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ways to die, one a run: "die=NAME" on the command line. Those that fault have no IDT, so that the first exception
 * is the last: who wants to be told what it was has only the registers and tables that are left. The others go on
 * for ever and do nothing.
 */
#include "interrupts.h"

#define UNMAPPED_TERABYTE (1ull << 40)
#define NON_CANONICAL 0x0000900000000000ull

enum { TWO_MIB = 1 << 21, HOLE = 12 << 20 }; /* a place within 16 MiB that nothing else uses */

extern uint64_t page_map[], page_pointers[], page_directories[];

static const struct {
    uint16_t limit;
    uint64_t base;
} __attribute__((packed)) empty;

static void no_idt(void)
{
    __asm__ volatile("lidt %0" ::"m"(empty));
}

static void read_at(uint64_t address)
{
    write_cr3(read_cr3());
    __asm__ volatile("mov (%0), %%rax" ::"r"(address) : "rax", "memory");
}

static void write_at(uint64_t address)
{
    write_cr3(read_cr3());
    __asm__ volatile("movq $1, (%0)" ::"r"(address) : "memory");
}

static void pml4e(void)
{
    read_at(UNMAPPED_TERABYTE);
}

static void pdpte(void)
{
    read_at(5ull << 30);
}

static void pde(void)
{
    page_directories[HOLE / TWO_MIB] = 0;
    write_at(HOLE + 8);
}

static void pte(void)
{
    page_set(HOLE, 0);
    write_at(HOLE + 8);
}

static void read_only(void)
{
    page_set(HOLE, HOLE | PAGE_PRESENT);
    write_at(HOLE + 8);
}

/* Bits 20 to 13 of an entry that maps 2 MiB, Intel SDM 3A, table 4-18. */
static void reserved_bit(void)
{
    page_directories[HOLE / TWO_MIB] |= 1 << 15;
    read_at(HOLE);
}

static void wild_jump(void)
{
    __asm__ volatile("jmp *%0" ::"r"(NON_CANONICAL));
}

static void wild_read(void)
{
    read_at(NON_CANONICAL);
}

__attribute__((noinline)) static uint64_t recurse(uint64_t n)
{
    volatile uint64_t kept = n; /* on the stack, and needed after the call: no loop can stand for this */
    return kept == UINT64_MAX ? 0 : recurse(n + 1) + kept;
}

static void stack_overflow(void)
{
    page_set(HOLE, 0); /* the guard page; above it a stack of 8 KiB */
    __asm__ volatile("mov %0, %%rsp; xor %%edi, %%edi; call *%1" ::"r"((uint64_t)HOLE + 3 * 4096),
                     "r"(recurse)
                     : "memory");
}

static void segment(void)
{
    __asm__ volatile("mov %0, %%ds" ::"r"(0x1238));
}

static void absent_segment(void)
{
    __asm__ volatile("mov %0, %%es" ::"r"(SELECTOR_ABSENT));
}

static void msr(void)
{
    wrmsr(0x12345, 1);
}

static void msr_value(void)
{
    wrmsr(MSR_LSTAR, NON_CANONICAL);
}

/* PUSH ES does not exist in 64-bit mode. */
static void opcode(void)
{
    __asm__ volatile(".byte 0x06");
}

static void zeroes(void)
{
    __asm__ volatile("call *%0" ::"r"((uint64_t)HOLE), "a"(UNMAPPED_TERABYTE));
}

static void divide(void)
{
    __asm__ volatile("div %0" ::"r"(0ull), "a"(1), "d"(0));
}

/* A whole IDT, with nothing in it. */
static void empty_idt(void)
{
    static uint64_t idt[512];
    const struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) pointer = {sizeof idt - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0; ud2" ::"m"(pointer));
}

/* Good handlers, and no stack for their frames. */
static void no_stack(void)
{
    cpu_init();
    __asm__ volatile("mov %0, %%rsp; ud2" ::"r"(UNMAPPED_TERABYTE));
}

/* A handler that is entered, and dies itself. */
static void lose(struct trap_frame *frame)
{
    (void)frame;
    no_idt();
    read_at(UNMAPPED_TERABYTE);
}

static void in_handler(void)
{
    cpu_init();
    trap_handlers[VECTOR_UD] = lose;
    __asm__ volatile("ud2");
}

/* Many instructions without an exit before it. */
static void late(void)
{
    for (volatile uint32_t n = 0; n < 1000; n++)
        ;
    read_at(UNMAPPED_TERABYTE);
}

/* Every source of interrupts is off, and interrupts are on. */
static void waiting(void)
{
    cpu_init();
    pic_init();
    for (;;)
        __asm__ volatile("sti; hlt" ::: "memory");
}

/* The PIT ticks, and each tick is taken. */
static void tick(struct trap_frame *frame)
{
    (void)frame;
    pic_eoi(0);
}

static void ticking(void)
{
    cpu_init();
    pic_init();
    trap_handlers[VECTOR_PIC] = tick;
    pic_unmask(0);
    pit_start(0xffff);
    for (;;)
        __asm__ volatile("sti; hlt" ::: "memory");
}

/* Only a byte on the serial line could wake it. */
static void listening(void)
{
    enum { IER = 1, MCR = 4, RECEIVED = 1, OUT2 = 8, IRQ = 4 };
    cpu_init();
    pic_init();
    outb(PORT_SERIAL + IER, RECEIVED);
    outb(PORT_SERIAL + MCR, OUT2);
    pic_unmask(IRQ);
    for (;;)
        __asm__ volatile("sti; hlt" ::: "memory");
}

/* A loop of many instructions, and nothing in it will ever change. */
static void loop(void)
{
    static volatile uint32_t ready;
    while (!ready)
        ;
}

/* Nobody types. */
static void poll(void)
{
    serial_getc();
}

static const struct {
    const char *name;
    void (*die)(void);
} deaths[] = {
    {"pml4e", pml4e},
    {"pdpte", pdpte},
    {"pde", pde},
    {"pte", pte},
    {"read-only", read_only},
    {"reserved-bit", reserved_bit},
    {"wild-jump", wild_jump},
    {"wild-read", wild_read},
    {"stack-overflow", stack_overflow},
    {"segment", segment},
    {"absent-segment", absent_segment},
    {"msr", msr},
    {"msr-value", msr_value},
    {"opcode", opcode},
    {"zeroes", zeroes},
    {"divide", divide},
    {"empty-idt", empty_idt},
    {"no-stack", no_stack},
    {"in-handler", in_handler},
    {"late", late},
    {"waiting", waiting},
    {"ticking", ticking},
    {"listening", listening},
    {"loop", loop},
    {"poll", poll},
};

void guest_main(void)
{
    const char *line = boot_info()->command_line;
    cpu_init();
    no_idt();
    for (unsigned i = 0; i < sizeof deaths / sizeof *deaths; i++) {
        size_t n = strlen(deaths[i].name);
        if (!memcmp(line, "die=", 4) && !memcmp(line + 4, deaths[i].name, n) && !line[4 + n]) {
            print("dying of %s\n", deaths[i].name);
            deaths[i].die();
            CHECK(!"reached: it lives on");
        }
    }
    REQUIRE(EXIT_ARGUMENT, !"die= names no death");
}
