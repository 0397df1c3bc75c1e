/* SPDX-License-Identifier: Apache-2.0 */
#include "pci.h"

enum { CONFIG_ADDRESS = 0xcf8, CONFIG_DATA = 0xcfc };
enum { MSIX_ENABLE = 1 << 15, MSI_ADDRESS = 0xfee00000 };

static uint16_t select(unsigned function, unsigned offset)
{
    outl(CONFIG_ADDRESS, 1u << 31 | function << 8 | (offset & 0xfc));
    return (uint16_t)(CONFIG_DATA + (offset & 3));
}

uint8_t pci_read8(unsigned function, unsigned offset)
{
    return inb(select(function, offset));
}

uint16_t pci_read16(unsigned function, unsigned offset)
{
    return inw(select(function, offset));
}

uint32_t pci_read32(unsigned function, unsigned offset)
{
    return inl(select(function, offset));
}

void pci_write16(unsigned function, unsigned offset, uint16_t value)
{
    outw(select(function, offset), value);
}

void pci_write32(unsigned function, unsigned offset, uint32_t value)
{
    outl(select(function, offset), value);
}

int pci_find(uint32_t id, unsigned n)
{
    for (unsigned function = 0; function < PCI_FUNCTIONS; function++) {
        if (pci_read32(function, PCI_ID) == id && n-- == 0)
            return (int)function;
        /* Functions 1..7 are there only where function 0 says so. */
        if (function % 8 == 0 && !(pci_read8(function, PCI_HEADER_TYPE) & 0x80))
            function += 7;
    }
    return -1;
}

unsigned pci_capability(unsigned function, uint8_t kind, unsigned after)
{
    enum { CAPABILITIES_MAX = 48 }; /* of four bytes in the 192 bytes behind the header */
    if (!after && !(pci_read16(function, PCI_STATUS) & PCI_STATUS_CAPABILITIES))
        return 0;
    unsigned at = pci_read8(function, after ? after + 1 : PCI_CAPABILITIES) & 0xfc;
    for (unsigned i = 0; at && i < CAPABILITIES_MAX; i++) {
        if (pci_read8(function, at) == kind)
            return at;
        at = pci_read8(function, at + 1) & 0xfc;
    }
    return 0;
}

uintptr_t pci_bar(unsigned function, unsigned bar)
{
    uint32_t low = pci_read32(function, PCI_BAR0 + 4 * bar);
    REQUIRE(EXIT_DEVICE, !(low & 1) && (low & ~0xfu));
    if ((low >> 1 & 3) == 2)
        REQUIRE(EXIT_DEVICE, pci_read32(function, PCI_BAR0 + 4 * bar + 4) == 0);
    return low & ~0xfu;
}

static unsigned msix(unsigned function)
{
    unsigned at = pci_capability(function, PCI_CAPABILITY_MSIX, 0);
    REQUIRE(EXIT_DEVICE, at);
    return at;
}

static uintptr_t msix_entry(unsigned function, unsigned entry)
{
    unsigned at = msix(function);
    REQUIRE(EXIT_DEVICE, entry <= (pci_read16(function, at + 2) & 0x7ff));
    uint32_t table = pci_read32(function, at + 4);
    return pci_bar(function, table & 7) + (table & ~7u) + 16 * entry;
}

void pci_msix_route(unsigned function, unsigned entry, uint8_t vector)
{
    uintptr_t slot = msix_entry(function, entry);
    mmio_write32(slot, MSI_ADDRESS);
    mmio_write32(slot + 4, 0);
    mmio_write32(slot + 8, vector);
    mmio_write32(slot + 12, 0); /* unmasked */
}

void pci_msix_mask(unsigned function, unsigned entry, bool masked)
{
    mmio_write32(msix_entry(function, entry) + 12, masked);
}

void pci_msix_enable(unsigned function, bool enable)
{
    unsigned at = msix(function);
    uint16_t control = pci_read16(function, at + 2);
    pci_write16(function, at + 2, (uint16_t)(enable ? control | MSIX_ENABLE : control & ~MSIX_ENABLE));
}
