/* SPDX-License-Identifier: Apache-2.0 */
/* The processor in long mode: descriptor tables, exceptions caught and counted, CPL 3, paging, registers. */
#ifndef GUEST_CPU_H
#define GUEST_CPU_H

#define SELECTOR_CODE 0x08
#define SELECTOR_DATA 0x10
#define SELECTOR_CODE32 0x18
#define SELECTOR_USER_DATA 0x23
#define SELECTOR_USER_CODE 0x2b
#define SELECTOR_TSS 0x30
#define SELECTOR_ABSENT 0x40

#define CR0_PE (1 << 0)
#define CR0_MP (1 << 1)
#define CR0_EM (1 << 2)
#define CR0_TS (1 << 3)
#define CR0_ET (1 << 4)
#define CR0_NE (1 << 5)
#define CR0_WP (1 << 16)
#define CR0_AM (1 << 18)
#define CR0_PG (1 << 31)
#define CR4_PAE (1 << 5)

#define RFLAGS_FIXED (1 << 1)
#define RFLAGS_TF (1 << 8)
#define DR6_BS (1 << 14)
#define RFLAGS_IOPL3 (3 << 12)
#define RFLAGS_AC (1 << 18)

#define MSR_APIC_BASE 0x1b
#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_SFMASK 0xc0000084
#define EFER_SCE (1 << 0)
#define EFER_LME (1 << 8)
#define EFER_NXE (1 << 11)

#define PAGE_PRESENT 0x01
#define PAGE_WRITE 0x02
#define PAGE_USER 0x04
#define PAGE_ACCESSED 0x20
#define PAGE_DIRTY 0x40
#define PAGE_LARGE 0x80

/* Vectors: exceptions, the PIC's sixteen lines, then ours. */
#define VECTORS 64
#define VECTOR_UD 6
#define VECTOR_PIC 0x20
#define VECTOR_USER 0x30 /* for guests, DPL 3 */
#define VECTOR_FREE 0x31 /* .. 0x3e: for guests, DPL 0 */
#define VECTOR_SPURIOUS 0x3f

#ifndef __ASSEMBLER__
#include "guest.h"

struct trap_frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector, error, rip, cs, rflags, rsp, ss;
};

/* Own GDT, TSS, IDT and page tables on this CPU. Interrupts stay off. */
void cpu_init(void);
/* The same IDT on another CPU, see smp.c. */
void idt_load(void);

/* Interrupts (vector >= 32) call these. Exceptions too when set; else they are caught by TRAP or end the
 * guest. */
typedef void trap_handler(struct trap_frame *frame);
extern trap_handler *trap_handlers[VECTORS];

/* The last exception that TRAP caught. `vector` is -1 when there was none. */
struct caught_trap {
    int vector;
    uint64_t error, cr2, rip;
};
extern volatile struct caught_trap caught;
extern volatile uint64_t trap_resume, trap_stack;

/*
 * Run assembly that may fault; execution goes on behind it in either case. Answers the vector, or -1. The
 * assembly may use rax, rcx and rdx, and takes one operand, %0.
 */
#define TRAP(assembly, operand)                                                                              \
    ({                                                                                                       \
        caught.vector = -1;                                                                                  \
        __asm__ volatile(                                                                                    \
            "lea 99f(%%rip), %%rax; mov %%rax, trap_resume(%%rip); mov %%rsp, trap_stack(%%rip); " assembly  \
            "; 99: movq $0, trap_resume(%%rip)" ::"b"((uint64_t)(operand))                                   \
            : "rax", "rcx", "rdx", "memory", "cc");                                                          \
        caught.vector;                                                                                       \
    })

/*
 * Call function(argument) at CPL 3 on a stack of its own with these RFLAGS. Back when it returns or
 * trap_user_exit catches it. Answers its rax. (It comes back through a ud2: system calls and int n are not to
 * be had everywhere.)
 */
uint64_t enter_user(uint64_t (*function)(uint64_t), uint64_t argument, uint64_t rflags);
/* Whether CPL 3 may use every port without IOPL 3: by the TSS's I/O permission map, which is all zeros. */
void user_ports(bool allowed);
/*
 * enter_user() where every port may be used, by the TSS's map and by IOPL 3: kvm_pvm loses the latter on the way to
 * CPL 3, and QEMU's TCG takes no map once a monitor has set TR (7.2: check_io wants a type that is not busy, and KVM
 * gives the busy one), which a roll-back and a move do.
 */
uint64_t enter_user_with_ports(uint64_t (*function)(uint64_t), uint64_t argument);
/* A handler for an exception expected at CPL 3: records it in `caught` and ends enter_user(). */
void trap_user_exit(struct trap_frame *frame);

/* A 4 KiB page within the first 4 GiB gets other attributes (its 2 MiB page is split; 4 splits at most). */
void page_set(uintptr_t address, uint64_t entry);
/* A pointer to any guest-physical address, valid until the next call and within its 2 MiB. */
void *physical_window(uint64_t gpa);

#define READ_WRITE_REGISTER(name)                                                                            \
    static inline uint64_t read_##name(void)                                                                 \
    {                                                                                                        \
        uint64_t value;                                                                                      \
        __asm__ volatile("mov %%" #name ", %0" : "=r"(value)::"memory");                                     \
        return value;                                                                                        \
    }                                                                                                        \
    static inline void write_##name(uint64_t value)                                                          \
    {                                                                                                        \
        __asm__ volatile("mov %0, %%" #name ::"r"(value) : "memory");                                        \
    }

READ_WRITE_REGISTER(cr0)
READ_WRITE_REGISTER(cr2)
READ_WRITE_REGISTER(dr6)
READ_WRITE_REGISTER(cr3)
READ_WRITE_REGISTER(cr4)

static inline uint64_t rdmsr(uint32_t index)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (uint64_t)high << 32 | low;
}

static inline void wrmsr(uint32_t index, uint64_t value)
{
    __asm__ volatile("wrmsr" ::"c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static inline void interrupts_off(void)
{
    __asm__ volatile("cli" ::: "memory");
}

/* sti holds interrupts off for one more instruction, so none can slip in before the hlt. */
static inline void wait_for_interrupt(void)
{
    __asm__ volatile("sti; hlt; cli" ::: "memory");
}

#endif
#endif
