/* SPDX-License-Identifier: Apache-2.0 */
#include "interrupts.h"

enum { PIC1 = 0x20, PIC2 = 0xa0, PIC_ICW1 = 0x11, PIC_EOI = 0x20, PIC_CASCADE = 2, ICW4_8086 = 1 };

static uint16_t pic_masks = 0xffff;

static void pic_write_masks(void)
{
    outb(PIC1 + 1, (uint8_t)pic_masks);
    outb(PIC2 + 1, (uint8_t)(pic_masks >> 8));
}

void pic_init(void)
{
    const struct {
        uint16_t port;
        uint8_t value;
    } words[] = {
        {PIC1, PIC_ICW1}, {PIC1 + 1, VECTOR_PIC},     {PIC1 + 1, 1 << PIC_CASCADE}, {PIC1 + 1, ICW4_8086},
        {PIC2, PIC_ICW1}, {PIC2 + 1, VECTOR_PIC + 8}, {PIC2 + 1, PIC_CASCADE},      {PIC2 + 1, ICW4_8086},
    };
    for (unsigned i = 0; i < sizeof words / sizeof *words; i++)
        outb(words[i].port, words[i].value);
    pic_masks = 0xffff & ~(1 << PIC_CASCADE);
    pic_write_masks();
}

void pic_unmask(unsigned irq)
{
    pic_masks &= (uint16_t) ~(1 << irq);
    pic_write_masks();
}

void pic_mask(unsigned irq)
{
    pic_masks |= (uint16_t)(1 << irq);
    pic_write_masks();
}

void pic_eoi(unsigned irq)
{
    if (irq >= 8)
        outb(PIC2, PIC_EOI);
    outb(PIC1, PIC_EOI);
}

static uintptr_t lapic_base = 0xfee00000;

uint32_t lapic_read(unsigned offset)
{
    return mmio_read32(lapic_base + offset);
}

void lapic_write(unsigned offset, uint32_t value)
{
    mmio_write32(lapic_base + offset, value);
}

void lapic_init(void)
{
    lapic_base = rdmsr(MSR_APIC_BASE) & 0xfffff000;
    lapic_write(LAPIC_SPURIOUS, LAPIC_SOFTWARE_ENABLE | VECTOR_SPURIOUS);
    lapic_write(0x80, 0);
}

void lapic_send(uint32_t apic_id, uint32_t command)
{
    lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
    lapic_write(LAPIC_ICR_LOW, command);
    while (lapic_read(LAPIC_ICR_LOW) & ICR_PENDING)
        ;
}

uint32_t ioapic_read(uint8_t index)
{
    mmio_write32(IOAPIC_ADDRESS, index);
    return mmio_read32(IOAPIC_ADDRESS + 0x10);
}

static void ioapic_write(uint8_t index, uint32_t value)
{
    mmio_write32(IOAPIC_ADDRESS, index);
    mmio_write32(IOAPIC_ADDRESS + 0x10, value);
}

unsigned ioapic_pins(void)
{
    return (ioapic_read(1) >> 16 & 0xff) + 1;
}

void ioapic_route(unsigned pin, uint8_t vector, uint32_t flags)
{
    ioapic_write((uint8_t)(0x11 + 2 * pin), 0);
    ioapic_write((uint8_t)(0x10 + 2 * pin), vector | flags);
}

void ioapic_mask(unsigned pin)
{
    ioapic_write((uint8_t)(0x10 + 2 * pin), LAPIC_MASKED);
}

enum { PIT_COUNTER0 = 0x40, PIT_CONTROL = 0x43, PIT_RATE_GENERATOR = 0x34, PIT_ONE_SHOT = 0x30 };

void pit_start(uint16_t divisor)
{
    outb(PIT_CONTROL, PIT_RATE_GENERATOR);
    outb(PIT_COUNTER0, (uint8_t)divisor);
    outb(PIT_COUNTER0, (uint8_t)(divisor >> 8));
}

/* Mode 0 counts only once a count is written: the output stays low. */
void pit_stop(void)
{
    outb(PIT_CONTROL, PIT_ONE_SHOT);
}
