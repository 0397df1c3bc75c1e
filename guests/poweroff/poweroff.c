/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Soft off as an operating system does it: _S5 from the DSDT, then SLP_TYP and SLP_EN where the FADT says
 * (ACPI 6.5, 16.1.7 for PM1 control, 4.8.3.7 for hardware-reduced machines). Ends powered off, not in a
 * verdict.
 */
#include "acpi.h"

/* _S5's first element: Name(_S5_, Package() {SLP_TYPa, ...}), 20.2.5: NameOp _S5_ PackageOp PkgLength
 * NumElements. */
static uint8_t sleep_type(void)
{
    enum { NAME_OP = 0x08, PACKAGE_OP = 0x12, ZERO_OP = 0, ONE_OP = 1, BYTE_PREFIX = 0x0a };
    const struct acpi_header *dsdt = acpi_dsdt();
    const uint8_t *at = (const uint8_t *)(dsdt + 1), *end = (const uint8_t *)dsdt + dsdt->length;

    while (at + 10 < end && (memcmp(at, "_S5_", 4) || at[4] != PACKAGE_OP))
        at++;
    CHECK(at + 10 < end);
    CHECK(at[-1] == NAME_OP || (at[-1] == '\\' && at[-2] == NAME_OP));
    at += 5;
    at += 1 + (*at >> 6); /* PkgLength: bits 7:6 count its further bytes */
    CHECK(*at >= 1);
    at++;
    if (*at == BYTE_PREFIX)
        return at[1];
    CHECK(*at == ZERO_OP || *at == ONE_OP);
    return *at;
}

void guest_main(void)
{
    enum {
        SLP_TYP_SHIFT = 10,
        SLP_EN = 1 << 13,
        REDUCED_SLP_TYP_SHIFT = 2,
        REDUCED_SLP_EN = 1 << 5,
        SCI_EN = 1
    };
    const struct acpi_fadt *fadt = (const void *)acpi_table_required("FACP");
    uint8_t type = sleep_type();

    if (fadt->flags & FADT_HARDWARE_REDUCED) {
        CHECK(fadt->header.length >= sizeof *fadt);
        print("sleep control at 0x%lx, SLP_TYP %u\n", fadt->sleep_control.address, type);
        acpi_write(&fadt->sleep_control, (uint32_t)type << REDUCED_SLP_TYP_SHIFT | REDUCED_SLP_EN);
    } else {
        uint16_t port = (uint16_t)fadt->pm1a_control;
        CHECK(port != 0);
        print("PM1a control at 0x%x, SLP_TYP %u\n", port, type);
        if (fadt->smi_command && !(inw(port) & SCI_EN))
            outb((uint16_t)fadt->smi_command, fadt->acpi_enable);
        outw(port, (uint16_t)(type << SLP_TYP_SHIFT | SLP_EN));
    }
    await_the_end();
    CHECK(!"reached: the power did not go");
}
