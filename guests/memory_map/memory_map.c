/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory map the loader gave is the memory there is: the RAM ranges' ends and each 64 MiB between hold
 * what is written there and nothing else's, also above 4 GiB. "mem=BYTES": what the RAM ranges sum to, give
 * or take the legacy hole below 1 MiB; "beyond=1": what follows the last RAM below 4 GiB reads as ones.
 */
#include "cpu.h"

enum { STEP = 64 << 20, PROBES_MAX = 4096 };

extern char image_end[];

static uint64_t probes[PROBES_MAX];
static unsigned count;

static void probe(uint64_t gpa)
{
    CHECK(count < PROBES_MAX);
    probes[count++] = gpa;
    *(volatile uint64_t *)physical_window(gpa) = gpa ^ 0x5aa5a55a5aa5a55a;
}

void guest_main(void)
{
    cpu_init();
    const struct boot_info *info = boot_info();
    uint64_t sum = 0, low_end = 0;

    CHECK(info->ranges > 0);
    for (uint32_t i = 0; i < info->ranges; i++) {
        const struct memory_range *range = &info->range[i];
        uint64_t end = range->base + range->size;
        print("memory %016lx + %016lx type %u\n", range->base, range->size, range->type);
        CHECK(end > range->base);
        for (uint32_t j = 0; j < i; j++)
            CHECK(end <= info->range[j].base || range->base >= info->range[j].base + info->range[j].size);
        if (range->type != MEMORY_RAM)
            continue;
        sum += range->size;
        if (end <= 1ull << 32 && end > low_end)
            low_end = end;
        /* The guest's own image, and below it what the loader left for it, stay as they are. */
        uint64_t start = ((uint64_t)image_end + 4095) & ~4095ull;
        if (end <= start)
            continue;
        for (uint64_t at = range->base < start ? start : range->base; at < end - 8; at += STEP)
            probe(at);
        probe(end - 8);
    }
    CHECK(count > 1);
    for (unsigned i = 0; i < count; i++)
        CHECK_EQ(*(volatile uint64_t *)physical_window(probes[i]), probes[i] ^ 0x5aa5a55a5aa5a55a);

    print("%lu KiB of RAM, %u places touched\n", sum / 1024, count);
    uint64_t promised = argument("mem", 0);
    if (promised)
        CHECK(sum <= promised && sum + (1 << 20) > promised);
    if (argument("beyond", 0))
        CHECK_EQ(*(volatile uint32_t *)physical_window(low_end), 0xffffffff);
}
