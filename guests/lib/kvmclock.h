/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's clock page (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW). */
#ifndef GUEST_KVMCLOCK_H
#define GUEST_KVMCLOCK_H

#include "cpu.h"

enum {
    MSR_KVM_WALL_CLOCK = 0x4b564d00,
    MSR_KVM_SYSTEM_TIME = 0x4b564d01,
    LEAF_KVM = 0x40000001,
    FEATURE_KVMCLOCK = 1 << 3,
    KVMCLOCK_STABLE = 1 << 0, /* flags: KVM says that the pages of all CPUs agree */
};

typedef volatile struct kvmclock_page {
    uint32_t version, padding;
    uint64_t tsc_timestamp, system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags, rest[2];
} __attribute__((aligned(64))) kvmclock_page;
_Static_assert(sizeof(kvmclock_page) == 64 && offsetof(kvmclock_page, flags) == 29,
               "as KVM has it, and alone in its line");

static inline bool kvmclock_offered(void)
{
    uint32_t eax = LEAF_KVM, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return eax & FEATURE_KVMCLOCK;
}

/* From now on KVM keeps the page of this CPU. */
static inline void kvmclock_use(kvmclock_page *page)
{
    wrmsr(MSR_KVM_SYSTEM_TIME, (uintptr_t)page | 1);
}

/* Nanoseconds that so many ticks of the TSC take. */
static inline uint64_t kvmclock_scaled(const kvmclock_page *page, uint64_t ticks)
{
    const int8_t shift = page->tsc_shift;
    ticks = shift < 0 ? ticks >> -shift : ticks << shift;
    return (uint64_t)(((unsigned __int128)ticks * page->tsc_to_system_mul) >> 32);
}

/* Nanoseconds of the clock, and the ticks of the TSC at the same moment; and whether the page is stable. */
static inline uint64_t kvmclock_read(const kvmclock_page *page, uint64_t *tsc, bool *stable)
{
    uint32_t version;
    uint64_t ns;
    do {
        version = page->version;
        __asm__ volatile("lfence" ::: "memory");
        *tsc = rdtsc();
        ns = page->system_time + kvmclock_scaled(page, *tsc - page->tsc_timestamp);
        *stable = page->flags & KVMCLOCK_STABLE;
        __asm__ volatile("lfence" ::: "memory");
    } while ((version & 1) || version != page->version);
    return ns;
}

#endif
