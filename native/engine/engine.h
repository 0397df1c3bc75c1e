/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract between a machine and the engine that executes its vCPUs.
 *
 * An engine executes guest code, keeps the processors' state and, where it is asked to, models the interrupt controllers
 * and the i8254. native/core decides when vCPUs run and what their exits mean; it names no engine but where a machine is
 * created. KVM (kvm.c) is the only engine today.
 *
 * Values are KVM's structs (<linux/kvm.h>, Documentation/virt/kvm/api.rst), whatever the engine. So is a vCPU's page:
 *   - `run` executes the guest until the next exit, and describes that exit in the page as KVM_RUN does;
 *   - a page whose immediate_exit is set turns `run` into -EINTR before any guest instruction, but after the result of
 *     the exit before (a read from a device, say) has been written into the registers;
 *   - kvm_valid_regs and kvm_dirty_regs mean what they mean to KVM where the capability KVM_CAP_SYNC_REGS says so.
 *
 * Functions return 0 (or a documented non-negative number) or -errno, and except for `run` leave what failed in
 * vmm_error_text(). Those on a machine may be called from any thread; those on a vCPU by the thread that runs it, or
 * while it does not run. `kick`, `line`, `irqfd`, `ioeventfd` and `routing` never wait for a vCPU.
 */
#ifndef VMM_ENGINE_H
#define VMM_ENGINE_H

#include "vmm/vcpu.h"

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { VMM_ENGINE_SLOTS = 32 }; /* memory slots 0 to 31 are the machine's; an engine may use others itself */

struct vmm_engine_ops;

/* One machine and one vCPU as an engine sees them: the first members of its own structs. */
struct vmm_engine {
    const struct vmm_engine_ops *ops;
};

struct vmm_engine_vcpu {
    const struct vmm_engine_ops *ops;
    struct kvm_run *run; /* the page; valid until destroy_vcpu */
};

struct vmm_engine_ops {
    /* ---- the machine ---- */

    /* `path` is the device that offers the engine ("/dev/kvm"). On success *out is to be closed. */
    int (*open)(const char *path, struct vmm_engine **out);
    /* After every vCPU was destroyed. */
    void (*close)(struct vmm_engine *engine);

    /* What the engine can do, by KVM's capability numbers: 0 when absent. Never an error. */
    int (*capability)(struct vmm_engine *engine, uint32_t capability);
    int (*enable)(struct vmm_engine *engine, const struct kvm_enable_cap *cap);

    /* Interrupt controllers and, with `pit`, an i8254 of the engine's own: once, before the first vCPU. */
    int (*create_chips)(struct vmm_engine *engine, bool pit);
    int (*get_chip)(struct vmm_engine *engine, struct kvm_irqchip *chip); /* chip_id says which */
    int (*set_chip)(struct vmm_engine *engine, const struct kvm_irqchip *chip);
    int (*get_pit)(struct vmm_engine *engine, struct kvm_pit_state2 *pit);
    int (*set_pit)(struct vmm_engine *engine, const struct kvm_pit_state2 *pit);

    int (*get_clock)(struct vmm_engine *engine, struct kvm_clock_data *clock);
    int (*set_clock)(struct vmm_engine *engine, const struct kvm_clock_data *clock);

    /* ---- memory ---- */

    int (*set_memory)(struct vmm_engine *engine, const struct kvm_userspace_memory_region *slot);
    /* Pages of a slot that the guest has written since the call before; `bitmap` has room for all of the slot. */
    int (*dirty_log)(struct vmm_engine *engine, uint32_t slot, uint64_t *bitmap);
    /* Page tables may have been written behind the engine's back: drop every translation made from them. No vCPU runs. */
    int (*forget_page_tables)(struct vmm_engine *engine);

    /* ---- interrupts and doorbells ---- */

