/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The run loop, the exit handlers, and stop, pause and resume.
 *
 * Asking a vCPU to look up: set the request, set immediate_exit, signal its thread, in this order. The vCPU
 * clears immediate_exit and then reads the requests, so a request made at any moment is either seen by that
 * read or turns the next KVM_RUN into an immediate EINTR.
 */
#include "core/halt.h"
#include "core/thread.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_SETTLE 8 /* an access is at most two fragments; a string instruction stops at each one */

/* ---- the kick ---- */

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

void vmm_vcpu_kick(vmm_vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->vm->lock);
    kick_locked(vcpu);
    pthread_mutex_unlock(&vcpu->vm->lock);
}

/* ---- stop, pause, resume ---- */

static void stop_locked(struct vmm_vm *vm, int reason, uint64_t code, uint32_t vcpu_id)
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
    stop_locked(vm, reason, code, current && current->vm == vm ? current->id : UINT32_MAX);
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

/* ---- exits ---- */

enum verdict { REENTER, LEAVE };

static void record(struct vmm_vcpu *vcpu, const vmm_exit_record *entry)
{
    vcpu->last[vcpu->recorded++ & (VMM_LAST_EXITS - 1)] = *entry;
    if (unlikely(vcpu->recorded == vcpu->debug.stop_at))
        vmm_debug_counted(vcpu);
}

static void stop_here(struct vmm_vcpu *vcpu, int reason, uint64_t code)
{
    pthread_mutex_lock(&vcpu->vm->lock);
    stop_locked(vcpu->vm, reason, code, vcpu->id);
    pthread_mutex_unlock(&vcpu->vm->lock);
}

static enum verdict exit_pio(struct vmm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    const bool write = run->io.direction == KVM_EXIT_IO_OUT;
    const uint32_t size = run->io.size;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    vmm_exit_record entry = {.address = run->io.port,
                             .reason = KVM_EXIT_IO,
                             .size = (uint16_t)size,
                             .write = write,
                             .claimed = 1,
                             .count = run->io.count};
    for (uint32_t i = 0; i < run->io.count; i++, data += size) {
        entry.value = 0;
        memcpy(&entry.value, data, size);
        entry.claimed &= vmm_bus_access(vcpu, VMM_PIO, run->io.port, size, &entry.value, write, &entry.tag);
        if (!write)
            memcpy(data, &entry.value, size);
    }
    record(vcpu, &entry);
    vcpu->unsettled = true;
    return REENTER;
}

static enum verdict exit_mmio(struct vmm_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    const uint32_t size = run->mmio.len <= 8 ? run->mmio.len : 8;
    vmm_exit_record entry = {.address = run->mmio.phys_addr,
                             .reason = KVM_EXIT_MMIO,
                             .size = (uint16_t)size,
                             .write = run->mmio.is_write,
                             .claimed = 1,
                             .count = 1};
    memcpy(&entry.value, run->mmio.data, size);
    entry.claimed =
        vmm_bus_access(vcpu, VMM_MMIO, entry.address, size, &entry.value, entry.write, &entry.tag);
    if (!entry.write)
        memcpy(run->mmio.data, &entry.value, size);
    record(vcpu, &entry);
    vcpu->unsettled = true;
    return REENTER;
}

static enum verdict leave(struct vmm_vcpu *vcpu, int reason, uint64_t code)
{
    stop_here(vcpu, reason, code);
    return LEAVE;
}

typedef int (*remedy)(struct vmm_vcpu *);

static enum verdict remedied(struct vmm_vcpu *vcpu, remedy try, int reason, uint64_t code)
{
    vmm_exit_record entry = {.address = code, .reason = vcpu->run->exit_reason, .count = 1};
    entry.claimed = try && try(vcpu) == 1;
    record(vcpu, &entry);
    return entry.claimed ? REENTER : leave(vcpu, reason, code);
}

