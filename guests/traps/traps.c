/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every exception that can be provoked: vector, error code and address, at CPL 0 and CPL 3, and the ways
 * back. What a host is known not to do can be left out by the command line: iopl=0       port access at CPL 3
 * by IOPL (kvm_pvm: does not survive IRET to CPL 3) user_int=0   int n and int3 at CPL 3 against their gates'
 * DPL (kvm_pvm: #UD, and #BP whatever the DPL) ac=0         alignment checks (QEMU 7.2 TCG: none) idt_shift=4
 * error codes that name an IDT entry (QEMU 7.2 TCG: shifted by 4 in long mode, rather than 3)
 */
#include "cpu.h"

enum {
    DE = 0,
    DB = 1,
    BP = 3,
    UD = 6,
    NM = 7,
    NP = 11,
    SS = 12,
    GP = 13,
    PF = 14,
    AC = 17,
    INTERRUPT = VECTOR_FREE
};
enum { PF_PRESENT = 1, PF_WRITE = 2, PF_USER = 4, PF_RESERVED = 8, PF_FETCH = 16 };
#define IDT_ERROR(vector) ((vector) << idt_shift | 2) /* Intel SDM 3A, 6.13 */
static unsigned idt_shift;

/* A page within the image for its attributes to be changed: nothing else lies on it. */
static char page[4096] __attribute__((aligned(4096)));
static volatile unsigned interrupts;

static void count_interrupt(struct trap_frame *frame)
{
    interrupts++;
    CHECK_EQ(frame->cs, SELECTOR_CODE);
}

static void at_cpl0(void)
{
    CHECK_EQ(TRAP("nop", 0), -1);
    CHECK_EQ(TRAP("xor %%edx, %%edx; xor %%ecx, %%ecx; mov $1, %%eax; div %%ecx", 0), DE);
    CHECK_EQ(TRAP("ud2", 0), UD);
    CHECK_EQ(*(const uint16_t *)caught.rip, 0x0b0f); /* a fault: rip is at the instruction */
    CHECK_EQ(TRAP("int3", 0), BP);
    CHECK_EQ(*(const uint8_t *)(caught.rip - 1), 0xcc); /* a trap: rip is behind it */
    CHECK_EQ(TRAP("pushfq; orl $0x100, (%%rsp); popfq; nop; nop", 0), DB);

    CHECK_EQ(TRAP("mov (%0), %%eax", 1ull << 63), GP); /* not canonical */
    CHECK_EQ(caught.error, 0);
    CHECK_EQ(TRAP("mov $0x300, %%eax; mov %%eax, %%es", 0), GP); /* beyond the GDT */
    CHECK_EQ(caught.error, 0x300);
    CHECK_EQ(TRAP("mov %0, %%es", SELECTOR_ABSENT), NP);
    CHECK_EQ(caught.error, SELECTOR_ABSENT);
    CHECK_EQ(TRAP("mov %0, %%ss", SELECTOR_ABSENT), SS);
    CHECK_EQ(caught.error, SELECTOR_ABSENT);
    CHECK_EQ(TRAP("ltr %w0", SELECTOR_DATA), GP); /* not a TSS */
    CHECK_EQ(caught.error, SELECTOR_DATA);

    write_cr0(read_cr0() | CR0_TS);
    CHECK_EQ(TRAP("fninit", 0), NM);
    __asm__ volatile("clts");
    CHECK_EQ(TRAP("fninit", 0), -1);
}

static void software_interrupts(void)
{
    trap_handlers[INTERRUPT] = count_interrupt;
    __asm__ volatile("int %0" ::"i"(INTERRUPT));
    CHECK_EQ(interrupts, 1);
    trap_handlers[INTERRUPT] = NULL;
    CHECK_EQ(TRAP("int $0x45", 0), GP); /* beyond the IDT */
    CHECK_EQ(caught.error, IDT_ERROR(0x45));
}

static void page_faults(void)
{
    uint64_t at = (uint64_t)page, writable = at | PAGE_PRESENT | PAGE_WRITE;

    page_set(at, 0);
    CHECK_EQ(TRAP("mov (%0), %%eax", page + 8), PF);
    CHECK_EQ(caught.error, 0);
    CHECK_EQ(caught.cr2, at + 8);
    CHECK_EQ(TRAP("movl $1, (%0)", page + 4), PF);
    CHECK_EQ(caught.error, PF_WRITE);
    CHECK_EQ(caught.cr2, at + 4);

    page_set(at, at | PAGE_PRESENT);
    CHECK_EQ(TRAP("mov (%0), %%eax", page), -1);
    CHECK_EQ(TRAP("movl $1, (%0)", page), PF); /* CR0.WP */
    CHECK_EQ(caught.error, PF_PRESENT | PF_WRITE);

    page_set(at, writable | 1ull << 51);
    CHECK_EQ(TRAP("mov (%0), %%eax", page), PF);
    CHECK_EQ(caught.error & ~(uint64_t)PF_PRESENT, PF_RESERVED); /* QEMU 7.2's TCG leaves the P bit out */

    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
    page_set(at, writable | 1ull << 63);
    page[0] = (char)0xc3; /* ret */
    CHECK_EQ(TRAP("call *%0", page), PF);
    CHECK_EQ(caught.error, PF_PRESENT | PF_FETCH);
    CHECK_EQ(caught.cr2, at);
    page_set(at, writable);
    CHECK_EQ(TRAP("call *%0", page), -1);
}

static uint64_t user_add(uint64_t x)
{
    uint16_t cs;
    __asm__ volatile("mov %%cs, %0" : "=r"(cs));
    return x +
           (cs & 3); /* its CPL; the rest of the selector is the host's where user code runs unvirtualised */
}

static uint64_t user_read(uint64_t address)
{
    return *(volatile uint32_t *)address;
}

static uint64_t user_write(uint64_t address)
{
    return *(volatile uint32_t *)address = 1;
}

static uint64_t user_privileged(uint64_t x)
{
    __asm__ volatile("hlt");
    return x;
}

static uint64_t user_port(uint64_t port)
{
    outb((uint16_t)port, 0x55);
    return 1;
}

static uint64_t user_interrupt(uint64_t x)
{
    __asm__ volatile("int %0" ::"i"(INTERRUPT));
    return x;
}

/* rax survives the gate, and the stack is the user's again. */
static uint64_t user_gate(uint64_t x)
{
    uint64_t before, after;
    __asm__ volatile("mov %%rsp, %0; int %2; mov %%rsp, %1" : "=&r"(before), "=&r"(after) : "i"(VECTOR_USER));
    return before == after ? x : 0;
}

static void on_gate(struct trap_frame *frame)
{
    interrupts++;
    CHECK_EQ(frame->cs, SELECTOR_USER_CODE);
    CHECK_EQ(frame->ss, SELECTOR_USER_DATA);
}

static uint64_t user_breakpoint(uint64_t x)
{
    __asm__ volatile("int3");
    return x;
}

static uint64_t user_divide(uint64_t x)
{
    __asm__ volatile("xor %%edx, %%edx; divl %0" ::"r"((uint32_t)x) : "eax", "edx", "cc");
    return x;
}

/* What function(argument) at CPL 3 ends in. */
static int user_trap(uint64_t (*function)(uint64_t), uint64_t argument, uint64_t rflags)
{
    caught.vector = -1;
    enter_user(function, argument, rflags | RFLAGS_FIXED);
    return caught.vector;
}

static void at_cpl3(void)
{
    CHECK_EQ(enter_user(user_add, 1000, RFLAGS_FIXED), 1003);
    for (int vector = 0; vector < 32; vector++)
        trap_handlers[vector] = trap_user_exit;

    CHECK_EQ(user_trap(user_divide, 0, 0), DE);
    CHECK_EQ(user_trap(user_privileged, 0, 0), GP);
    CHECK_EQ(caught.error, 0);
    write_dr6(0);
    CHECK_EQ(user_trap(user_add, 0, RFLAGS_TF), DB);
    CHECK_EQ(read_dr6() & DR6_BS, DR6_BS);

    CHECK_EQ(user_trap(user_port, PORT_POST, 0), GP);
    user_ports(true);
    CHECK_EQ(user_trap(user_port, PORT_POST, 0), -1);
    user_ports(false);
    if (argument("iopl", 1))
        CHECK_EQ(user_trap(user_port, PORT_POST, RFLAGS_IOPL3), -1);

    uint64_t at = (uint64_t)page; /* still mapped for CPL 0 alone */
    CHECK_EQ(user_trap(user_read, at, 0), PF);
    CHECK_EQ(caught.error, PF_PRESENT | PF_USER);
    CHECK_EQ(caught.cr2, at);
    CHECK_EQ(user_trap(user_write, at, 0), PF);
    CHECK_EQ(caught.error, PF_PRESENT | PF_USER | PF_WRITE);
    page_set(at, at | PAGE_PRESENT | PAGE_WRITE | PAGE_USER);
    CHECK_EQ(user_trap(user_write, at, 0), -1);

    if (argument("ac", 1)) {
        write_cr0(read_cr0() | CR0_AM);
        CHECK_EQ(user_trap(user_read, at + 1, RFLAGS_AC), AC);
        CHECK_EQ(caught.error, 0);
        CHECK_EQ(user_trap(user_read, at + 1, 0), -1);
    }
}

static void user_interrupts(void)
{
    trap_handlers[VECTOR_USER] = on_gate;
    interrupts = 0;
    CHECK_EQ(enter_user(user_gate, 77, RFLAGS_FIXED), 77);
    CHECK_EQ(interrupts, 1);
    CHECK_EQ(user_trap(user_interrupt, 0, 0), GP); /* the gate's DPL is 0 */
    CHECK_EQ(caught.error, IDT_ERROR(INTERRUPT));
    CHECK_EQ(user_trap(user_breakpoint, 0, 0), GP);
    CHECK_EQ(caught.error, IDT_ERROR(BP));
}

void guest_main(void)
{
    cpu_init();
    idt_shift = (unsigned)argument("idt_shift", 3);
    at_cpl0();
    software_interrupts();
    page_faults();
    at_cpl3();
    if (argument("user_int", 1))
        user_interrupts();
}
