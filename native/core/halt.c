/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A machine that nothing can wake: every vCPU is halted with interrupts off, or waits for a SIPI that no vCPU is left to
 * send. The in-kernel local APIC keeps HLT in KVM, so that KVM_RUN says nothing of it.
 *
 * The I/O thread looks once the guest has been quiet for a while: no exits, and next to no CPU time on any vCPU's
 * thread, both of which are read without disturbing it. Only then are the vCPUs parked, once, and asked. A guest that
 * is idle costs one such look, then none: the timer is off until the next exit, or event of the I/O thread. A guest
 * that computes without exits is looked at again at the longest interval.
 *
 * It must never end a machine that could go on: what is not known to be dead is taken to be alive. A halted vCPU with
 * IF=0 wakes by an NMI, an SMI or INIT. These come from other vCPUs, which are halted too; from the local APIC (its
 * performance counter, and LINT0, on which KVM delivers the PIT's tick); from a pin of the I/O APIC or a message
 * programmed so. LINT1 is connected to nothing. (Intel SDM 3A, 11.5.1; 3A, 9.4.4.)
 */
#include "core/halt.h"
#include "core/stop.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define PERIOD_MS 1000u   /* quiet for so long, at first */
#define LONGEST_MS 16000u /* and for so long later on */
#define WAITS 4           /* for a guest that wakes now and then, without an exit, to stop doing so */
#define PARKING_MS 1000u  /* a vCPU that does not park within this is not halted, but waits for the host */
#define QUIET 500 /* of the time, the part that the vCPUs may run and still be quiet: what a kick costs */
#define BUSY 8    /* and from which they are at work */

#define RFLAGS_IF (1u << 9)
#define CR4_VMXE (1u << 13)
#define EFER_SVME (1u << 12)
#define LVT_PERFORMANCE 0x340
#define LVT_LINT0 0x350
#define MASKED (1u << 16)
enum { DELIVER_FIXED = 0, DELIVER_LOWEST = 1, DELIVER_EXTERNAL = 7 };

struct vmm_halt {
    struct vmm_vm *vm;
    struct vmm_source source; /* a timer */
    /* Under vm->lock. */
    unsigned period_ms, waits_left;
    uint64_t exits, cpu_ns; /* as they were when the timer was set */
    uint64_t looks;         /* that came to a verdict */
};

/* ---- how much the guest does ---- */

static void measure(const struct vmm_vm *vm, uint64_t *exits, uint64_t *cpu_ns)
{
    *exits = *cpu_ns = 0;
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        const struct vmm_vcpu *vcpu = vm->vcpus[i];
        struct timespec spent = {0};
        if (vcpu->state != VMM_VCPU_OUT)
            clock_gettime(vcpu->clock, &spent);
        *cpu_ns += (uint64_t)spent.tv_sec * 1000000000u + (uint64_t)spent.tv_nsec;
        for (unsigned reason = 0; reason < VMM_EXIT_REASONS; reason++)
            *exits += __atomic_load_n(&vcpu->exits[reason], __ATOMIC_RELAXED);
    }
}

static void set_timer(struct vmm_halt *halt, unsigned ms)
{
    const struct itimerspec at = {.it_value = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000}};
    timerfd_settime(halt->source.fd, 0, &at, NULL);
}

static void watch(struct vmm_halt *halt, unsigned period_ms)
{
    halt->period_ms = period_ms < LONGEST_MS ? period_ms : LONGEST_MS;
    measure(halt->vm, &halt->exits, &halt->cpu_ns);
    set_timer(halt, halt->period_ms);
}

static void begin(struct vmm_halt *halt)
{
    halt->waits_left = WAITS;
    watch(halt, PERIOD_MS);
}

static void sleep_until_active(struct vmm_halt *halt)
{
    set_timer(halt, 0);
    atomic_fetch_or(&halt->vm->requests, VMM_REQUEST_WATCH);
}

void vmm_halt_active_locked(struct vmm_vm *vm)
{
    if (!(atomic_load(&vm->requests) & VMM_REQUEST_WATCH))
        return;
    atomic_fetch_and(&vm->requests, ~(uint32_t)VMM_REQUEST_WATCH);
    begin(vm->halt);
}

