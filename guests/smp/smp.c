/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every CPU of the MADT: brought up with INIT and SIPI, counting together with locked adds, and answering an
 * interrupt from the first with one to it. "cpus=N" on the command line: how many there should be.
 */
#include "smp.h"

enum { VECTOR_PING = VECTOR_FREE, VECTOR_PONG, ROUNDS = 200, PINGS = 3 };

static volatile uint64_t counter, ready, pongs;
static volatile uint8_t apic_ids[CPUS_MAX];

static void on_ping(struct trap_frame *frame)
{
    (void)frame;
    lapic_write(LAPIC_EOI, 0);
    lapic_send(apic_ids[0], VECTOR_PONG);
}

static void on_pong(struct trap_frame *frame)
{
    (void)frame;
    pongs++;
    lapic_write(LAPIC_EOI, 0);
}

static void count(void)
{
    for (unsigned i = 0; i < ROUNDS; i++)
        atomic_add(&counter, 1);
}

static void other_cpu(unsigned number, uint32_t apic_id)
{
    CHECK(number < CPUS_MAX);
    apic_ids[number] = (uint8_t)apic_id;
    count();
    atomic_add(&ready, 1);
    for (;;)
        wait_for_interrupt();
}

void guest_main(void)
{
    cpu_init();
    pic_init(); /* masked: a BIOS leaves it ticking, at vector 8 */
    lapic_init();
    trap_handlers[VECTOR_PING] = on_ping;
    trap_handlers[VECTOR_PONG] = on_pong;
    apic_ids[0] = (uint8_t)(lapic_read(LAPIC_ID) >> 24);

    unsigned others = smp_start(other_cpu);
    count();
    while (ready < others)
        __asm__ volatile("pause");
    CHECK_EQ(counter, (uint64_t)ROUNDS * (others + 1));

    for (unsigned i = 1; i <= others; i++)
        for (unsigned j = 0; j < i; j++)
            CHECK(apic_ids[i] != apic_ids[j]);

    for (unsigned i = 1; i <= others; i++)
        for (unsigned ping = 0; ping < PINGS; ping++) {
            uint64_t before = pongs;
            lapic_send(apic_ids[i], VECTOR_PING);
            while (pongs == before)
                wait_for_interrupt();
            CHECK_EQ(pongs, before + 1);
        }

    print("%u CPUs\n", others + 1);
    CHECK_EQ(others + 1, argument("cpus", others + 1));
}
