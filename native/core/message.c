/* SPDX-License-Identifier: Apache-2.0 */
/* What a person is told about a machine. */
#include "core/core.h"

#include <stdarg.h>
#include <stdio.h>

void vmm_vm_on_message(vmm_vm *vm, void (*say)(void *opaque, const char *text), void *opaque)
{
    vm->say_opaque = opaque;
    vm->say = say;
}

void vmm_vm_say(struct vmm_vm *vm, const char *format, ...)
{
    char text[240];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (vm->say)
        vm->say(vm->say_opaque, text);
}
