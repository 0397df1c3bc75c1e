/* SPDX-License-Identifier: Apache-2.0 */
/* The loop of a vCPU: run the guest, handle the exit, and park when asked to. */
#include "core/exits.h"
#include "core/halt.h"
#include "core/stop.h"

#include <errno.h>
#include <signal.h>

#define MAX_SETTLE 8 /* an access is at most two fragments; a string instruction stops at each one */

/* Only what a bug of ours raises may interrupt a vCPU thread, and the engine's kick, which it unblocks itself; the rest
 * is for the caller's threads. */
static void block_signals(void)
{
    sigset_t blocked;
    sigfillset(&blocked);
    const int open[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    for (size_t i = 0; i < sizeof(open) / sizeof(open[0]); i++)
        sigdelset(&blocked, open[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
}

/*
 * KVM writes the result of an I/O exit into the registers on the next KVM_RUN. Enter with immediate_exit set:
 * that happens, the guest does not run, and what others see of this vCPU is whole.
 */
static void settle(struct vmm_vcpu *vcpu)
{
    for (int i = 0; vcpu->unsettled && i < MAX_SETTLE; i++) {
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        vcpu->unsettled = false;
        if (vcpu->engine->ops->run(vcpu->engine) == 0 && vmm_vcpu_handle_exit(vcpu) == VMM_LEAVE)
            return;
    }
}

/* Serve the requests: park while paused. Returns whether to run on. */
static bool attend(struct vmm_vcpu *vcpu)
{
    struct vmm_vm *vm = vcpu->vm;
    settle(vcpu);
    pthread_mutex_lock(&vm->lock);
    vmm_halt_active_locked(vm);
    while ((vm->pauses || vm->looking || vmm_debug_parked(vcpu)) && vm->stop_reason == VMM_STOP_NONE) {
        vcpu->state = VMM_VCPU_PARKED;
        pthread_cond_broadcast(&vm->changed);
        if (vmm_halt_judge_locked(vm))
            vmm_stop_locked(vm, VMM_STOP_HALT, 0, 0);
        else if (vm->pauses || vm->looking || vmm_debug_parked(vcpu))
            pthread_cond_wait(&vm->changed, &vm->lock);
    }
    vcpu->state = VMM_VCPU_RUNNING;
    bool go_on = vm->stop_reason == VMM_STOP_NONE;
    /* Under the lock kicks are made under: one that comes after this stays set. */
    __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&vm->lock);
    return go_on;
}

static void enter_loop(struct vmm_vcpu *vcpu)
{
    block_signals();
    vmm_current_vcpu = vcpu;
    pthread_mutex_lock(&vcpu->vm->lock);
    vcpu->engine->ops->attach_thread(vcpu->engine);
    pthread_getcpuclockid(pthread_self(), &vcpu->clock);
    vcpu->state = VMM_VCPU_RUNNING;
    vcpu->vm->ran = true;
    pthread_mutex_unlock(&vcpu->vm->lock);
}

static int leave_loop(struct vmm_vcpu *vcpu)
{
    struct vmm_vm *vm = vcpu->vm;
    settle(vcpu);
    vmm_current_vcpu = NULL;
    pthread_mutex_lock(&vm->lock);
    vcpu->state = VMM_VCPU_OUT;
    int reason = vm->stop_reason;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    return reason;
}

int vmm_vcpu_run(vmm_vcpu *vcpu)
{
    struct vmm_engine_vcpu *engine = vcpu->engine;
    enter_loop(vcpu);
    for (;;) {
        if (unlikely(atomic_load(&vcpu->vm->requests)) && !attend(vcpu))
            break;
        if (unlikely(vcpu->look))
            vcpu->vm->compat->look(vcpu);
        const int rc = engine->ops->run(engine);
        if (likely(rc == 0)) {
            if (vmm_vcpu_handle_exit(vcpu) == VMM_LEAVE)
                break;
        } else if (rc == -EINTR || rc == -EAGAIN) {
            vcpu->unsettled = false;
            __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        } else {
            vmm_vcpu_stop(vcpu, VMM_STOP_RUN_FAILED, (uint64_t)-rc);
            break;
        }
    }
    return leave_loop(vcpu);
}
