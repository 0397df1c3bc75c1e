/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every CPU reads its TSC and its kvmclock in turn, without a pause: neither ever goes back, on one CPU or from one to
 * the next. For each byte that comes the first prints "time WALL RTC STABLE": seconds since 1970 by the wall clock (as
 * of the moment when the guest asked KVM for it, and kvmclock since then), the date and time of the RTC, and whether
 * KVM calls the kvmclock of all CPUs one. 'e' ends it, passed.
 *
 * Sources: Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_WALL_CLOCK_NEW; kvmclock.h.
 */
#include "kvmclock.h"
#include "smp.h"

enum { NS_PER_S = 1000000000 };

static kvmclock_page pages[2];

static volatile struct {
    uint32_t version, seconds, nanoseconds;
} wall __attribute__((aligned(16)));

static volatile uint64_t turn, others_ready; /* whose: the CPU's number */
static uint64_t last_tsc, last_ns;
static bool was_stable;

/* Linux does not let time go back either where KVM does not say that all pages agree. */
static void look(unsigned cpu)
{
    uint64_t tsc;
    bool stable;
    const uint64_t ns = kvmclock_read(&pages[cpu], &tsc, &stable);
    CHECK(tsc >= last_tsc);
    if (stable && was_stable)
        CHECK(ns >= last_ns);
    last_tsc = tsc;
    last_ns = ns > last_ns ? ns : last_ns;
    was_stable = stable;
}

static void take_turns(unsigned cpu, unsigned cpus)
{
    if (turn != cpu)
        return;
    look(cpu);
    turn = (cpu + 1) % cpus;
}

static void other_cpu(unsigned number, uint32_t apic_id)
{
    (void)apic_id;
    CHECK_EQ(number, 1);
    kvmclock_use(&pages[number]);
    others_ready = 1;
    for (;;)
        take_turns(number, 2);
}

static uint8_t cmos(uint8_t index)
{
    outb(0x70, index);
    return inb(0x71);
}

static unsigned decimal(uint8_t index)
{
    const uint8_t raw = cmos(index);
    return (raw >> 4) * 10u + (raw & 0xf);
}

static void tell(void)
{
    static const uint8_t fields[] = {0x32, 9, 8, 7,
                                     4,    2, 0}; /* century, year, month, day, hour, minute, second */
    unsigned now[sizeof(fields)], again[sizeof(fields)];
    uint64_t tsc;
    bool stable;
    const uint64_t ns = kvmclock_read(&pages[0], &tsc, &stable) + wall.nanoseconds;
    do {
        for (unsigned i = 0; i < sizeof(fields); i++)
            now[i] = decimal(fields[i]);
        for (unsigned i = 0; i < sizeof(fields); i++)
            again[i] = decimal(fields[i]);
    } while (memcmp(now, again, sizeof(now)));
    print("time %lu %02u%02u-%02u-%02uT%02u:%02u:%02u %u\n", (unsigned long)(wall.seconds + ns / NS_PER_S),
          now[0], now[1], now[2], now[3], now[4], now[5], now[6], stable);
}

void guest_main(void)
{
    cpu_init();
    pic_init();
    lapic_init();
    CHECK(kvmclock_offered());
    kvmclock_use(&pages[0]);
    wrmsr(MSR_KVM_WALL_CLOCK, (uintptr_t)&wall);
    const unsigned cpus = smp_start(other_cpu) + 1;
    CHECK(cpus <= 2);
    while (cpus > 1 && !others_ready)
        __asm__ volatile("pause");
    print("%u CPUs\n", cpus);
    for (;;) {
        take_turns(0, cpus);
        if (!(inb(PORT_SERIAL + 5) & 1))
            continue;
        if (inb(PORT_SERIAL) == 'e')
            return;
        tell();
    }
}
