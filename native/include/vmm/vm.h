/* SPDX-License-Identifier: Apache-2.0 */
/* A machine: creating it, what its engine can do, and its messages. */
#ifndef VMM_API_VM_H
#define VMM_API_VM_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

typedef struct vmm_vm vmm_vm;
typedef struct vmm_vcpu vmm_vcpu;

/* What KVM models. It is there from the first vmm_vcpu_create on; a line driven before leads nowhere. */
enum vmm_vm_flags {
    VMM_VM_IRQCHIP = 1, /* in-kernel PIC, I/O APIC and local APICs */
    VMM_VM_PIT = 2,     /* in-kernel i8254 and port 0x61 (needs VMM_VM_IRQCHIP) */
};

/*
 * Open `kvm_path` ("/dev/kvm"), check that it speaks KVM API 12, create a machine.
 * -ENOENT, -EACCES, -ENODEV, -EBUSY ...: from open; -EPROTO: another API version; else the ioctl's error.
 * *out is to be given to vmm_vm_destroy.
 */
int vmm_vm_create(const char *kvm_path, uint32_t flags, vmm_vm **out);

/* Free everything the machine owns: vCPUs, memory, lines, bus. No vmm_vcpu_run may be in progress. NULL is fine. */
void vmm_vm_destroy(vmm_vm *vm);

/* KVM_CHECK_EXTENSION on the machine: 0 when absent, else KVM's number. */
int vmm_vm_check_extension(vmm_vm *vm, uint32_t capability);

/* KVM_ENABLE_CAP with four arguments. */
int vmm_vm_enable_cap(vmm_vm *vm, uint32_t capability, uint64_t arg0, uint64_t arg1, uint64_t arg2,
                      uint64_t arg3);

/*
 * `say` is called, from whatever thread it happens on, when a device has something to tell a person: the guest broke
 * a rule, a disk answers with errors, a network peer went away. Set it before the first run.
 */
void vmm_vm_on_message(vmm_vm *vm, void (*say)(void *opaque, const char *text), void *opaque);

/* cdef: end */

#endif
