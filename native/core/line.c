/* SPDX-License-Identifier: Apache-2.0 */
/* Interrupt lines: one wire of a machine for each GSI. */
#include "core/core.h"

static void set_engine_line(void *opaque, uint32_t gsi, int level)
{
    struct vmm_vm *vm = opaque;
    vm->engine->ops->line(vm->engine, gsi, level != 0);
}

const vmm_line *vmm_vm_line(vmm_vm *vm, uint32_t gsi)
{
    if (gsi >= VMM_MAX_LINES)
        return NULL;
    pthread_mutex_lock(&vm->lock);
    if (!vm->lines[gsi].set)
        vm->lines[gsi] = (vmm_line){.set = set_engine_line, .opaque = vm, .n = gsi};
    pthread_mutex_unlock(&vm->lock);
    return &vm->lines[gsi];
}

void vmm_line_set(const vmm_line *line, int level)
{
    if (line && line->set)
        line->set(line->opaque, line->n, level);
}
