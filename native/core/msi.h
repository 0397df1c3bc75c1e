/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Message-signalled interrupts: each vector has a GSI of its own, a route from that GSI to the message the guest
 * wrote, and an irqfd, so that a holder of the eventfd, another process included, interrupts the guest by writing it.
 *
 * One table a machine: KVM_SET_GSI_ROUTING replaces all of it, so the routes KVM sets by default (I/O APIC inputs
 * 0..23, both 8259s) are repeated in front. Changing it waits for a grace period (milliseconds): only a message
 * that differs from the vector's present one does.
 *
 * vmm_msi_create and vmm_msi_open before the machine runs; vmm_msi_route from any thread; the rest after
 * vmm_vm_destroy, or before the first route.
 */
#ifndef VMM_CORE_MSI_H
#define VMM_CORE_MSI_H

#include "core/core.h"

#define VMM_MSI_FIRST_GSI 24 /* KVM's I/O APIC has the inputs before */

struct vmm_msi;

struct vmm_msi_vector {
    int fd; /* eventfd: a write interrupts the guest */
    uint32_t gsi;
    uint64_t address; /* the message, while routed */
    uint32_t data;
    bool routed;   /* KVM took the message */
    bool attached; /* fd is an irqfd of gsi */
};

int vmm_msi_create(struct vmm_vm *vm, struct vmm_msi **out);
void vmm_msi_destroy(struct vmm_msi *msi);

/* Give a vector, which must stay where it is until closed, its GSI and eventfd. -ENOSPC: KVM has no more routes. */
int vmm_msi_open(struct vmm_msi *msi, struct vmm_msi_vector *vector);
void vmm_msi_close(struct vmm_msi *msi, struct vmm_msi_vector *vector);

/*
 * Have the vector send `data` to `address` (Intel SDM 3, 11.11). Both are the guest's: what KVM refuses leaves the
 * vector without a route, and its interrupts go nowhere. -errno: KVM's.
 */
int vmm_msi_route(struct vmm_msi *msi, struct vmm_msi_vector *vector, uint64_t address, uint32_t data);

/* Interrupt the guest, if the vector has a route. */
void vmm_msi_signal(const struct vmm_msi_vector *vector);

/* How often the routing table was given to KVM. */
uint64_t vmm_msi_updates(struct vmm_msi *msi);

#endif
