/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Start of a 32-bit protected mode guest. One entry serves a plain ELF32 (nothing passed), PVH (ebx = start info)
 * and multiboot (eax = magic, ebx = information).
 */
#include "guest.h"

    .section .text.start, "ax"
    .globl _start
_start:
    cli
    cld
    mov $stack_top, %esp
    pushfl
    popl entry_eflags
    mov %cr0, %ecx
    mov %ecx, entry_cr0
    mov %cr4, %ecx
    mov %ecx, entry_cr4
    mov %eax, entry_eax
    mov %ebx, entry_rbx
    movl $32, entry_width
    xor %ebp, %ebp
    call guest_main
    jmp guest_pass

#ifndef MULTIBOOT_FLAGS
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long _start
#else
/* Multiboot 0.6.96, 3.1: within the first 8 KiB of the file. The addresses count only with flag 16. */
    .section .multiboot, "a"
    .balign 4
multiboot_header:
    .long 0x1badb002, MULTIBOOT_FLAGS, -(0x1badb002 + MULTIBOOT_FLAGS)
    .long multiboot_header, image_start, image_data_end, image_end, _start
#endif

    .data
    .globl entry_eax, entry_rbx, entry_width, entry_cr0, entry_cr4, entry_eflags
    .balign 8
entry_rbx: .quad 0
entry_eax: .long 0
entry_width: .long 0
entry_cr0: .long 0
entry_cr4: .long 0
entry_eflags: .long 0

    .bss
    .balign 16
    .skip 16384
stack_top:

    .section .note.GNU-stack, "", @progbits
