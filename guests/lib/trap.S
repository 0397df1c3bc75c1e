/* SPDX-License-Identifier: Apache-2.0 */
/* Interrupt and exception entry, and the way to CPL 3 and back. */
#include "cpu.h"

/* One stub a vector, 16 bytes apart. These push an error code themselves: 8, 10..14, 17, 21. */
#define ERROR_CODE_VECTORS 0x00227d00
    .text
    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept VECTORS
    .balign 16
    .if vector >= 32 || !((ERROR_CODE_VECTORS >> vector) & 1)
    push $0
    .endif
    push $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    push %rax
    push %rbx
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %rbp
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    cld
    mov %rsp, %rdi
    call trap_dispatch
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rbp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    add $16, %rsp
    iretq

/* uint64_t enter_user(function, argument, rflags) */
    .globl enter_user
enter_user:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, kernel_stack(%rip)
    mov %rsp, tss + 4(%rip) /* RSP0, Intel SDM 3A 8.7: the next entry from CPL 3 starts below what is kept */
    lea user_stack_top(%rip), %rcx
    push $SELECTOR_USER_DATA
    push %rcx
    push %rdx
    push $SELECTOR_USER_CODE
    lea user_call(%rip), %rcx
    push %rcx
    mov %rdi, %rax
    mov %rsi, %rdi
    iretq

/* At CPL 3. */
user_call:
    call *%rax
    .globl user_done
user_done:
    ud2

/* At CPL 0 again: where trap_user_exit returns to. rax is the answer. */
    .globl user_exit
user_exit:
    mov kernel_stack(%rip), %rsp
    push $RFLAGS_FIXED
    popfq
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .bss
    .balign 16
kernel_stack: .skip 16
    .globl tss
tss: .skip 104 + 8193 + 7 /* and the I/O permission map, see cpu.c */
    .skip 16384
user_stack_top:

    .section .note.GNU-stack, "", @progbits
