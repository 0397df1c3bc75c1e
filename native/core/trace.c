/* SPDX-License-Identifier: Apache-2.0 */
/* The exit trace: rings, their readers, and switching them. */
#include "core/core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define CAPACITY_MIN 64
#define CAPACITY_MAX (1u << 24) /* a gigabyte a thread */

_Static_assert(sizeof(vmm_trace_event) == 64, "an event is a cache line");

/* ---- rings ---- */

static size_t ring_bytes(uint32_t capacity)
{
    return sizeof(struct vmm_trace) + (size_t)capacity * sizeof(vmm_trace_event);
}

/* Mapped, not allocated: pages that no event reached cost nothing. */
static int ring_init(struct vmm_trace_point *point, uint32_t capacity)
{
    if (point->ring)
        return 0;
    struct vmm_trace *ring = mmap(NULL, ring_bytes(capacity), PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ring == MAP_FAILED)
        return vmm_error_errno("mapping a trace ring");
    ring->capacity = capacity;
    point->ring = ring;
    return 0;
}

static void ring_deinit(struct vmm_trace_point *point)
{
    atomic_store(&point->on, NULL);
    if (point->ring)
        munmap(point->ring, ring_bytes(point->ring->capacity));
    point->ring = NULL;
}

/* ---- switching ---- */

/* KVM copies the registers into the run area with every exit while this bit is set. */
static void sync_registers(struct vmm_vcpu *vcpu, bool on)
{
    if (vcpu->vm->sync_regs)
        __atomic_store_n(&vcpu->run->kvm_valid_regs, on ? KVM_SYNC_X86_REGS : 0, __ATOMIC_RELAXED);
}

static int start_vcpu(struct vmm_vcpu *vcpu)
{
    int rc = ring_init(&vcpu->trace, vcpu->vm->trace_capacity);
    if (rc == 0) {
        sync_registers(vcpu, true);
        atomic_store_explicit(&vcpu->trace.on, vcpu->trace.ring, memory_order_release);
    }
    return rc;
}

int vmm_trace_vcpu_init(struct vmm_vcpu *vcpu)
{
    return vmm_trace_on(&vcpu->vm->io_trace) ? start_vcpu(vcpu) : 0;
}

static int start_locked(struct vmm_vm *vm, uint32_t capacity)
{
    if (!vm->trace_capacity)
        vm->trace_capacity = capacity;
    int rc = ring_init(&vm->io_trace, vm->trace_capacity);
    for (uint32_t i = 0; rc == 0 && i < vm->n_vcpus; i++)
        rc = start_vcpu(vm->vcpus[i]);
    if (rc == 0)
        atomic_store_explicit(&vm->io_trace.on, vm->io_trace.ring, memory_order_release);
    return rc;
}

int vmm_trace_start(vmm_vm *vm, uint32_t capacity)
{
    if (capacity < CAPACITY_MIN || capacity > CAPACITY_MAX || (capacity & (capacity - 1)))
        return vmm_error_set(-EINVAL, "a trace ring has a power of two of events, 64 to 2^24: not %u",
                             capacity);
    pthread_mutex_lock(&vm->lock);
    int rc = start_locked(vm, capacity);
    pthread_mutex_unlock(&vm->lock);
    if (rc < 0)
        vmm_trace_stop(vm);
    return rc;
}

void vmm_trace_stop(vmm_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    atomic_store(&vm->io_trace.on, NULL);
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        atomic_store(&vm->vcpus[i]->trace.on, NULL);
        sync_registers(vm->vcpus[i], false);
    }
    pthread_mutex_unlock(&vm->lock);
}

void vmm_trace_destroy(struct vmm_vm *vm)
{
    ring_deinit(&vm->io_trace);
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        ring_deinit(&vm->vcpus[i]->trace);
}

/* ---- writing ---- */

