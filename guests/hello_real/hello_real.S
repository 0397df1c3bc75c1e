/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A 16-bit flat binary that runs wherever it is put, whichever CS:IP says so. Wants a stack; as a boot sector under
 * QEMU (-drive format=raw,file=hello_real.bin) it has the signature where a BIOS looks for it.
 */
#include "guest.h"

    .code16
    .globl _start
_start:
    cld
    call 1f
1:  pop %si
    add $(message - 1b), %si
2:  lodsb %cs:(%si), %al
    test %al, %al
    jz 4f
    mov %al, %bl
    mov $(PORT_SERIAL + 5), %dx
3:  in (%dx), %al
    test $0x20, %al
    jz 3b
    mov $PORT_SERIAL, %dx
    mov %bl, %al
    out %al, (%dx)
    jmp 2b
4:  smsw %ax /* still in real mode: PE clear */
    and $1, %eax
    jnz 5f
    mov $0x10, %al
5:  mov $PORT_DEBUG_EXIT, %dx
    out %eax, (%dx)
6:  cli
    hlt
    jmp 6b
message:
    .asciz "Hello from real mode\nPASS\n"
    .org 510
    .word 0xaa55

    .section .note.GNU-stack, "", @progbits
