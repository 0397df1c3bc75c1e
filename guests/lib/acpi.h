/* SPDX-License-Identifier: Apache-2.0 */
/* ACPI tables, found and checked as a kernel would (ACPI 6.5, chapter 5). */
#ifndef GUEST_ACPI_H
#define GUEST_ACPI_H

#include "guest.h"

struct acpi_header {
    char signature[4];
    uint32_t length;
    uint8_t revision, checksum;
    char oem[6], oem_table[8];
    uint32_t oem_revision;
    char creator[4];
    uint32_t creator_revision;
} __attribute__((packed));

struct acpi_address {
    uint8_t space, bit_width, bit_offset, access_size;
    uint64_t address;
} __attribute__((packed));
enum { ACPI_SPACE_MEMORY = 0, ACPI_SPACE_IO = 1 };

struct acpi_fadt {
    struct acpi_header header;
    uint32_t firmware_control, dsdt;
    uint8_t model, preferred_profile;
    uint16_t sci;
    uint32_t smi_command;
    uint8_t acpi_enable, acpi_disable, s4bios, pstate;
    uint32_t pm1a_event, pm1b_event, pm1a_control, pm1b_control, pm2_control, pm_timer, gpe0, gpe1;
    uint8_t pm1_event_length, pm1_control_length, pm2_control_length, pm_timer_length, gpe0_length,
        gpe1_length;
    uint8_t gpe1_base, cst;
    uint16_t c2_latency, c3_latency, flush_size, flush_stride;
    uint8_t duty_offset, duty_width, day_alarm, month_alarm, century;
    uint16_t boot_flags;
    uint8_t reserved;
    uint32_t flags;
    struct acpi_address reset;
    uint8_t reset_value;
    uint16_t arm_flags;
    uint8_t minor;
    uint64_t x_firmware_control, x_dsdt;
    struct acpi_address x_pm1a_event, x_pm1b_event, x_pm1a_control, x_pm1b_control, x_pm2_control, x_pm_timer,
        x_gpe0, x_gpe1;
    struct acpi_address sleep_control, sleep_status;
} __attribute__((packed));
_Static_assert(offsetof(struct acpi_fadt, reset) == 116, "ACPI 6.5, table 5.9");
_Static_assert(offsetof(struct acpi_fadt, sleep_control) == 244, "ACPI 6.5, table 5.9");
enum { FADT_RESET_SUPPORTED = 1 << 10, FADT_HARDWARE_REDUCED = 1 << 20 };

/* RSDP and every header on the way are checked; NULL when the machine has no such table. */
const struct acpi_header *acpi_table(const char *signature);
/* The guest fails without it. */
const struct acpi_header *acpi_table_required(const char *signature);
const struct acpi_header *acpi_dsdt(void);

/* The n-th MADT entry of a type, pointing at its type byte; NULL behind the last. */
enum { MADT_LAPIC = 0, MADT_IOAPIC = 1, MADT_OVERRIDE = 2 };
const uint8_t *madt_entry(uint8_t type, unsigned n);

/* The I/O APIC pin an ISA interrupt arrives at, from the MADT's overrides. */
unsigned isa_irq_pin(unsigned irq);

void acpi_write(const struct acpi_address *address, uint32_t value);

#endif