uint64_t vmm_trace_rip(struct vmm_vcpu *vcpu)
{
    if (!vcpu->vm->sync_regs)
        return 0;
    if (vcpu->run->kvm_valid_regs & KVM_SYNC_X86_REGS)
        return vcpu->run->s.regs.regs.rip;
    sync_registers(vcpu, true); /* compat had them off at the moment of the start */
    return 0;
}

void vmm_trace_exit(struct vmm_trace *trace, struct vmm_vcpu *vcpu, uint64_t tsc, uint64_t rip,
                    const vmm_exit_record *record)
{
    vmm_trace_event event = {
        .tsc = tsc,
        .rip = rip,
        .duration = vmm_trace_ticks(tsc),
        .kind = (uint16_t)vcpu->run->exit_reason,
        .vcpu = (uint16_t)vcpu->id,
        .count = 1,
    };
    if (record) {
        event.address = record->address;
        event.value = record->value;
        event.tag = record->tag;
        event.count = record->count;
        event.size = record->size;
        event.write = record->write;
        event.claimed = record->claimed;
    }
    vmm_trace_put(trace, &event);
}

void vmm_trace_io(struct vmm_vm *vm, uint16_t kind, uint32_t tag, uint64_t address, uint64_t value,
                  uint64_t since)
{
    struct vmm_trace *trace = vmm_trace_on(&vm->io_trace);
    if (!trace)
        return;
    uint64_t now = __rdtsc();
    vmm_trace_event event = {
        .tsc = since ? since : now,
        .duration = since ? vmm_trace_ticks(since) : 0,
        .kind = kind,
        .tag = tag,
        .address = address,
        .value = value,
        .vcpu = UINT16_MAX,
        .count = 1,
        .claimed = 1,
    };
    /* Interrupts come from vCPU threads too: this ring has several writers, and few events. */
    pthread_mutex_lock(&vm->io_trace_lock);
    vmm_trace_put(trace, &event);
    pthread_mutex_unlock(&vm->io_trace_lock);
}

/* ---- reading ---- */

static struct vmm_trace *find(vmm_vm *vm, uint32_t number)
{
    struct vmm_trace *ring = NULL;
    pthread_mutex_lock(&vm->lock);
    if (number == UINT32_MAX)
        ring = vm->io_trace.ring;
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        if (vm->vcpus[i]->id == number)
            ring = vm->vcpus[i]->trace.ring;
    pthread_mutex_unlock(&vm->lock);
    return ring;
}

/* The oldest event that the writer, which has begun `begun`, is not overwriting. */
static uint64_t oldest(const struct vmm_trace *ring, uint64_t begun)
{
    return begun > ring->capacity ? begun - ring->capacity : 0;
}

uint32_t vmm_trace_read(vmm_vm *vm, uint32_t vcpu, uint64_t *position, vmm_trace_event *events, uint32_t max,
                        uint64_t *lost)
{
    struct vmm_trace *ring = find(vm, vcpu);
    if (!ring)
        return 0;
    uint64_t end = atomic_load_explicit(&ring->done, memory_order_acquire), from = *position;
    uint64_t first = oldest(ring, end);
    if (from < first || from > end)
        from = first;
    uint32_t n = end - from < max ? (uint32_t)(end - from) : max;
    for (uint32_t i = 0; i < n; i++)
        events[i] = ring->events[(from + i) & (ring->capacity - 1)];
    atomic_thread_fence(
        memory_order_acquire); /* pairs with the one in vmm_trace_put: what it took, we now see */
    first = oldest(ring, atomic_load_explicit(&ring->begun, memory_order_relaxed));
    uint32_t torn = first > from ? (first - from < n ? (uint32_t)(first - from) : n) : 0;
    memmove(events, events + torn, (n - torn) * sizeof(*events));
    *lost += from + torn - *position;
    *position = from + n;
    return n - torn;
}

void vmm_trace_clock(uint64_t *tsc, uint64_t *ns)
{
    struct timespec now;
    uint64_t before = __rdtsc();
    clock_gettime(CLOCK_MONOTONIC, &now);
    *tsc = before + (__rdtsc() - before) / 2;
    *ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
