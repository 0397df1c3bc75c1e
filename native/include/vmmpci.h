/* SPDX-License-Identifier: Apache-2.0 */
/*
 * PCI, as Python sees it: a host bridge with one bus of 32 slots, and the virtio transport on it. A continuation of
 * vmmcore.h, under the same rules.
 *
 * Order of calls
 *   vmm_pci_host_create -> vmm_virtio_pci_create for each device -> attach the host's ports and ECAM, run ...
 *   -> vmm_vm_destroy -> vmm_virtio_pci_destroy -> vmm_pci_host_destroy
 */
#ifndef VMMPCI_H
#define VMMPCI_H

#include "vmmvirtio.h"

/* cdef: begin */

typedef struct vmm_pci_host vmm_pci_host;

/*
 * Where things are. There is no firmware: BARs are placed in [window, window + window_size), in the order functions
 * are created; the guest may move them anywhere. Slot n's interrupt pin is wired to GSI first_gsi + n % n_gsis,
 * level-triggered; for a guest that uses no I/O APIC every pin reaches ISA interrupt isa_irq too (0: none), which is
 * what the interrupt line registers say.
 */
typedef struct vmm_pci_layout {
    uint64_t window, window_size;
    uint32_t first_gsi, n_gsis, isa_irq;
} vmm_pci_layout;

/* Bus 0 with the host bridge at 00:00.0. -EINVAL: no interrupt line. */
int vmm_pci_host_create(vmm_vm *vm, const vmm_pci_layout *layout, vmm_pci_host **out);
void vmm_pci_host_destroy(vmm_pci_host *host);

/* Every function as at power-on: BARs where they were placed, decoding off. Not while vCPUs run. */
void vmm_pci_host_reset(vmm_pci_host *host);

/*
 * Configuration space, two ways in; opaque is the host. Ports: 8 of them, mechanism #1 (PCI 3.0, 3.2.2.3.2); a byte
 * with bit 2 set, written to the second (0xcf9, the chip set's reset control), ends the run with VMM_STOP_RESET.
 * ECAM: 1 MiB, the one bus (PCI Express 4.0, 7.2.2). What is not there reads as ones.
 */
const vmm_device_ops *vmm_pci_ports_ops(void);
const vmm_device_ops *vmm_pci_ecam_ops(void);

/* A base address register, for traces and the curious. address: where it decodes; UINT64_MAX: nowhere. */
typedef struct vmm_pci_bar_info {
    uint64_t size, address;
    uint32_t tag; /* of its range on the bus */
} vmm_pci_bar_info;
/* -ENODEV: the slot is empty; -EINVAL: no such slot or BAR, or the BAR is not implemented. */
int vmm_pci_get_bar(vmm_pci_host *host, uint32_t slot, uint32_t bar, vmm_pci_bar_info *info);

/* Every function's configuration space; what it makes of interrupt pins and MSI-X is its owner's to load. */
typedef struct vmm_pci_host_state {
    uint32_t address; /* CONFIG_ADDRESS */
    uint32_t present; /* a bit for each slot */
    uint8_t config[32][256];
} vmm_pci_host_state;
void vmm_pci_host_save(vmm_pci_host *host, vmm_pci_host_state *state);
/*
 * BARs that decode elsewhere then are moved. Before the devices are loaded; not while vCPUs run. -EINVAL: other slots,
 * or what no write can change differs; nothing has changed then.
 */
int vmm_pci_host_load(vmm_pci_host *host, const vmm_pci_host_state *state);

/* ---- virtio over PCI (virtio 1.2, 4.1) ---- */

typedef struct vmm_virtio_pci vmm_virtio_pci;

/*
 * Put a virtio device into a slot (-1: the first that is free). Its registers are BAR 0, 64-bit wide; MSI-X vectors:
 * one for configuration changes, one a queue. Returns the slot, or -EBUSY: it is taken; -ENOSPC: no slot is free, or
 * no address; -EINVAL: no such slot.
 */
int vmm_virtio_pci_create(vmm_virtio *dev, vmm_pci_host *host, int slot, vmm_virtio_pci **out);
void vmm_virtio_pci_destroy(vmm_virtio_pci *transport);
/* BAR 0, which the host puts on the bus; opaque is the transport. */
const vmm_device_ops *vmm_virtio_pci_ops(void);

/* What the transport adds to the state of its device and of the host. */
typedef struct vmm_msix_entry_state {
    uint32_t words[4]; /* message address (low, high), data, vector control */
    uint8_t pending;
} vmm_msix_entry_state;
typedef struct vmm_virtio_pci_state {
    uint32_t device_feature_select, driver_feature_select, isr, n_vectors;
    uint16_t queue_select, config_vector, queue_vectors[64];
    vmm_msix_entry_state msix[65];
} vmm_virtio_pci_state;
void vmm_virtio_pci_save(vmm_virtio_pci *transport, vmm_virtio_pci_state *state);
/* After the host and the device. A vector's route in KVM is set again only if its message differs. -EINVAL. */
int vmm_virtio_pci_load(vmm_virtio_pci *transport, const vmm_virtio_pci_state *state);

/* cdef: end */

#endif
