/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library's own view of a machine. Python never sees these; native/compat may.
 *
 * Lock order: a device's own lock, vm->lock (life cycle), the loop's lock; or vm->lock, bus lock. vm->lock and
 * the bus lock are not held while a device op or KVM_RUN is in progress.
 */
#ifndef VMM_CORE_H
#define VMM_CORE_H

#include "base/error.h"
#include "core/debug.h"
#include "core/trace.h"
#include "engine/engine.h"
#include "vmmcore.h"
#include "vmmhook.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#define VMM_MAX_REGIONS VMM_ENGINE_SLOTS /* two of RAM, the rest for device memory */
#define VMM_MAX_RANGES 4096              /* a machine with every PCI function's BARs has a few hundred */
#define VMM_MAX_HOOKS 64                 /* each access is compared with each of them */
#define VMM_MAX_LINES 4096               /* KVM_MAX_IRQ_ROUTES on x86 */
#define VMM_MAX_VCPUS 1024               /* KVM_MAX_VCPUS on x86 without a raised build limit */
#define VMM_LAST_EXITS 64                /* power of two: the ring below is indexed by a wrapping counter */
#define VMM_EXIT_REASONS 64

#define VMM_CLEANUP(fn) __attribute__((cleanup(fn)))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

struct vmm_region {
    uint64_t gpa, size;
    uint8_t *host;
    int fd;          /* of a memfd of its own; of the file below, where it is private */
    uint64_t offset; /* in that */
    uint32_t flags;
};

/* ---- bus ---- */

struct vmm_range {
    uint64_t base, last; /* both inclusive: a range may end at the top of the space */
    const vmm_device_ops *ops;
    void *opaque;
    uint32_t tag;
};

/* Immutable once published; replaced as a whole, freed when no vCPU can still hold it. */
struct vmm_bus_table {
    struct vmm_bus_table *next_retired;
    uint64_t retired_at;
    uint32_t n;
    struct vmm_range ranges[];
};

struct vmm_bus {
    pthread_mutex_t lock; /* one writer; readers take none */
    _Atomic(struct vmm_bus_table *) table[2];
    _Atomic(struct vmm_bus_table *) hooks[2]; /* in the order attached, no ops; NULL: none */
    struct vmm_bus_table *retired;
    _Atomic uint64_t epoch;
};

/* ---- machine ---- */

enum vmm_request {
    VMM_REQUEST_STOP = 1,
    VMM_REQUEST_PAUSE = 2,
    VMM_REQUEST_DEBUG = 4,
    VMM_REQUEST_LOOK = 8,   /* park, to be looked at (halt.c) */
    VMM_REQUEST_WATCH = 16, /* report that the guest is active; no vCPU is kicked for it */
};

struct vmm_compat_ops {
    int (*vcpu_init)(struct vmm_vcpu *vcpu);
    int (*internal_error)(struct vmm_vcpu *vcpu); /* 1: completed, re-enter; 0: not known */
    int (*debug)(struct vmm_vcpu *vcpu);          /* 1: a breakpoint of compat's; 0: not */
    int (*shutdown)(struct vmm_vcpu *vcpu);       /* 1: it was none, re-enter; 0: a triple fault */
    int (*rdmsr)(struct vmm_vcpu *vcpu);
    int (*wrmsr)(struct vmm_vcpu *vcpu);
    /* What KVM is to hold for a guest's MSR, and back; and the guest's was set, by whomever. NULL: they are the same. */
    uint64_t (*msr_for_kvm)(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value);
    uint64_t (*msr_for_guest)(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value);
    void (*msr_written)(struct vmm_vcpu *vcpu, uint32_t index, uint64_t value);
    void (*look)(struct vmm_vcpu *vcpu); /* before the next entry, while vcpu->look */
    void (*loaded)(struct vmm_vcpu *vcpu,
                   const vmm_vcpu_state *state); /* it has this state now; may be NULL */
    void (*vcpu_fini)(struct vmm_vcpu *vcpu);
    void (*vm_fini)(struct vmm_vm *vm);
};

struct vmm_vm {
    struct vmm_engine *engine;
    uint32_t flags;
    bool has_chips;

    struct vmm_region regions[VMM_MAX_REGIONS];
    uint32_t n_regions;
    _Atomic bool tracked;    /* some dirty log is open */
    struct vmm_dirty *dirty; /* their logs, under dirty_lock */
    /* A bit a page, region after region: pages the VMM wrote but has not yet merged into the dirty logs (written.c). */
    _Atomic uint64_t *touched;
    pthread_mutex_t dirty_lock;
    uint32_t *msrs; /* what state.c saves: asked for once */
    uint32_t n_msrs;
    uint32_t host_khz;            /* of the TSC, as KVM has it; 0: it does not say */
    bool tsc_settable, tsc_fixed; /* seen: KVM takes an offset of the TSC; it leaves it as it is */
    uint64_t clock_set, tsc_set;  /* kvmclock in ns, and the first vCPU's TSC at that moment, when last set */
    struct vmm_lazy *lazy;        /* NULL: no page is still to come */
    struct vmm_line *lines;       /* VMM_MAX_LINES, filled on demand */
    struct vmm_bus bus;
    struct vmm_loop *loop; /* the I/O thread; NULL until a device needs it; written once, under lock */
    void (*say)(void *opaque, const char *text);
    void *say_opaque;