/* compat's breakpoints, then the debugger's, whose stops are no deed of the guest's and not recorded. */
static enum verdict exit_debug(struct vmm_vcpu *vcpu)
{
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    remedy ours = compat ? compat->debug : NULL;
    uint64_t exception = vcpu->run->debug.arch.exception;
    if (!vcpu->vm->debug.open)
        return remedied(vcpu, ours, VMM_STOP_DEBUG, exception);
    if (ours && ours(vcpu) == 1)
        vmm_debug_completed(vcpu);
    else if (!vmm_debug_exit(vcpu))
        return leave(vcpu, VMM_STOP_DEBUG, exception);
    return REENTER;
}

static enum verdict exit_internal_error(struct vmm_vcpu *vcpu)
{
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    if (vmm_debug_int3(vcpu))
        return REENTER;
    enum verdict verdict = remedied(vcpu, compat ? compat->internal_error : NULL, VMM_STOP_EMULATION,
                                    vcpu->run->internal.suberror);
    if (verdict == REENTER)
        vmm_debug_completed(vcpu);
    return verdict;
}

static enum verdict exit_msr(struct vmm_vcpu *vcpu, remedy try)
{
    const struct kvm_run *run = vcpu->run;
    vmm_exit_record entry = {.address = run->msr.index,
                             .reason = run->exit_reason,
                             .size = 8,
                             .write = run->exit_reason == KVM_EXIT_X86_WRMSR,
                             .count = 1};
    entry.claimed = try && try(vcpu) == 1;
    entry.value = run->msr.data; /* what was written, or the answer */
    record(vcpu, &entry);
    return entry.claimed ? REENTER : leave(vcpu, VMM_STOP_UNKNOWN_EXIT, run->exit_reason);
}

static enum verdict exit_other(struct vmm_vcpu *vcpu)
{
    const struct kvm_run *run = vcpu->run;
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    switch (run->exit_reason) {
    case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_INTR:
        return REENTER;
    case KVM_EXIT_HLT:
        return leave(vcpu, VMM_STOP_HALT, 0);
    case KVM_EXIT_SHUTDOWN:
        return leave(vcpu, VMM_STOP_TRIPLE_FAULT, 0);
    case KVM_EXIT_FAIL_ENTRY:
        return leave(vcpu, VMM_STOP_FAIL_ENTRY, run->fail_entry.hardware_entry_failure_reason);
    case KVM_EXIT_SYSTEM_EVENT:
        return leave(vcpu, VMM_STOP_SYSTEM_EVENT, run->system_event.type);
    case KVM_EXIT_INTERNAL_ERROR:
        return exit_internal_error(vcpu);
    case KVM_EXIT_DEBUG:
        return exit_debug(vcpu);
    case KVM_EXIT_X86_RDMSR:
        return exit_msr(vcpu, compat ? compat->rdmsr : NULL);
    case KVM_EXIT_X86_WRMSR:
        return exit_msr(vcpu, compat ? compat->wrmsr : NULL);
    default:
        return leave(vcpu, VMM_STOP_UNKNOWN_EXIT, run->exit_reason);
    }
}

static enum verdict answer_exit(struct vmm_vcpu *vcpu)
{
    uint32_t reason = vcpu->run->exit_reason;
    vcpu->exits[reason < VMM_EXIT_REASONS ? reason : VMM_EXIT_REASONS - 1]++;
    if (likely(reason == KVM_EXIT_IO))
        return exit_pio(vcpu);
    if (likely(reason == KVM_EXIT_MMIO))
        return exit_mmio(vcpu);
    return exit_other(vcpu);
}

