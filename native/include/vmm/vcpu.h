/* SPDX-License-Identifier: Apache-2.0 */
/* A vCPU, its registers and its state. */
#ifndef VMM_API_VCPU_H
#define VMM_API_VCPU_H

#include "vmm/vm.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

int vmm_vcpu_create(vmm_vm *vm, uint32_t id, vmm_vcpu **out);

/* Layouts are KVM's (checked at compile time); they are for calls, never for files. */
typedef struct vmm_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
} vmm_regs;

typedef struct vmm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
} vmm_segment;

typedef struct vmm_dtable {
    uint64_t base;
    uint16_t limit;
    uint16_t padding[3];
} vmm_dtable;

typedef struct vmm_sregs {
    vmm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    vmm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    uint64_t interrupt_bitmap[4];
} vmm_sregs;

typedef struct vmm_cpuid_entry {
    uint32_t function, index, flags, eax, ebx, ecx, edx, padding[3];
} vmm_cpuid_entry;

/*
 * A vCPU's registers and state, from here to vmm_vcpu_set_state, are of one that does not run (created, paused or
 * stopped), or are asked for on its own thread: -EBUSY otherwise.
 */
int vmm_vcpu_get_regs(vmm_vcpu *vcpu, vmm_regs *regs);
int vmm_vcpu_set_regs(vmm_vcpu *vcpu, const vmm_regs *regs);
int vmm_vcpu_get_sregs(vmm_vcpu *vcpu, vmm_sregs *sregs);
int vmm_vcpu_set_sregs(vmm_vcpu *vcpu, const vmm_sregs *sregs);

/* KVM_GET_SUPPORTED_CPUID: fills at most `max` entries, returns how many there are. -E2BIG: max is too small. */
int vmm_vm_supported_cpuid(vmm_vm *vm, vmm_cpuid_entry *entries, uint32_t max);
int vmm_vcpu_set_cpuid(vmm_vcpu *vcpu, const vmm_cpuid_entry *entries, uint32_t n);

/* n model-specific registers by index. Returns how many were taken: the first KVM refuses ends the list. */
int vmm_vcpu_get_msrs(vmm_vcpu *vcpu, const uint32_t *index, uint64_t *value, uint32_t n);
int vmm_vcpu_set_msrs(vmm_vcpu *vcpu, const uint32_t *index, const uint64_t *value, uint32_t n);

/* Linear to physical through the vCPU's page tables as KVM walks them. -EFAULT: not mapped. */
int vmm_vcpu_translate(vmm_vcpu *vcpu, uint64_t linear, uint64_t *gpa);

/* The other state KVM keeps, as KVM's own structs: sizes are checked, -EMSGSIZE when `size` is not KVM's. */
enum vmm_state {
    VMM_STATE_MP = 0,          /* vCPU: struct kvm_mp_state */
    VMM_STATE_EVENTS = 1,      /* vCPU: struct kvm_vcpu_events */
    VMM_STATE_DEBUGREGS = 2,   /* vCPU: struct kvm_debugregs */
    VMM_STATE_LAPIC = 3,       /* vCPU: struct kvm_lapic_state */
    VMM_STATE_FPU = 4,         /* vCPU: struct kvm_fpu */
    VMM_STATE_XSAVE = 5,       /* vCPU: struct kvm_xsave (4 KiB) */
    VMM_STATE_XCRS = 6,        /* vCPU: struct kvm_xcrs */
    VMM_STATE_REGS = 7,        /* vCPU: struct kvm_regs */
    VMM_STATE_SREGS = 8,       /* vCPU: struct kvm_sregs */
    VMM_STATE_CLOCK = 16,      /* machine: struct kvm_clock_data */
    VMM_STATE_PIT = 17,        /* machine: struct kvm_pit_state2 */
    VMM_STATE_PIC_MASTER = 18, /* machine: struct kvm_irqchip, chip 0 */
    VMM_STATE_PIC_SLAVE = 19,  /* machine: struct kvm_irqchip, chip 1 */
    VMM_STATE_IOAPIC = 20,     /* machine: struct kvm_irqchip, chip 2 */
};
int vmm_state_size(int kind);
int vmm_vcpu_get_state(vmm_vcpu *vcpu, int kind, void *buffer, size_t size);
int vmm_vcpu_set_state(vmm_vcpu *vcpu, int kind, const void *buffer, size_t size);
int vmm_vm_get_state(vmm_vm *vm, int kind, void *buffer, size_t size);

/* A file with KVM's own counters of a vCPU (KVM_GET_STATS_FD, Linux 5.14), the caller's to close. -errno. */
int vmm_vcpu_stats_fd(vmm_vcpu *vcpu);

/* cdef: end */

#endif
