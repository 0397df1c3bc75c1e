/* SPDX-License-Identifier: Apache-2.0 */
/* Start of a long-mode guest: two entries, one guest_main(). */
#include "cpu.h"
#include "guest.h"

/* Plain ELF64 loading enters here: 64-bit mode, identity map. boot.c judges what the registers hold. */
    .section .text.start, "ax"
    .code64
    .globl _start
_start:
    mov %rsi, entry_rsi(%rip)
    mov %rbx, entry_rbx(%rip)
    movl $64, entry_width(%rip)
start_common:
    lea stack_top(%rip), %rsp
    xor %ebp, %ebp
    call guest_main
    jmp guest_pass

/* PVH: 32-bit protected mode, paging off, flat segments, ebx = hvm_start_info. */
    .code32
    .globl pvh_start
pvh_start:
    cli
    cld
    mov $stack_top, %esp
    mov %ebx, entry_rbx
    movl $32, entry_width
    pushfl
    popl entry_eflags
    mov %cr0, %eax
    mov %eax, entry_cr0
    mov %cr4, %eax
    mov %eax, entry_cr4
    mov $start_common, %ebx

/* From flat 32-bit code to 64-bit code at ebx, on the tables below; esp is kept. Also the way of the other CPUs. */
    .globl enter_long_mode
enter_long_mode:
    lgdt gdt_pointer
    mov $SELECTOR_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $CR4_PAE, %eax
    mov %eax, %cr4
    mov $page_map, %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov $(CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG), %eax
    mov %eax, %cr0
    ljmp $SELECTOR_CODE, $1f
    .code64
1:  mov %ebx, %ebx
    jmp *%rbx

/*
 * Xen public headers, elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY. The descriptor is as wide as the ELF's addresses.
 */
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start

/*
 * The first 4 GiB, identity mapped with 2 MiB pages for every privilege level. Written out here rather than built
 * at run time: two thousand entries would be milliseconds where kernel code is emulated.
 */
    .section .tables, "aw"
    .balign 4096
    .globl page_map
page_map:
    .quad page_pointers + (PAGE_PRESENT | PAGE_WRITE | PAGE_USER | PAGE_ACCESSED)
    .fill 511, 8, 0
page_pointers:
    .set i, 0
    .rept 4
    .quad page_directories + i * 4096 + (PAGE_PRESENT | PAGE_WRITE | PAGE_USER | PAGE_ACCESSED)
    .set i, i + 1
    .endr
    .fill 508, 8, 0
    .globl page_directories
page_directories:
    .set i, 0
    .rept 2048
    .quad i * 0x200000 + (PAGE_PRESENT | PAGE_WRITE | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY | PAGE_LARGE)
    .set i, i + 1
    .endr

/* Selectors in the order SYSCALL and SYSRET want (Intel SDM 3A, 5.8.8); the TSS base is filled in by cpu_init. */
    .data
    .balign 8
    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff /* 08: code, 64-bit */
    .quad 0x00cf93000000ffff /* 10: data */
    .quad 0x00cf9b000000ffff /* 18: code, 32-bit */
    .quad 0x00cff3000000ffff /* 20: data, CPL 3 */
    .quad 0x00affb000000ffff /* 28: code, 64-bit, CPL 3 */
    .quad 0, 0               /* 30: TSS */
    .quad 0x00cf13000000ffff /* 40: data, not present */
    .globl gdt_pointer
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt
    .globl entry_rbx, entry_rsi, entry_width, entry_cr0, entry_cr4, entry_eflags
    .balign 8
entry_rbx: .quad 0
entry_rsi: .quad 0
entry_width: .long 0
entry_cr0: .long 0
entry_cr4: .long 0
entry_eflags: .long 0

    .bss
    .balign 16
    .skip 16384
stack_top:

    .section .note.GNU-stack, "", @progbits