/* A doorbell that the I/O thread has served is no exit, but activity too. */
static void active(struct vmm_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vmm_halt_active_locked(vm);
    pthread_mutex_unlock(&vm->lock);
}

/* ---- can it wake? ---- */

static bool wakes(uint32_t mode)
{
    return mode != DELIVER_FIXED && mode != DELIVER_LOWEST && mode != DELIVER_EXTERNAL;
}

static bool entry_wakes(const struct kvm_lapic_state *apic, unsigned at)
{
    uint32_t entry;
    memcpy(&entry, apic->regs + at, sizeof(entry));
    return !(entry & MASKED) && wakes(entry >> 8 & 7);
}

static bool pins_wake(const struct vmm_vm *vm)
{
    struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_IOAPIC};
    if (vm->engine->ops->get_chip(vm->engine, &chip) < 0)
        return true;
    for (unsigned pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++) {
        const uint64_t entry = chip.chip.ioapic.redirtbl[pin].bits;
        if (!(entry & MASKED) && wakes(entry >> 8 & 7))
            return true;
    }
    return false;
}

static bool has_events(const struct kvm_vcpu_events *e)
{
    return e->exception.injected || e->exception.pending || e->interrupt.injected || e->nmi.injected ||
           e->nmi.pending || e->smi.pending || e->smi.latched_init;
}

/* In this order: of several vCPUs the last counts. */
enum verdict { DEAD, IDLE, AT_WORK };

static bool may_be_interrupted(struct vmm_vcpu *vcpu)
{
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_lapic_state apic;
    return vmm_engine_get(vcpu->engine, VMM_STATE_REGS, &regs) < 0 || regs.rflags & RFLAGS_IF ||
           vmm_engine_get(vcpu->engine, VMM_STATE_SREGS, &sregs) < 0 || sregs.cr4 & CR4_VMXE ||
           sregs.efer & EFER_SVME || /* a guest of the guest may be halted */
           vmm_engine_get(vcpu->engine, VMM_STATE_LAPIC, &apic) < 0 || entry_wakes(&apic, LVT_PERFORMANCE) ||
           entry_wakes(&apic, LVT_LINT0);
}

/* Of one that is parked. */
static enum verdict verdict_of(struct vmm_vcpu *vcpu)
{
    struct kvm_mp_state state;
    struct kvm_vcpu_events events;
    if (vmm_vcpu_flush_registers(vcpu) < 0 || vmm_engine_get(vcpu->engine, VMM_STATE_EVENTS, &events) < 0 ||
        has_events(&events) || vmm_engine_get(vcpu->engine, VMM_STATE_MP, &state) < 0)
        return AT_WORK;
    if (state.mp_state == KVM_MP_STATE_UNINITIALIZED || state.mp_state == KVM_MP_STATE_INIT_RECEIVED)
        return DEAD; /* until a SIPI */
    if (state.mp_state != KVM_MP_STATE_HALTED)
        return AT_WORK;
    return may_be_interrupted(vcpu) ? IDLE : DEAD;
}

static enum verdict verdict_of_all(struct vmm_vm *vm)
{
    enum verdict all = atomic_load(&vm->wakes_by_message) || pins_wake(vm) ? IDLE : DEAD;
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        const enum verdict one = verdict_of(vm->vcpus[i]);
        all = one > all ? one : all;
    }
    return all;
}

static bool all_parked(const struct vmm_vm *vm)
{
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        if (vm->vcpus[i]->state != VMM_VCPU_PARKED)
            return false;
    return true;
}

bool vmm_halt_judge_locked(struct vmm_vm *vm)
{
    struct vmm_halt *halt = vm->halt;
    if (!vm->looking || !all_parked(vm))
        return false;
    vmm_halt_give_up_locked(vm);
    if (vm->pauses || vm->debug.open) { /* its holder may change anything of it */
        sleep_until_active(halt);
        return false;
    }
    halt->looks++;
    const enum verdict verdict = verdict_of_all(vm);
    if (verdict == IDLE)
        sleep_until_active(halt);
    else if (verdict == AT_WORK) /* it had no CPU, or its page none */
        watch(halt, LONGEST_MS);
    return verdict == DEAD;
}

