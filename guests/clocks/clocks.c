/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every CPU reads its TSC and its kvmclock in turn, without a pause: neither ever goes back, on one CPU or from one to
 * the next. For each byte that comes the first prints "time WALL RTC STABLE": seconds since 1970 by the wall clock (as
 * of the moment when the guest asked KVM for it, and kvmclock since then), the date and time of the RTC, and whether
 * KVM calls the kvmclock of all CPUs one. 'e' ends it, passed.
 *
 * Sources: Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_WALL_CLOCK_NEW and MSR_KVM_SYSTEM_TIME_NEW.
 */
#include "smp.h"

enum {
    MSR_WALL_CLOCK = 0x4b564d00,
    MSR_SYSTEM_TIME = 0x4b564d01,
    LEAF_KVM = 0x40000001,
    FEATURE_KVMCLOCK = 1 << 3,
    STABLE = 1 << 0,
    NS_PER_S = 1000000000,
};

static volatile struct {
    uint32_t version, padding;
    uint64_t tsc_timestamp, system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags, rest[2];
} pages[2] __attribute__((aligned(64)));

static volatile struct {
    uint32_t version, seconds, nanoseconds;
} wall __attribute__((aligned(16)));

static volatile uint64_t turn, others_ready; /* whose: the CPU's number */
static uint64_t last_tsc, last_ns;
static bool was_stable;

static uint64_t kvmclock(unsigned cpu, uint64_t *tsc, bool *stable)
{
    uint32_t version;
    unsigned __int128 ticks;
    uint64_t ns;
    do {
        version = pages[cpu].version;
        __asm__ volatile("lfence" ::: "memory");
        *tsc = rdtsc();
        ticks = *tsc - pages[cpu].tsc_timestamp;
        const int8_t shift = pages[cpu].tsc_shift;
        ticks = (uint64_t)(shift < 0 ? ticks >> -shift : ticks << shift);
        ns = pages[cpu].system_time + (uint64_t)((ticks * pages[cpu].tsc_to_system_mul) >> 32);
        *stable = pages[cpu].flags & STABLE;
        __asm__ volatile("lfence" ::: "memory");
    } while ((version & 1) || version != pages[cpu].version);
    return ns;
}

/* Linux does not let time go back either where KVM does not say that all pages agree. */
static void look(unsigned cpu)
{
    uint64_t tsc;
    bool stable;
    const uint64_t ns = kvmclock(cpu, &tsc, &stable);
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

static void use_clock(unsigned cpu)
{
    wrmsr(MSR_SYSTEM_TIME, (uintptr_t)&pages[cpu] | 1);
}

static void other_cpu(unsigned number, uint32_t apic_id)
{
    (void)apic_id;
    CHECK_EQ(number, 1);
    use_clock(number);
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
    const uint64_t ns = kvmclock(0, &tsc, &stable) + wall.nanoseconds;
    do {
        for (unsigned i = 0; i < sizeof(fields); i++)
            now[i] = decimal(fields[i]);
        for (unsigned i = 0; i < sizeof(fields); i++)
            again[i] = decimal(fields[i]);
    } while (memcmp(now, again, sizeof(now)));
    print("time %lu %02u%02u-%02u-%02uT%02u:%02u:%02u %u\n", (unsigned long)(wall.seconds + ns / NS_PER_S),
          now[0], now[1], now[2], now[3], now[4], now[5], now[6], stable);
}

static bool has_kvmclock(void)
{
    uint32_t eax = LEAF_KVM, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return eax & FEATURE_KVMCLOCK;
}

void guest_main(void)
{
    cpu_init();
    pic_init();
    lapic_init();
    CHECK(has_kvmclock());
    use_clock(0);
    wrmsr(MSR_WALL_CLOCK, (uintptr_t)&wall);
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
