/* SPDX-License-Identifier: Apache-2.0 */
/* From a SIPI to cpu_main(): real mode at a copy of this code, 32-bit and then long mode in the image. */
#include "cpu.h"

    .section .rodata
    .code16
    .globl trampoline_start, trampoline_end
trampoline_start:
    cli
    lgdtl %cs:trampoline_gdt - trampoline_start
    mov $CR0_PE, %eax
    mov %eax, %cr0
    ljmpl $SELECTOR_CODE32, $protected
trampoline_gdt:
    .word SELECTOR_TSS - 1
    .long gdt
trampoline_end:

    .text
    .code32
protected:
    mov $SELECTOR_DATA, %eax
    mov %eax, %ds
    mov $long_mode, %ebx
    jmp enter_long_mode

    .code64
long_mode:
    mov $1, %edi
    lock xadd %rdi, cpus_started(%rip)
    inc %edi
    mov %edi, %eax
    shl $12, %eax
    lea cpu_stacks + 4096(%rax), %rsp
    xor %ebp, %ebp
    call cpu_main

    .section .note.GNU-stack, "", @progbits
