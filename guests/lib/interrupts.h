/* SPDX-License-Identifier: Apache-2.0 */
/* i8259 PICs, local APIC, I/O APIC and the i8254's first counter. */
#ifndef GUEST_INTERRUPTS_H
#define GUEST_INTERRUPTS_H

#include "cpu.h"

/* Both PICs initialised (edge triggered, vectors from VECTOR_PIC) with every line masked. */
void pic_init(void);
void pic_unmask(unsigned irq);
void pic_mask(unsigned irq);
void pic_eoi(unsigned irq);

enum {
    LAPIC_ID = 0x20,
    LAPIC_VERSION = 0x30,
    LAPIC_EOI = 0xb0,
    LAPIC_SPURIOUS = 0xf0,
    LAPIC_ICR_LOW = 0x300,
    LAPIC_ICR_HIGH = 0x310,
    LAPIC_LVT_TIMER = 0x320,
    LAPIC_TIMER_INITIAL = 0x380,
    LAPIC_TIMER_CURRENT = 0x390,
    LAPIC_TIMER_DIVIDE = 0x3e0,
    LAPIC_SOFTWARE_ENABLE = 0x100,
    LAPIC_TIMER_PERIODIC = 0x20000,
    LAPIC_MASKED = 0x10000,
    ICR_INIT = 0x500,
    ICR_STARTUP = 0x600,
    ICR_ASSERT = 0x4000,
    ICR_PENDING = 0x1000,
    IOAPIC_ADDRESS = 0xfec00000,
    IOAPIC_LEVEL = 0x8000,
};

/* This CPU's local APIC, software enabled, task priority 0. */
void lapic_init(void);
uint32_t lapic_read(unsigned offset);
void lapic_write(unsigned offset, uint32_t value);
/* An interrupt command to one CPU; waits until it is sent. */
void lapic_send(uint32_t apic_id, uint32_t command);

uint32_t ioapic_read(uint8_t index);
unsigned ioapic_pins(void);
/* Route a pin to this vector on the CPU with APIC id 0; flags 0 is edge triggered, active high. */
void ioapic_route(unsigned pin, uint8_t vector, uint32_t flags);
void ioapic_mask(unsigned pin);

/* Counter 0 as a rate generator on IRQ 0. */
enum { PIT_HZ = 1193182 };
void pit_start(uint16_t divisor);
void pit_stop(void);

#endif