void vmm_halt_give_up_locked(struct vmm_vm *vm)
{
    vm->looking = false;
    atomic_fetch_and(&vm->requests, ~(uint32_t)VMM_REQUEST_LOOK);
    pthread_cond_broadcast(&vm->changed);
}

/* ---- the timer, on the I/O thread ---- */

static void look(struct vmm_halt *halt)
{
    halt->vm->looking = true;
    atomic_fetch_or(&halt->vm->requests, VMM_REQUEST_LOOK);
    vmm_vm_kick_locked(halt->vm);
    set_timer(halt, PARKING_MS);
}

/* A device that takes its time, or a vCPU that is not inside: no exit is counted, and none of it is a halt. */
static bool any_at_work(const struct vmm_vm *vm)
{
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        if (vm->vcpus[i]->state != VMM_VCPU_RUNNING || atomic_load(&vm->vcpus[i]->epoch))
            return true;
    return false;
}

/* It wakes now and then: perhaps for the last time. */
static void wait_on(struct vmm_halt *halt)
{
    halt->waits_left--;
    watch(halt, halt->period_ms * 2);
}

static void decide(struct vmm_halt *halt)
{
    struct vmm_vm *vm = halt->vm;
    uint64_t exits, cpu_ns;
    measure(vm, &exits, &cpu_ns);
    const uint64_t spent = cpu_ns - halt->cpu_ns, passed = halt->period_ms * 1000000ull;
    if (vm->debug.open)
        sleep_until_active(halt);
    else if (exits != halt->exits || any_at_work(vm))
        begin(halt);
    else if (spent > passed / BUSY)
        watch(halt, halt->period_ms * 2);
    else if (halt->waits_left > 0 && spent > passed / QUIET)
        wait_on(halt);
    else
        look(halt);
}

static void timer_ready(struct vmm_source *source, uint32_t events)
{
    (void)events;
    struct vmm_halt *halt = source->opaque;
    uint64_t count;
    if (read(source->fd, &count, sizeof(count)) != sizeof(count))
        return; /* it was set anew meanwhile */
    struct vmm_vm *vm = halt->vm;
    pthread_mutex_lock(&vm->lock);
    if (vm->stop_reason != VMM_STOP_NONE) {
        /* until the next start */
    } else if (vm->looking) { /* some vCPU waits for the host: alive */
        vmm_halt_give_up_locked(vm);
        watch(halt, halt->period_ms * 2);
    } else {
        decide(halt);
    }
    pthread_mutex_unlock(&vm->lock);
}

/* ---- life ---- */

static struct vmm_halt *halt_create(struct vmm_vm *vm)
{
    vmm_loop *loop = vmm_vm_loop(vm);
    struct vmm_halt *halt = loop ? calloc(1, sizeof(*halt)) : NULL;
    if (!halt)
        return NULL;
    halt->vm = vm;
    halt->source = (struct vmm_source){.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK),
                                       .ready = timer_ready,
                                       .opaque = halt};
    vmm_loop_on_activity(loop, active);
    if (halt->source.fd < 0)
        vmm_error_errno("timerfd_create");
    else if (vmm_loop_add(loop, &halt->source, EPOLLIN) == 0)
        return halt;
    vmm_halt_destroy(halt);
    return NULL;
}

int vmm_vm_watch_halt(vmm_vm *vm)
{
    struct vmm_halt *halt = vm->halt ? vm->halt : halt_create(vm);
    if (!halt)
        return -ENOMEM;
    pthread_mutex_lock(&vm->lock);
    vm->halt = halt;
    vm->looking = false;
    atomic_fetch_and(&vm->requests, ~(uint32_t)(VMM_REQUEST_LOOK | VMM_REQUEST_WATCH));
    begin(halt);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

uint64_t vmm_vm_halt_looks(vmm_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    const uint64_t looks = vm->halt ? vm->halt->looks : 0;
    pthread_mutex_unlock(&vm->lock);
    return looks;
}

void vmm_halt_destroy(struct vmm_halt *halt)
{
    if (halt && halt->source.fd >= 0)
        close(halt->source.fd);
    free(halt);
}
