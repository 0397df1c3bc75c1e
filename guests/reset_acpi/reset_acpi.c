/* SPDX-License-Identifier: Apache-2.0 */
/* Reset through the FADT's reset register (ACPI 6.5, 4.8.3.6). Ends in a reset, not in a verdict. */
#include "acpi.h"

void guest_main(void)
{
    const struct acpi_fadt *fadt = (const void *)acpi_table_required("FACP");
    CHECK(fadt->header.length >= offsetof(struct acpi_fadt, arm_flags));
    CHECK(fadt->flags & FADT_RESET_SUPPORTED);
    CHECK_EQ(fadt->reset.bit_width, 8);
    print("reset register: space %u address 0x%lx value 0x%x\n", fadt->reset.space, fadt->reset.address,
          fadt->reset_value);
    acpi_write(&fadt->reset, fadt->reset_value);
    await_the_end();
    CHECK(!"reached: the reset did not happen");
}