static enum verdict answer_and_tell(struct vmm_vcpu *vcpu, struct vmm_trace *trace, uint64_t hooked)
{
    const uint32_t reason = vcpu->run->exit_reason;
    uint64_t tsc = __rdtsc(), rip = trace ? vmm_trace_rip(vcpu) : 0, recorded = vcpu->recorded;
    enum verdict verdict = answer_exit(vcpu);
    const vmm_exit_record bare = {.reason = reason, .count = 1}, *entry = NULL;
    if (vcpu->recorded != recorded)
        entry = &vcpu->last[recorded & (VMM_LAST_EXITS - 1)];
    if (trace)
        vmm_trace_exit(trace, vcpu, tsc, rip, entry);
    if (hooked >> (reason < VMM_EXIT_REASONS ? reason : VMM_EXIT_REASONS - 1) & 1)
        vcpu->vm->hook_exit(vcpu->vm->hook_opaque, vcpu->id, entry ? entry : &bare);
    return verdict;
}

static enum verdict handle_exit(struct vmm_vcpu *vcpu)
{
    struct vmm_trace *trace = vmm_trace_on(&vcpu->trace);
    const uint64_t hooked = atomic_load(&vcpu->vm->hooked_exits);
    return unlikely(trace || hooked) ? answer_and_tell(vcpu, trace, hooked) : answer_exit(vcpu);
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
        if (vcpu->engine->ops->run(vcpu->engine) == 0 && handle_exit(vcpu) == LEAVE)
            return;
    }
}

/* Park while paused. Answers whether to go on. */
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
            stop_locked(vm, VMM_STOP_HALT, 0, 0);
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
        const int rc = engine->ops->run(engine);
        if (likely(rc == 0)) {
            if (handle_exit(vcpu) == LEAVE)
                break;
        } else if (rc == -EINTR || rc == -EAGAIN) {
            vcpu->unsettled = false;
            __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        } else {
            stop_here(vcpu, VMM_STOP_RUN_FAILED, (uint64_t)-rc);
            break;
        }
    }
    return leave_loop(vcpu);
}

/* ---- what happened ---- */

uint32_t vmm_vcpu_last_exits(vmm_vcpu *vcpu, vmm_exit_record *records, uint32_t max)
{
    uint64_t end = vcpu->recorded, n = end < VMM_LAST_EXITS ? end : VMM_LAST_EXITS;
    if (n > max)
        n = max;
    for (uint64_t i = 0; i < n; i++)
        records[i] = vcpu->last[(end - n + i) & (VMM_LAST_EXITS - 1)];
    return (uint32_t)n;
}

uint64_t vmm_vcpu_recorded(vmm_vcpu *vcpu)
{
    return vcpu->recorded;
}

uint64_t vmm_vcpu_exit_count(vmm_vcpu *vcpu, uint32_t reason)
{
    return reason < VMM_EXIT_REASONS ? vcpu->exits[reason] : 0;
}

uint32_t vmm_vcpu_failed_instruction(vmm_vcpu *vcpu, uint8_t bytes[16])
{
    const struct kvm_run *run = vcpu->run;
    memset(bytes, 0, 16);
    if (run->exit_reason != KVM_EXIT_INTERNAL_ERROR ||
        run->internal.suberror != KVM_INTERNAL_ERROR_EMULATION || run->emulation_failure.ndata < 1 ||
        !(run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
        return 0;
    uint32_t n = run->emulation_failure.insn_size;
    if (n > 15)
        n = 15;
    memcpy(bytes, run->emulation_failure.insn_bytes, n);
    return n;
}

uint32_t vmm_vcpu_internal_error(vmm_vcpu *vcpu, uint64_t data[16])
{
    const struct kvm_run *run = vcpu->run;
    enum { MAX = sizeof(run->internal.data) / sizeof(run->internal.data[0]) };
    memset(data, 0, MAX * sizeof(*data));
    if (run->exit_reason != KVM_EXIT_INTERNAL_ERROR || run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION)
        return 0;
    const uint32_t n = run->internal.ndata < MAX ? run->internal.ndata : MAX;
    memcpy(data, run->internal.data, n * sizeof(*data));
    return n;
}
