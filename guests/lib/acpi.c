/* SPDX-License-Identifier: Apache-2.0 */
#include "acpi.h"

static bool sums_to_zero(const void *from, size_t n)
{
    uint8_t sum = 0;
    for (const uint8_t *byte = from; n; n--)
        sum = (uint8_t)(sum + *byte++);
    return sum == 0;
}

struct rsdp {
    char signature[8];
    uint8_t checksum;
    char oem[6];
    uint8_t revision;
    uint32_t rsdt, length;
    uint64_t xsdt;
} __attribute__((packed));

/* From the loader, or on a 16-byte boundary of the BIOS area (ACPI 6.5, 5.2.5.1). */
static const struct rsdp *find_rsdp(void)
{
    uintptr_t at = (uintptr_t)boot_info()->rsdp;
    for (uintptr_t scan = 0xe0000; !at && scan < 0x100000; scan += 16)
        if (!memcmp((const void *)scan, "RSD PTR ", 8))
            at = scan;
    if (!at)
        return NULL;
    const struct rsdp *rsdp = (const void *)at;
    REQUIRE(EXIT_ACPI, !memcmp(rsdp->signature, "RSD PTR ", 8));
    REQUIRE(EXIT_ACPI, sums_to_zero(rsdp, 20));
    REQUIRE(EXIT_ACPI, rsdp->revision < 2 || sums_to_zero(rsdp, rsdp->length));
    return rsdp;
}

static const struct acpi_header *checked(uint64_t address)
{
    const struct acpi_header *table = (const void *)(uintptr_t)address;
    REQUIRE(EXIT_ACPI, table->length >= sizeof *table && table->length < 1 << 20);
    REQUIRE(EXIT_ACPI, sums_to_zero(table, table->length));
    return table;
}

const struct acpi_header *acpi_table(const char *signature)
{
    const struct rsdp *rsdp = find_rsdp();
    if (!rsdp)
        return NULL;
    bool wide = rsdp->revision >= 2 && rsdp->xsdt;
    const struct acpi_header *root = checked(wide ? rsdp->xsdt : rsdp->rsdt);
    REQUIRE(EXIT_ACPI, !memcmp(root->signature, wide ? "XSDT" : "RSDT", 4));
    const char *entry = (const char *)(root + 1), *end = (const char *)root + root->length;
    for (; entry < end; entry += wide ? 8 : 4) {
        uint64_t address = 0;
        memcpy(&address, entry, wide ? 8 : 4);
        if (!memcmp((const void *)(uintptr_t)address, signature, 4))
            return checked(address);
    }
    return NULL;
}

const struct acpi_header *acpi_table_required(const char *signature)
{
    const struct acpi_header *table = acpi_table(signature);
    if (!table)
        guest_fail(EXIT_ACPI, "acpi table", 0, signature);
    return table;
}

const struct acpi_header *acpi_dsdt(void)
{
    const struct acpi_fadt *fadt = (const void *)acpi_table_required("FACP");
    bool wide = fadt->header.length >= offsetof(struct acpi_fadt, x_pm1a_event) && fadt->x_dsdt;
    const struct acpi_header *dsdt = checked(wide ? fadt->x_dsdt : fadt->dsdt);
    REQUIRE(EXIT_ACPI, !memcmp(dsdt->signature, "DSDT", 4));
    return dsdt;
}

const uint8_t *madt_entry(uint8_t type, unsigned n)
{
    enum { MADT_ENTRIES = 44 };
    static const struct acpi_header *madt;
    if (!madt)
        madt = acpi_table_required("APIC");
    const uint8_t *entry = (const uint8_t *)madt + MADT_ENTRIES, *end = (const uint8_t *)madt + madt->length;
    for (; entry < end; entry += entry[1]) {
        REQUIRE(EXIT_ACPI, entry[1] >= 2 && entry + entry[1] <= end);
        if (entry[0] == type && n-- == 0)
            return entry;
    }
    return NULL;
}

unsigned isa_irq_pin(unsigned irq)
{
    const uint8_t *entry;
    for (unsigned n = 0; (entry = madt_entry(MADT_OVERRIDE, n)); n++)
        if (entry[3] == irq)
            return entry[4];
    return irq;
}

void acpi_write(const struct acpi_address *address, uint32_t value)
{
    REQUIRE(EXIT_ACPI, address->space == ACPI_SPACE_IO || address->space == ACPI_SPACE_MEMORY);
    bool byte = address->bit_width == 8;
    if (address->space == ACPI_SPACE_IO) {
        if (byte)
            outb((uint16_t)address->address, (uint8_t)value);
        else
            outw((uint16_t)address->address, (uint16_t)value);
    } else if (byte) {
        mmio_write8((uintptr_t)address->address, (uint8_t)value);
    } else {
        mmio_write32((uintptr_t)address->address, value);
    }
}