    void (*line)(struct vmm_engine *engine, uint32_t gsi, bool level); /* without chips: nothing */
    /* Replace every route from a GSI to a chip's pin or to a message. */
    int (*routing)(struct vmm_engine *engine, const struct kvm_irq_routing *table);
    /* A write to the eventfd interrupts the guest by the route of `gsi`. Closing the eventfd undoes it. */
    int (*irqfd)(struct vmm_engine *engine, int fd, uint32_t gsi);
    int (*ioeventfd)(struct vmm_engine *engine, const struct kvm_ioeventfd *doorbell);

    /* ---- what guests may be offered ---- */

    int (*supported_cpuid)(struct vmm_engine *engine, struct kvm_cpuid2 *list); /* nent: room, then entries */
    int (*msr_indices)(struct vmm_engine *engine, struct kvm_msr_list *list);   /* nmsrs: likewise */
    int (*filter_msrs)(struct vmm_engine *engine, const struct kvm_msr_filter *filter);

    /* ---- vCPUs ---- */

    int (*create_vcpu)(struct vmm_engine *engine, uint32_t id, struct vmm_engine_vcpu **out);
    void (*destroy_vcpu)(struct vmm_engine_vcpu *vcpu);

    /* The calling thread is going to run this vCPU: what `kick` needs of it. Every signal is blocked on it. */
    void (*attach_thread)(struct vmm_engine_vcpu *vcpu);
    /* 0: the page describes an exit; -EINTR: kicked, or immediate_exit was set; else the engine failed. */
    int (*run)(struct vmm_engine_vcpu *vcpu);
    /* Have a `run` in progress on the attached thread return. The caller has set immediate_exit in the page. */
    void (*kick)(struct vmm_engine_vcpu *vcpu);

    /* One part of its state, as the struct that enum vmm_state names. */
    int (*get_state)(struct vmm_engine_vcpu *vcpu, enum vmm_state part, void *value);
    int (*set_state)(struct vmm_engine_vcpu *vcpu, enum vmm_state part, const void *value);
    /* How many MSRs were read or set: the first that is refused ends the list. */
    int (*get_msrs)(struct vmm_engine_vcpu *vcpu, struct kvm_msrs *list);
    int (*set_msrs)(struct vmm_engine_vcpu *vcpu, const struct kvm_msrs *list);
    int (*get_cpuid)(struct vmm_engine_vcpu *vcpu, struct kvm_cpuid2 *list);
    int (*set_cpuid)(struct vmm_engine_vcpu *vcpu, const struct kvm_cpuid2 *list);
    int (*translate)(struct vmm_engine_vcpu *vcpu, struct kvm_translation *translation);
    int (*guest_debug)(struct vmm_engine_vcpu *vcpu, const struct kvm_guest_debug *debug);

    /* The TSC's rate in kHz; 0: not known. Its offset from the host's; -errno where it has none that can be set. */
    uint32_t (*tsc_khz)(struct vmm_engine_vcpu *vcpu);
    int (*set_tsc_khz)(struct vmm_engine_vcpu *vcpu, uint32_t khz);
    int (*get_tsc_offset)(struct vmm_engine_vcpu *vcpu, uint64_t *offset);
    int (*set_tsc_offset)(struct vmm_engine_vcpu *vcpu, uint64_t offset);
    /* Tell the guest's watchdogs, where it uses kvmclock, that the guest was stopped (PVCLOCK_GUEST_STOPPED). */
    void (*guest_was_stopped)(struct vmm_engine_vcpu *vcpu);

    /* A file with the engine's own counters of this vCPU (KVM_GET_STATS_FD), the caller's to close. */
    int (*stats_fd)(struct vmm_engine_vcpu *vcpu);
};

static inline int vmm_engine_get(struct vmm_engine_vcpu *vcpu, enum vmm_state part, void *value)
{
    return vcpu->ops->get_state(vcpu, part, value);
}

static inline int vmm_engine_set(struct vmm_engine_vcpu *vcpu, enum vmm_state part, const void *value)
{
    return vcpu->ops->set_state(vcpu, part, value);
}

extern const struct vmm_engine_ops vmm_kvm_engine;

#endif
