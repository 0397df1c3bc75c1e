/* SPDX-License-Identifier: Apache-2.0 */
/* The life of a machine: what it is made of, in the order in which it begins and ends. */
#include "base/thread.h"
#include "core/halt.h"
#include "core/loop.h"
#include "time/lazy.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

_Static_assert(VMM_LAST_EXITS == 64 && (VMM_LAST_EXITS & (VMM_LAST_EXITS - 1)) == 0, "vmmcore.h promises 64");

static int prepare(struct vmm_vm *vm, const char *path)
{
    const int rc = vmm_kvm_engine.open(path, &vm->engine);
    if (rc < 0)
        return rc;
    const int all = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    vm->sync_regs = (vmm_vm_check_extension(vm, KVM_CAP_SYNC_REGS) & all) == all;
    vm->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (vm->stop_fd < 0)
        return vmm_error_errno("eventfd");
    vm->lines = calloc(VMM_MAX_LINES, sizeof(*vm->lines));
    return vm->lines ? 0 : vmm_error_set(-ENOMEM, "no memory for interrupt lines");
}

int vmm_vm_create(const char *kvm_path, uint32_t flags, vmm_vm **out)
{
    *out = NULL;
    struct vmm_vm *vm = calloc(1, sizeof(*vm));
    if (!vm)
        return vmm_error_set(-ENOMEM, "no memory for a machine");
    vm->stop_fd = -1;
    vm->flags = flags;
    vm->stop_vcpu = UINT32_MAX;
    pthread_mutex_init(&vm->lock, NULL);
    vmm_cond_init(&vm->changed);
    pthread_mutex_init(&vm->io_trace_lock, NULL);
    pthread_mutex_init(&vm->dirty_lock, NULL);
    vmm_bus_init(&vm->bus);
    int rc = prepare(vm, kvm_path);
    if (rc < 0) {
        vmm_vm_destroy(vm);
        return rc;
    }
    *out = vm;
    return 0;
}

void vmm_vm_destroy(vmm_vm *vm)
{
    if (!vm)
        return;
    vmm_lazy_destroy(vm->lazy); /* first: the I/O thread may be waiting for a page */
    vmm_loop_destroy(vm->loop);
    vmm_halt_destroy(vm->halt);
    vmm_trace_destroy(vm);
    vmm_debug_deinit(vm);
    pthread_mutex_destroy(&vm->io_trace_lock);
    pthread_mutex_destroy(&vm->dirty_lock);
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        if (vm->compat)
            vm->compat->vcpu_fini(vm->vcpus[i]);
        vmm_vcpu_destroy(vm->vcpus[i]);
    }
    if (vm->compat)
        vm->compat->vm_fini(vm);
    if (vm->engine)
        vm->engine->ops->close(vm->engine);
    vmm_memory_deinit(vm);
    if (vm->stop_fd >= 0)
        close(vm->stop_fd);
    vmm_bus_deinit(&vm->bus);
    pthread_cond_destroy(&vm->changed);
    pthread_mutex_destroy(&vm->lock);
    free(vm->touched);
    free(vm->msrs);
    free(vm->lines);
    free(vm);
}
