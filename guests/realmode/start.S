/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a multiboot loader's 32-bit protected mode to real mode (Intel SDM vol. 3, 9.9.2): segments of 64 KiB first,
 * then CR0.PE off, then a far jump. Everything lies in the first 64 KiB, so that all segment registers may be 0.
 */
#include "guest.h"

    .set COMMAND_LINE_MAX, 255

    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 0, -0x1badb002

    .section .text.start, "ax"
    .globl _start
    .code32
_start:
    cli
    cld
    cmp $0x2badb002, %eax
    jne 3f
    testb $4, (%ebx) /* Multiboot 0.6.96, 3.3: cmdline is valid */
    jz 3f
    mov 16(%ebx), %esi
    mov $command_line, %edi
    mov $COMMAND_LINE_MAX, %ecx
    rep movsb
3:  lgdt gdt_pointer
    ljmp $0x08, $1f
    .code16
1:  mov $0x10, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %fs
    mov %ax, %gs
    mov %ax, %ss
    mov %cr0, %eax
    and $~1, %al
    mov %eax, %cr0
    ljmp $0, $2f
2:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %fs
    mov %ax, %gs
    mov %ax, %ss
    mov $stack_top, %esp
    lidt ivt_pointer
    calll guest_main
    calll guest_pass

/* Vectors 0..31: count, and go on where `resume` says; a breakpoint or an int n goes on behind itself. */
    .globl vector_stubs
vector_stubs:
    .set vector, 0
    .rept 32
    push $vector
    jmp vector_common
    .balign 8
    .set vector, vector + 1
    .endr
vector_common:
    push %bp
    mov %sp, %bp /* bp, vector, ip, cs, flags */
    push %eax
    mov 2(%bp), %ax
    mov %ax, caught_vector
    mov 4(%bp), %ax
    mov %ax, caught_ip
    mov 8(%bp), %ax
    mov %ax, caught_flags
    incw caught_times
    mov resume, %ax
    test %ax, %ax
    jz 1f
    mov %ax, 4(%bp)
    movw $0, resume
1:  pop %eax
    pop %bp
    add $2, %sp
    iretw

    .globl far_function
far_function:
    push %bp
    mov %sp, %bp
    mov 6(%bp), %ax /* bp, ip, cs, argument */
    pop %bp
    lretw $2

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00009b000000ffff /* code, 16-bit, base 0, 64 KiB */
    .quad 0x000093000000ffff /* data likewise */
gdt_pointer:
    .word . - gdt - 1
    .long gdt
ivt_pointer:
    .word 0x3ff
    .long 0
    .globl caught_vector, caught_ip, caught_flags, caught_times, resume
caught_vector: .word 0
caught_ip: .word 0
caught_flags: .word 0
caught_times: .word 0
resume: .word 0

    .bss
    .globl command_line
command_line: .skip COMMAND_LINE_MAX + 1
    .balign 16
    .skip 4096
stack_top:

    .section .note.GNU-stack, "", @progbits
