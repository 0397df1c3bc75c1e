/* SPDX-License-Identifier: Apache-2.0 */
/*
 * MSI-X of a PCI function (PCI 3.0, 6.8.2): capability, table, pending bits; each vector through an irqfd of its own.
 *
 * A vector's route is set when it is unmasked and its message differs from the last; a masked one that is signalled
 * stays pending until it is unmasked. The function's lock is held around everything here.
 */
#ifndef VMM_DEVICES_MSIX_H
#define VMM_DEVICES_MSIX_H

#include "devices/pci.h"

#define VMM_MSIX_ENTRY 16 /* bytes of a vector in the table */
#define VMM_MSIX_VECTORS_MAX 2048
#define VMM_MSIX_NONE 0xffff

struct vmm_msix_entry {
    uint32_t words[4]; /* message address (low, high), data, vector control */
    bool pending;
    struct vmm_msi_vector vector;
};

struct vmm_msix {
    struct vmm_pci_function *function;
    struct vmm_msi *msi;
    uint32_t n, capability; /* offset in configuration space */
    bool enabled, masked;   /* of the function */
    struct vmm_msix_entry *entries;
};

/*
 * n vectors, whose table and pending bits are at these offsets of a BAR of the function, not yet inserted, which is
 * to give accesses there to the functions below. The offsets are multiples of 8.
 */
int vmm_msix_init(struct vmm_msix *msix, struct vmm_pci_function *f, struct vmm_msi *msi, uint32_t n,
                  unsigned bar, uint32_t table, uint32_t pending);
void vmm_msix_deinit(struct vmm_msix *msix); /* before the host is destroyed; a zeroed one is fine */

/* Power-on state; configuration space is the function's to reset. */
void vmm_msix_reset(struct vmm_msix *msix);

/* Configuration space was written: for the function's config_written. */
void vmm_msix_config_written(struct vmm_msix *msix);

/* -EINVAL: no driver can have written such a table. Enable and mask bits are those of configuration space, loaded before. */
void vmm_msix_save(const struct vmm_msix *msix, vmm_msix_entry_state *entries);
int vmm_msix_load(struct vmm_msix *msix, const vmm_msix_entry_state *entries);

/* The table and the pending bits, in 4-byte and 8-byte aligned accesses; others read as ones and write nothing. */
uint64_t vmm_msix_table_read(const struct vmm_msix *msix, uint64_t offset, uint32_t size);
void vmm_msix_table_write(struct vmm_msix *msix, uint64_t offset, uint32_t size, uint64_t value);
uint64_t vmm_msix_pending_read(const struct vmm_msix *msix, uint64_t offset, uint32_t size);

/* Interrupt the guest through a vector, or note it as pending. VMM_MSIX_NONE, and MSI-X that is off: nothing. */
void vmm_msix_signal(struct vmm_msix *msix, uint32_t vector);

#endif
