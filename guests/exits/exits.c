/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exits by the thousand, for measuring them. Command line:
 *   pio=N     N one-byte writes to "port=P" (0x80)
 *   mmio=N    N four-byte reads of "addr=A" (0xd0000000)
 *   cpl=3     the loops run at CPL 3 rather than at CPL 0
 * Prints "go" before and the ticks of the time-stamp counter a turn took after, then passes.
 */
#include "cpu.h"

static uint16_t port;
static uint64_t address;

/* Two instructions a turn: where they are emulated, they are all the guest adds to an exit. */
static uint64_t write_port(uint64_t n)
{
    __asm__ volatile("1: outb %%al, %%dx; dec %0; jnz 1b" : "+r"(n) : "a"(0), "d"(port) : "memory", "cc");
    return 0;
}

static uint64_t read_mmio(uint64_t n)
{
    __asm__ volatile("1: mov (%1), %%eax; dec %0; jnz 1b" : "+r"(n) : "r"(address) : "rax", "memory", "cc");
    return 0;
}

static void measure(const char *name, uint64_t (*loop)(uint64_t), uint64_t n, bool user)
{
    if (!n)
        return;
    print("go\n");
    uint64_t start = rdtsc();
    if (user)
        enter_user_with_ports(loop, n);
    else
        loop(n);
    print("%s: %lu ticks\n", name, (rdtsc() - start) / n);
}

void guest_main(void)
{
    cpu_init();
    bool user = argument("cpl", 0) == 3;
    port = (uint16_t)argument("port", PORT_POST);
    address = argument("addr", 0xd0000000);
    measure("pio", write_port, argument("pio", 0), user);
    measure("mmio", read_mmio, argument("mmio", 0), user);
}
