/* SPDX-License-Identifier: Apache-2.0 */
#include "smp.h"

#include "acpi.h"

/* Where the other CPUs start: below 640 KiB, page aligned (the SIPI vector is its page number). */
enum { TRAMPOLINE = 0x8000 };

extern const char trampoline_start[], trampoline_end[];

char cpu_stacks[CPUS_MAX][4096] __attribute__((aligned(16)));
uint64_t cpus_started;
static void (*cpu_function)(unsigned, uint32_t);

void cpu_main(unsigned number);
void cpu_main(unsigned number)
{
    idt_load();
    lapic_init();
    cpu_function(number, lapic_read(LAPIC_ID) >> 24);
    halt_forever();
}

unsigned smp_start(void (*function)(unsigned number, uint32_t apic_id))
{
    uint32_t own_id = lapic_read(LAPIC_ID) >> 24;
    unsigned sent = 0;
    const uint8_t *entry;

    cpu_function = function;
    memcpy((void *)TRAMPOLINE, trampoline_start, (size_t)(trampoline_end - trampoline_start));
    for (unsigned n = 0; (entry = madt_entry(MADT_LAPIC, n)); n++) {
        uint8_t apic_id = entry[3], enabled = entry[4] & 1;
        if (!enabled || apic_id == own_id)
            continue;
        REQUIRE(EXIT_ACPI, sent < CPUS_MAX - 1);
        lapic_send(apic_id, ICR_INIT | ICR_ASSERT);
        /* The 10 ms of the MP specification (B.4) are for buses that virtual machines do not have. */
        lapic_send(apic_id, ICR_STARTUP | ICR_ASSERT | TRAMPOLINE >> 12);
        sent++;
    }
    return sent;
}
