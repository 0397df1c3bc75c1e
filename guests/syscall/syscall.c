/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SYSCALL and SYSRET between CPL 3 and CPL 0 (Intel SDM 3A, 5.8.8): selectors, RCX, R11, the flag mask, the
 * stack that stays the user's; with page faults at CPL 3 in between, which are to arrive as ever. The entry
 * point lies on a page of its own that CPL 3 may not execute, as an operating system's would.
 */
#include "cpu.h"

enum { CALLS = 20, PF = 14, FLAG_CARRY = 1, FLAG_DIRECTION = 0x400, PF_WRITE_USER = 6 };

struct call {
    uint64_t number, rcx, r11, rsp, cs, ss, rflags;
};

uint64_t syscall_handler(struct call *call);
extern char syscall_entry[], syscall_entry_end[];
char syscall_stack[4096] __attribute__((aligned(16)));
uint64_t syscall_user_stack;

__asm__(".pushsection .text\n"
        ".balign 4096\n"
        "syscall_entry:\n"
        "    mov %rsp, syscall_user_stack(%rip)\n"
        "    lea syscall_stack + 4096(%rip), %rsp\n"
        "    pushfq\n"
        "    mov %ss, %eax\n"
        "    push %rax\n"
        "    mov %cs, %eax\n"
        "    push %rax\n"
        "    push syscall_user_stack(%rip)\n"
        "    push %r11\n"
        "    push %rcx\n"
        "    push %rdi\n"
        "    mov %rsp, %rdi\n"
        "    call syscall_handler\n"
        "    mov 8(%rsp), %rcx\n"
        "    mov 16(%rsp), %r11\n"
        "    mov syscall_user_stack(%rip), %rsp\n"
        "    sysretq\n"
        ".balign 4096\n"
        "syscall_entry_end:\n"
        ".popsection\n");

/* What the last call was made with, for the handler to compare. */
static volatile uint64_t user_rsp, user_rip;
static volatile unsigned calls, faults;
static char page[4096] __attribute__((aligned(4096)));

uint64_t syscall_handler(struct call *call)
{
    CHECK_EQ(call->cs, SELECTOR_CODE);
    CHECK_EQ(call->ss, SELECTOR_DATA);
    CHECK_EQ(call->rsp, user_rsp);
    CHECK_EQ(call->rcx, user_rip);
    CHECK_EQ(call->r11 & (FLAG_CARRY | FLAG_DIRECTION), FLAG_CARRY | FLAG_DIRECTION);
    CHECK_EQ(call->rflags & FLAG_DIRECTION, 0); /* the mask */
    calls++;
    return call->number * 3;
}

static uint64_t make_call(uint64_t number)
{
    uint64_t answer;
    __asm__ volatile("mov %%rsp, %1\n\t"
                     "lea 1f(%%rip), %%rax\n\t"
                     "mov %%rax, %2\n\t"
                     "std\n\t"
                     "stc\n\t"
                     "syscall\n"
                     "1: cld"
                     : "=&a"(answer), "=m"(user_rsp), "=m"(user_rip), "+D"(number)
                     :
                     : "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "memory", "cc");
    return answer;
}

static uint64_t user_program(uint64_t n)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        sum += make_call(i);
        *(volatile uint64_t *)page = i; /* the fault handler and the next line take turns */
        uint16_t cs;
        __asm__ volatile("mov %%cs, %0" : "=r"(cs));
        if ((cs & 3) != 3)
            return 0;
    }
    return sum;
}

static void on_fault(struct trap_frame *frame)
{
    CHECK_EQ(read_cr2(), page);
    CHECK_EQ(frame->error, PF_WRITE_USER);
    CHECK_EQ(frame->ss, SELECTOR_USER_DATA);
    page_set((uintptr_t)page, (uint64_t)page | PAGE_PRESENT | PAGE_WRITE | PAGE_USER);
    faults++;
}

void guest_main(void)
{
    cpu_init();
    trap_handlers[PF] = on_fault;
    page_set((uintptr_t)page, 0);
    for (char *at = syscall_entry; at < syscall_entry_end; at += 4096)
        page_set((uintptr_t)at, (uint64_t)at | PAGE_PRESENT | PAGE_WRITE);
    wrmsr(MSR_STAR, (uint64_t)SELECTOR_CODE << 32 | (uint64_t)SELECTOR_CODE32 << 48);
    wrmsr(MSR_LSTAR, (uint64_t)syscall_entry);
    wrmsr(MSR_SFMASK, FLAG_DIRECTION);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);

    CHECK_EQ(enter_user(user_program, CALLS, RFLAGS_FIXED), 3 * CALLS * (CALLS - 1) / 2);
    CHECK_EQ(calls, CALLS);
    CHECK_EQ(faults, 1);
}
