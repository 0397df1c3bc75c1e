/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Interrupts from the PIT through the PICs and through the I/O APIC, and from the local APIC's timer. With
 * "gsi=N pulses=M" also M edges from the host on that I/O APIC pin: the guest prints "armed" when it is ready
 * for the first and "." for each that arrived.
 */
#include "acpi.h"
#include "interrupts.h"

enum { VECTOR_PIT = VECTOR_FREE, VECTOR_TIMER, VECTOR_HOST, TICKS = 3, PIT_DIVISOR = PIT_HZ / 100 };

static volatile unsigned pic_ticks, pit_ticks, timer_ticks, host_pulses;

static void on_pic(struct trap_frame *frame)
{
    (void)frame;
    pic_ticks++;
    pic_eoi(0);
}

static void on_local(struct trap_frame *frame)
{
    volatile unsigned *counts[] = {&pit_ticks, &timer_ticks, &host_pulses};
    ++*counts[frame->vector - VECTOR_PIT];
    lapic_write(LAPIC_EOI, 0);
}

void guest_main(void)
{
    cpu_init();
    trap_handlers[VECTOR_PIC] = on_pic;
    for (unsigned vector = VECTOR_PIT; vector <= VECTOR_HOST; vector++)
        trap_handlers[vector] = on_local;

    pic_init();
    pic_unmask(0);
    pit_start(PIT_DIVISOR);
    while (pic_ticks < TICKS)
        wait_for_interrupt();
    pic_mask(0);
    print("pit by pic\n");

    lapic_init();
    CHECK_EQ(lapic_read(LAPIC_VERSION) & 0xf0, 0x10);
    CHECK(ioapic_pins() >= 24);
    /* A tick that the PIC took before the mask may still be delivered; not more. */
    unsigned before = pic_ticks;
    unsigned pin = acpi_table("APIC") ? isa_irq_pin(0) : 0;
    ioapic_route(pin, VECTOR_PIT, 0);
    while (pit_ticks < TICKS)
        wait_for_interrupt();
    ioapic_mask(pin);
    pit_stop();
    CHECK(pic_ticks <= before + 1);
    print("pit by i/o apic pin %u\n", pin);

    lapic_write(LAPIC_TIMER_DIVIDE, 3); /* by 16 */
    lapic_write(LAPIC_LVT_TIMER, VECTOR_TIMER);
    lapic_write(LAPIC_TIMER_INITIAL, 10000);
    while (timer_ticks < 1)
        wait_for_interrupt();
    CHECK_EQ(lapic_read(LAPIC_TIMER_CURRENT), 0);
    lapic_write(LAPIC_LVT_TIMER, VECTOR_TIMER | LAPIC_TIMER_PERIODIC);
    lapic_write(LAPIC_TIMER_INITIAL, 200000);
    while (timer_ticks < 1 + TICKS)
        wait_for_interrupt();
    lapic_write(LAPIC_LVT_TIMER, LAPIC_MASKED);
    print("local apic timer\n");

    unsigned pulses = (unsigned)argument("pulses", 0);
    if (!pulses)
        return;
    ioapic_route((unsigned)argument_required("gsi"), VECTOR_HOST, 0);
    print("armed");
    for (unsigned seen = 0; seen < pulses; seen++) {
        while (host_pulses == seen)
            wait_for_interrupt();
        CHECK_EQ(host_pulses, seen + 1);
        print(".");
    }
    print("\n");
}
