/* SPDX-License-Identifier: Apache-2.0 */
/* Pause and resume, and making a machine that has stopped runnable again. */
#include "base/thread.h"
#include "core/debug.h"
#include "core/loop.h"
#include "core/stop.h"

#include <errno.h>
#include <unistd.h>

static bool any_in_state(const struct vmm_vm *vm, int vcpu_state)
{
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        if (vm->vcpus[i]->state == vcpu_state)
            return true;
    return false;
}

int vmm_vm_rearm(vmm_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    int rc = any_in_state(vm, VMM_VCPU_RUNNING) || any_in_state(vm, VMM_VCPU_PARKED)
                 ? vmm_error_set(-EBUSY, "a vCPU is still in its run loop")
                 : 0;
    if (rc == 0) {
        vm->stop_reason = VMM_STOP_NONE;
        vm->stop_code = 0;
        vm->stop_vcpu = UINT32_MAX;
        atomic_fetch_and(&vm->requests, ~(uint32_t)VMM_REQUEST_STOP);
        vmm_debug_rearm(vm);
        uint64_t count;
        ssize_t got = read(vm->stop_fd, &count, sizeof(count));
        (void)got; /* EAGAIN: it was not signalled */
    }
    pthread_mutex_unlock(&vm->lock);
    return rc;
}

static struct vmm_loop *vm_loop_if_any(struct vmm_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    struct vmm_loop *loop = vm->loop;
    pthread_mutex_unlock(&vm->lock);
    return loop;
}

int vmm_vm_request_pause(vmm_vm *vm)
{
    if (vmm_current_vcpu && vmm_current_vcpu->vm == vm)
        return vmm_error_set(-EDEADLK, "pause from a device's own vCPU thread");
    struct vmm_loop *loop = vm_loop_if_any(vm);
    if (loop && vmm_loop_current(loop))
        return vmm_error_set(-EDEADLK, "pause from the I/O thread");
    pthread_mutex_lock(&vm->lock);
    vm->pauses++;
    atomic_fetch_or(&vm->requests, VMM_REQUEST_PAUSE);
    vmm_vm_kick_locked(vm);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

/* After the vCPUs: what they asked of devices until now may be answered, nothing later. A vCPU may have made the loop
 * meanwhile. */
static struct vmm_loop *hold_loop_locked(struct vmm_vm *vm)
{
    if (vm->loop && !vm->loop_held)
        vmm_loop_request_pause(vm->loop);
    vm->loop_held = vm->loop;
    return vm->loop;
}

int vmm_vm_await_pause(vmm_vm *vm, int timeout_ms)
{
    const struct timespec deadline = vmm_deadline(timeout_ms), *until = timeout_ms < 0 ? NULL : &deadline;
    struct vmm_loop *loop = NULL;
    int late = 0;
    pthread_mutex_lock(&vm->lock);
    const bool asked = vm->pauses;
    while (asked && any_in_state(vm, VMM_VCPU_RUNNING) && !late)
        late = vmm_cond_wait_until(&vm->changed, &vm->lock, until);
    const bool stand = !any_in_state(vm, VMM_VCPU_RUNNING);
    if (asked && stand)
        loop = hold_loop_locked(vm);
    pthread_mutex_unlock(&vm->lock);
    if (!asked)
        return vmm_error_set(-EBUSY, "waiting for a pause that was not requested");
    return stand && (!loop || vmm_loop_await_pause(loop, until));
}

int vmm_vm_pause(vmm_vm *vm)
{
    const int rc = vmm_vm_request_pause(vm), all = rc < 0 ? rc : vmm_vm_await_pause(vm, -1);
    return all < 0 ? all : 0;
}

int vmm_vm_resume(vmm_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    int rc = vm->pauses ? 0 : vmm_error_set(-EBUSY, "resume without a pause: the machine is not paused");
    if (rc == 0 && --vm->pauses == 0) {
        if (vm->loop_held)
            vmm_loop_resume(vm->loop);
        vm->loop_held = false;
        atomic_fetch_and(&vm->requests, ~(uint32_t)VMM_REQUEST_PAUSE);
        pthread_cond_broadcast(&vm->changed);
    }
    pthread_mutex_unlock(&vm->lock);
    return rc;
}