    struct vmm_trace_point io_trace; /* of the I/O thread and the devices; several writers */
    pthread_mutex_t io_trace_lock;
    uint32_t trace_capacity;
    bool sync_regs;     /* KVM can copy registers out with each exit, and in with an entry */
    bool shadow_paging; /* the engine translates by shadow page tables: copies of the guest's */
    bool ran;           /* some vCPU was in its run loop; under lock */

    const struct vmm_compat_ops *compat; /* NULL: nothing to remedy */
    void *compat_state;
    struct vmm_debug debug;

    void (*hook_access)(void *opaque, vmm_access *access);
    void (*hook_exit)(void *opaque, uint32_t vcpu, const vmm_exit_record *record);
    void *hook_opaque;
    _Atomic uint64_t hooked_exits; /* bit: exit reason */

    pthread_mutex_t lock;
    pthread_cond_t changed;        /* a vCPU parked, left, or may go on */
    _Atomic uint32_t requests;     /* enum vmm_request; written under lock, read before every entry */
    uint32_t pauses;               /* nesting depth */
    struct vmm_halt *halt;         /* NULL until it is watched; written once, under lock */
    bool looking;                  /* vCPUs park for halt.c */
    _Atomic bool wakes_by_message; /* some message was programmed to be no ordinary interrupt */
    bool loop_held;                /* the I/O thread was asked to park, too; under lock */
    int stop_reason, stop_fd;
    uint64_t stop_code;
    uint32_t stop_vcpu;

    struct vmm_vcpu *vcpus[VMM_MAX_VCPUS];
    uint32_t n_vcpus;
};

enum vmm_vcpu_place { VMM_VCPU_OUT = 0, VMM_VCPU_RUNNING = 1, VMM_VCPU_PARKED = 2 };

struct vmm_vcpu {
    struct vmm_vm *vm;
    struct vmm_engine_vcpu *engine;
    struct kvm_run *run; /* the engine's page */
    uint32_t id;
    _Atomic int state;      /* enum vmm_vcpu_place, written under vm->lock */
    clockid_t clock;        /* CPU time of the thread that runs it, while state is not OUT */
    uint32_t scaled_khz;    /* the rate its TSC is scaled to; 0: the host's */
    bool look;              /* compat wants to see the vCPU after each exit */
    bool unsettled;         /* an I/O exit's result is not yet in the registers */
    uint32_t last_range[2]; /* per space: where the last hit was */
    _Atomic uint64_t epoch; /* bus epoch this vCPU reads under; 0: not in the bus */
    void *compat;
    struct vmm_vcpu_debug debug;

    struct vmm_trace_point trace;
    uint64_t exits[VMM_EXIT_REASONS];
    _Atomic uint64_t unclaimed;
    uint64_t recorded;
    vmm_exit_record last[VMM_LAST_EXITS];
};

/* The vCPU whose run loop is on this thread, or NULL. */
extern _Thread_local struct vmm_vcpu *vmm_current_vcpu;

/* Report something a person should know, through vmm_vm_on_message. From any thread. */
void vmm_vm_say(struct vmm_vm *vm, const char *format, ...) __attribute__((format(printf, 2, 3)));

void vmm_bus_init(struct vmm_bus *bus);
void vmm_bus_deinit(struct vmm_bus *bus);

/* Access 1 to 8 bytes for a vCPU. Returns whether devices claimed all of them; *tag is the last device's.
 */
bool vmm_bus_access(struct vmm_vcpu *vcpu, int space, uint64_t address, uint32_t size, uint64_t *value,
                    bool write, uint32_t *tag);

int vmm_vm_create_chips(struct vmm_vm *vm);
void vmm_memory_deinit(struct vmm_vm *vm); /* every region; the engine has forgotten them */
int vmm_region_set_flags(struct vmm_vm *vm, uint32_t region, uint32_t flags);

/* Words of the bitmap below: of a region, and where a region's begin (of one past the last: how many there are). */
size_t vmm_region_words(const struct vmm_region *region);
size_t vmm_words_before(const struct vmm_vm *vm, uint32_t region);

/* This process has written n bytes of guest memory at `host`; to be called after the write. */
void vmm_vm_touch(struct vmm_vm *vm, const void *host, size_t n);
static inline void vmm_vm_wrote(struct vmm_vm *vm, const void *host, size_t n)
{
    if (unlikely(atomic_load_explicit(&vm->tracked, memory_order_relaxed)))
        vmm_vm_touch(vm, host, n);
}

void vmm_vcpu_destroy(struct vmm_vcpu *vcpu);

/* compat may keep a guest's MSR from KVM: what KVM is to hold for `value`, and the guest's value of what KVM holds. */
static inline uint64_t vmm_msr_for_kvm(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value)
{
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    return compat && compat->msr_for_kvm ? compat->msr_for_kvm(vcpu, index, value) : value;
}

static inline uint64_t vmm_msr_for_guest(const struct vmm_vcpu *vcpu, uint32_t index, uint64_t value)
{
    const struct vmm_compat_ops *compat = vcpu->vm->compat;
    return compat && compat->msr_for_guest ? compat->msr_for_guest(vcpu, index, value) : value;
}

/* Give the engine the registers that wait in the vCPU's page for its next run, before its state is read. Not
 * while the vCPU runs. */
int vmm_vcpu_flush_registers(struct vmm_vcpu *vcpu);

#endif
