/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kick, and the end of a run.
 *
 * To have a vCPU look at its requests: set the request, set immediate_exit, kick its thread, in this order. The vCPU
 * clears immediate_exit and then reads the requests, so a request made at any moment is either seen by that read or
 * turns the next run into an immediate -EINTR.
 */
#include "core/stop.h"

#include <unistd.h>

static void kick_locked(struct vmm_vcpu *vcpu)
{
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (vcpu->state == VMM_VCPU_RUNNING)
        vcpu->engine->ops->kick(vcpu->engine);
}

void vmm_vm_kick_locked(struct vmm_vm *vm)
{
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        kick_locked(vm->vcpus[i]);
}

void vmm_stop_locked(struct vmm_vm *vm, int reason, uint64_t code, uint32_t vcpu_id)
{
    if (vm->stop_reason != VMM_STOP_NONE)
        return;
    vm->stop_reason = reason;
    vm->stop_code = code;
    vm->stop_vcpu = vcpu_id;
    vm->looking = false;
    atomic_fetch_and(&vm->requests, ~(uint32_t)VMM_REQUEST_LOOK);
    atomic_fetch_or(&vm->requests, VMM_REQUEST_STOP);
    vmm_vm_kick_locked(vm);
    pthread_cond_broadcast(&vm->changed);
    ssize_t written = write(vm->stop_fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)written; /* only a full counter could refuse, and then it is readable already */
}

void vmm_vm_stop(vmm_vm *vm, int reason, uint64_t code)
{
    const struct vmm_vcpu *current = vmm_current_vcpu;
    pthread_mutex_lock(&vm->lock);
    vmm_stop_locked(vm, reason, code, current && current->vm == vm ? current->id : UINT32_MAX);
    pthread_mutex_unlock(&vm->lock);
}

int vmm_vm_stop_reason(vmm_vm *vm, uint64_t *code, uint32_t *vcpu_id)
{
    pthread_mutex_lock(&vm->lock);
    int reason = vm->stop_reason;
    *code = vm->stop_code;
    *vcpu_id = vm->stop_vcpu;
    pthread_mutex_unlock(&vm->lock);
    return reason;
}

int vmm_vm_stop_fd(vmm_vm *vm)
{
    return vm->stop_fd;
}

void vmm_vcpu_stop(struct vmm_vcpu *vcpu, int reason, uint64_t code)
{
    pthread_mutex_lock(&vcpu->vm->lock);
    vmm_stop_locked(vcpu->vm, reason, code, vcpu->id);
    pthread_mutex_unlock(&vcpu->vm->lock);
}
