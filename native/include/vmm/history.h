/* SPDX-License-Identifier: Apache-2.0 */
/* What a vCPU did last. */
#ifndef VMM_API_HISTORY_H
#define VMM_API_HISTORY_H

#include "vmm/vcpu.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/* One exit, as kept in each vCPU's ring of the last 64. reason is KVM's exit reason. */
typedef struct vmm_exit_record {
    uint64_t address; /* port or guest-physical address; MSR index; else 0 */
    uint64_t value;   /* what was read or written */
    uint32_t reason;
    uint16_t size;   /* bytes of one access */
    uint8_t write;   /* 1: the guest wrote */
    uint8_t claimed; /* 1: a device answered */
    uint32_t count;  /* accesses in a string instruction, else 1 */
    uint32_t tag;    /* of the range that answered */
} vmm_exit_record;

/* Copies the newest exits, oldest first; returns how many. For a vCPU that is not running (else approximate). */
uint32_t vmm_vcpu_last_exits(vmm_vcpu *vcpu, vmm_exit_record *records, uint32_t max);

/* How many exits there were for vmm_vcpu_last_exits ever. Those that are recorded are the guest's own deeds. */
uint64_t vmm_vcpu_recorded(vmm_vcpu *vcpu);

/* Exits so far by KVM's exit reason; reasons above 63 are counted at 63. */
uint64_t vmm_vcpu_exit_count(vmm_vcpu *vcpu, uint32_t reason);

/* After VMM_STOP_EMULATION: the instruction bytes KVM reported. Returns how many (0..15). */
uint32_t vmm_vcpu_failed_instruction(vmm_vcpu *vcpu, uint8_t bytes[16]);

/* After VMM_STOP_EMULATION with another suberror than KVM_INTERNAL_ERROR_EMULATION (1): what KVM gave with it, whose
 * meaning is the suberror's. Returns how many (0..16). */
uint32_t vmm_vcpu_internal_error(vmm_vcpu *vcpu, uint64_t data[16]);

/* cdef: end */

#endif
