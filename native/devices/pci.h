/* SPDX-License-Identifier: Apache-2.0 */
/*
 * PCI: a host bridge, one bus, 32 slots with one function each; configuration space, BARs, interrupt pins (PCI 3.0).
 *
 * A function is embedded in what owns it, which fills the read-only part of its configuration space, adds BARs and
 * capabilities, and takes part in a few accesses through ops.
 *
 * Locks. A function has one: its owner's, held around every op of it and taken by every access to its configuration
 * space. Below it the host's, for what functions share: where BARs decode, interrupt pins; below that the bus's.
 * The configuration space of a machine that runs is written by its vCPUs only: another thread's write would hold
 * the function's lock while it waits for a vCPU to leave the BAR that it takes away.
 *
 * Not modelled: bus mastering that is off does not keep a function from guest memory; power management; PCI
 * Express capabilities (functions are conventional ones, whose configuration space ends at 256 bytes).
 */
#ifndef VMM_DEVICES_PCI_H
#define VMM_DEVICES_PCI_H

#include "core/core.h"
#include "core/msi.h"
#include "vmmpci.h"

#define VMM_PCI_SLOTS 32
#define VMM_PCI_BARS 6
#define VMM_PCI_CONFIG_SIZE 256
#define VMM_PCI_NOWHERE UINT64_MAX /* not decoded: no BAR can start at the last byte */

/* Header type 0 (PCI 3.0, 6.1) */
enum vmm_pci_register {
    VMM_PCI_VENDOR = 0x00,
    VMM_PCI_DEVICE = 0x02,
    VMM_PCI_COMMAND = 0x04,
    VMM_PCI_STATUS = 0x06,
    VMM_PCI_REVISION = 0x08,
    VMM_PCI_CLASS = 0x09, /* interface, sub-class, base class */
    VMM_PCI_BAR0 = 0x10,
    VMM_PCI_SUBSYSTEM_VENDOR = 0x2c,
    VMM_PCI_SUBSYSTEM = 0x2e,
    VMM_PCI_CAPABILITIES = 0x34,
    VMM_PCI_INTERRUPT_LINE = 0x3c,
    VMM_PCI_INTERRUPT_PIN = 0x3d,
    VMM_PCI_HEADER_END = 0x40,
};

enum vmm_pci_command {
    VMM_PCI_COMMAND_MEMORY = 0x2,
    VMM_PCI_COMMAND_MASTER = 0x4,
    VMM_PCI_COMMAND_INTX_DISABLE = 0x400,
};

enum vmm_pci_status { VMM_PCI_STATUS_INTERRUPT = 0x8, VMM_PCI_STATUS_CAPABILITIES = 0x10 };

struct vmm_pci_bar {
    uint64_t size; /* 0: not implemented */
    const vmm_device_ops *ops;
    void *opaque;
    uint64_t wanted; /* where configuration space says; VMM_PCI_NOWHERE. With `at` under the host's lock. */
    uint64_t at;     /* where it is on the bus; differs from wanted when that range is taken */
};

/* What an owner may add to accesses of its configuration space. Each may be NULL; the function's lock is held. */
struct vmm_pci_function_ops {
    void (*config_read)(void *opaque, uint32_t offset,
                        uint32_t size); /* about to be read: bring it up to date */
    void (*config_written)(void *opaque, uint32_t offset,
                           uint32_t size); /* stored already, through the write mask */
    void (*decoded)(void *opaque);         /* BARs came, went or moved */
    void (*reset)(void *opaque);
};

struct vmm_pci_function {
    struct vmm_pci_host *host;
    pthread_mutex_t *lock;
    const struct vmm_pci_function_ops *ops;
    void *opaque;
    uint32_t slot;
    uint8_t config[VMM_PCI_CONFIG_SIZE], writable[VMM_PCI_CONFIG_SIZE];
    uint8_t power_on[VMM_PCI_CONFIG_SIZE]; /* config as it was when the function was inserted */
    uint32_t capabilities_end, last_capability;
    struct vmm_pci_bar bars[VMM_PCI_BARS];
    bool interrupt, pin_held; /* the pin is asserted, but for the command register; under the host's lock */
};

struct vmm_pci_identity {
    uint16_t vendor, device, subsystem_vendor, subsystem;
    uint32_t class_code; /* base class << 16 | sub-class << 8 | interface */
    uint8_t revision;
};

static inline void vmm_pci_put(uint8_t *at, uint32_t value, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++)
        at[i] = (uint8_t)(value >> (8 * i));
}

static inline uint32_t vmm_pci_get(const uint8_t *at, uint32_t size)
{
    uint32_t value = 0;
    for (uint32_t i = 0; i < size; i++)
        value |= (uint32_t)at[i] << (8 * i);
    return value;
}

/* ---- making a function, in this order ---- */

/* `pin`: it has interrupt pin A. */
void vmm_pci_function_init(struct vmm_pci_function *f, const struct vmm_pci_identity *identity, bool pin,
                           pthread_mutex_t *lock, const struct vmm_pci_function_ops *ops, void *opaque);

/*
 * A 64-bit memory BAR, registers `bar` and `bar + 1`. size: a power of two, 4 KiB or more. An owner's BAR ops are
 * called without any lock.
 */
void vmm_pci_add_bar(struct vmm_pci_function *f, unsigned bar, uint64_t size, const vmm_device_ops *ops,
                     void *opaque);

/* A capability of `size` bytes, the first two its id and link. Returns its offset; there is room for 192 bytes. */
uint32_t vmm_pci_add_capability(struct vmm_pci_function *f, uint8_t id, uint32_t size);

/* Into a slot of the host (-1: the first that is free), BARs at free addresses. Returns the slot; see vmmpci.h. */
int vmm_pci_insert(struct vmm_pci_host *host, struct vmm_pci_function *f, int slot);

/* Out of it again; only before the machine has run or after vmm_vm_destroy. One that is in no slot is fine. */
void vmm_pci_remove(struct vmm_pci_function *f);

/* ---- while it is used: with or without the function's lock ---- */

/* Assert or deassert the interrupt pin; wires are shared, and the command register may hold it back. */
void vmm_pci_interrupt(struct vmm_pci_function *f, bool on);

/* Where a BAR decodes, or VMM_PCI_NOWHERE. */
uint64_t vmm_pci_bar_address(struct vmm_pci_function *f, unsigned bar);

/* The machine, and its message-signalled interrupts. */
struct vmm_vm *vmm_pci_vm(struct vmm_pci_host *host);
struct vmm_msi *vmm_pci_msi(struct vmm_pci_host *host);

#endif
