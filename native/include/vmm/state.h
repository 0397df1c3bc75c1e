/* SPDX-License-Identifier: Apache-2.0 */
/* The state of all of a machine's processors and chips, as a value. */
#ifndef VMM_API_STATE_H
#define VMM_API_STATE_H

#include "vmm/vcpu.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/* Layouts of these are KVM's, too, where they have a counterpart. */
typedef struct vmm_events { /* struct kvm_vcpu_events */
    uint8_t exception_injected, exception_nr, exception_has_error_code, exception_pending;
    uint32_t exception_error_code;
    uint8_t interrupt_injected, interrupt_nr, interrupt_soft, interrupt_shadow;
    uint8_t nmi_injected, nmi_pending, nmi_masked, padding;
    uint32_t sipi_vector, flags;
    uint8_t smi_smm, smi_pending, smi_smm_inside_nmi, smi_latched_init;
    uint8_t triple_fault_pending, reserved[26];
    uint8_t exception_has_payload;
    uint64_t exception_payload;
} vmm_events;

typedef struct vmm_debug_registers { /* struct kvm_debugregs */
    uint64_t db[4], dr6, dr7, flags, reserved[9];
} vmm_debug_registers;

enum { VMM_STATE_MSRS_MAX = 512, VMM_UNLISTED_MSRS = 161 };
typedef struct vmm_msr {
    uint32_t index;
    uint64_t value;
} vmm_msr;

typedef struct vmm_vcpu_state {
    vmm_regs regs;
    vmm_sregs sregs;
    vmm_events events;
    vmm_debug_registers debug;
    uint32_t mp_state; /* KVM_MP_STATE_... */
    uint32_t tsc_khz;
    uint64_t tsc; /* as if every vCPU's had been read at one moment */
    uint64_t tsc_deadline;
    uint64_t xcr0;
    uint8_t lapic[1024]; /* the register page (SDM vol. 3, table 10-1) */
    uint8_t xsave[4096]; /* standard format (SDM vol. 1, 13.4) */
    uint32_t n_msrs;
    vmm_msr msrs[VMM_STATE_MSRS_MAX];
} vmm_vcpu_state;

typedef struct vmm_pic { /* struct kvm_pic_state */
    uint8_t last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state,
        auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask;
} vmm_pic;

typedef struct vmm_ioapic { /* struct kvm_ioapic_state */
    uint64_t base_address;
    uint32_t select, id, irr, padding;
    uint64_t redirection[24];
} vmm_ioapic;

typedef struct vmm_pit_channel { /* struct kvm_pit_channel_state */
    uint32_t count;
    uint16_t latched_count;
    uint8_t count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd,
        gate;
    int64_t count_load_time;
} vmm_pit_channel;

typedef struct vmm_pit { /* struct kvm_pit_state2 */
    vmm_pit_channel channels[3];
    uint32_t flags, reserved[9];
} vmm_pit;

typedef struct vmm_chips_state {
    uint8_t has_irqchip, has_pit;
    vmm_pic pic[2];
    vmm_ioapic ioapic;
    vmm_pit pit;
    uint64_t clock;    /* kvmclock, ns */
    uint64_t realtime; /* the host's clock at that moment, ns since 1970 */
} vmm_chips_state;

/*
 * Everything KVM keeps of all vCPUs (in the order they were created; `vcpus` has room for them) and of its chips.
 * The machine is paused or does not run. Time stands still in what was saved: a guest that is loaded goes on with the
 * TSC and the kvmclock it was saved with; `ahead`: with what they would be by now, if they had gone on with the host's
 * clock (they never go back). All vCPUs' TSCs are set as of one moment, and agree as they did. load returns -EINVAL when
 * KVM refuses a part; vmm_error_text names it, and the machine is then of no use but to be loaded again.
 */
int vmm_vm_save(vmm_vm *vm, vmm_vcpu_state *vcpus, vmm_chips_state *chips);
int vmm_vm_load(vmm_vm *vm, const vmm_vcpu_state *vcpus, const vmm_chips_state *chips, int ahead);

/*
 * The MSRs that are saved, as far as a vCPU has them: KVM_GET_MSR_INDEX_LIST, and VMM_UNLISTED_MSRS that KVM leaves out
 * of it. Returns how many; one may be there twice. -E2BIG: more than max.
 */
int vmm_vm_saved_msrs(vmm_vm *vm, uint32_t *indices, uint32_t max);

/* cdef: end */

#endif
