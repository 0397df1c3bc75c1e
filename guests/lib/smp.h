/* SPDX-License-Identifier: Apache-2.0 */
/* The other CPUs. */
#ifndef GUEST_SMP_H
#define GUEST_SMP_H

#include "interrupts.h"

enum { CPUS_MAX = 64 };

/*
 * Start every other enabled CPU of the MADT with INIT and SIPI. Each runs function(its number from 1, its
 * APIC id) in long mode on a stack of its own with the IDT loaded, its local APIC enabled and interrupts off;
 * when the function returns it halts. Needs cpu_init and lapic_init. Answers how many were sent for.
 */
unsigned smp_start(void (*function)(unsigned number, uint32_t apic_id));

static inline uint64_t atomic_add(volatile uint64_t *to, uint64_t value)
{
    __asm__ volatile("lock xaddq %0, %1" : "+r"(value), "+m"(*to)::"memory");
    return value;
}

#endif
