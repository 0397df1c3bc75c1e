/* SPDX-License-Identifier: Apache-2.0 */
/* PCI functions of bus 0, by ports 0xcf8 and 0xcfc (PCI 3.0, 3.2.2.3.2). BARs are taken as the firmware set them. */
#ifndef GUEST_PCI_H
#define GUEST_PCI_H

#include "guest.h"

enum {
    PCI_ID = 0x00,
    PCI_COMMAND = 0x04,
    PCI_STATUS = 0x06,
    PCI_CLASS = 0x08,
    PCI_HEADER_TYPE = 0x0e,
    PCI_BAR0 = 0x10,
    PCI_CAPABILITIES = 0x34,
    PCI_INTERRUPT_LINE = 0x3c,
    PCI_INTERRUPT_PIN = 0x3d,
    PCI_COMMAND_IO = 1 << 0,
    PCI_COMMAND_MEMORY = 1 << 1,
    PCI_COMMAND_MASTER = 1 << 2,
    PCI_COMMAND_NO_INTX = 1 << 10,
    PCI_STATUS_INTX = 1 << 3,
    PCI_STATUS_CAPABILITIES = 1 << 4,
    PCI_CAPABILITY_VENDOR = 0x09,
    PCI_CAPABILITY_MSIX = 0x11,
    PCI_FUNCTIONS = 256, /* of a bus */
};

/* `function` is device << 3 | function; `offset` is aligned to the access. */
uint8_t pci_read8(unsigned function, unsigned offset);
uint16_t pci_read16(unsigned function, unsigned offset);
uint32_t pci_read32(unsigned function, unsigned offset);
void pci_write16(unsigned function, unsigned offset, uint16_t value);
void pci_write32(unsigned function, unsigned offset, uint32_t value);

/* The n-th function of bus 0 with this device << 16 | vendor; -1: there is none. */
int pci_find(uint32_t id, unsigned n);

/* The next capability of this kind behind `after` (0: from the start); 0: there is none. */
unsigned pci_capability(unsigned function, uint8_t kind, unsigned after);

/* The address in a memory BAR; the guest fails where it is unset or beyond 4 GiB. */
uintptr_t pci_bar(unsigned function, unsigned bar);

/* MSI-X (PCI 3.0, 6.8.2): entry `entry` interrupts the CPU with APIC id 0 at `vector`; and the function's switch. */
void pci_msix_route(unsigned function, unsigned entry, uint8_t vector);
void pci_msix_mask(unsigned function, unsigned entry, bool masked);
void pci_msix_enable(unsigned function, bool enable);

#endif
