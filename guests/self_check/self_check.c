/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checks its own memory and clocks without a pause, at CPL 3, where the guest runs at full speed on every KVM. Whoever
 * stops it, copies it and lets it go on elsewhere, or goes back to a moment before, must not be noticed.
 *
 * Each page has a number of its own in every word, made of its place and of how often it was written; a round looks at
 * a page, and writes it for the next time. The clocks go forward, by no more than a pause may take, and agree.
 * It prints "round N" as it goes, and ends, passed, when a byte comes. Command line:
 *   pages=N     it writes (256)
 *   ballast=N   pages that are written once, and looked at one a round (0)
 *   rate=N      pages a second it writes, where there is a kvmclock; 0: as many as it can (0)
 *   jump=N      milliseconds that kvmclock may go forward between two looks at it (4000)
 *   tsc_jump=N  the same of the TSC (4000)
 */
#include "kvmclock.h"

enum {
    PAGE = 4096,
    WORDS = PAGE / sizeof(uint64_t),
    LOOK_EVERY = 64,
    CLOCKS_AGREE_NS = 1000000,
    UNSTABLE_NS = 1000000000,
    CATCH_UP_NS = 1000000
};
enum { PAGES_AT = 16 << 20 };

static kvmclock_page clock_page;

static bool has_clock;
static uint64_t pages, ballast, rate, jump_ns, tsc_jump_ns;
static uint64_t *const memory = (uint64_t *)PAGES_AT;

static uint64_t scaled(uint64_t ticks)
{
    return kvmclock_scaled(&clock_page, ticks);
}

/*
 * kvmclock may stand still while the guest does, the TSC only where KVM lets its value be set: so the first may fall
 * behind the second, and never get ahead of it. Where KVM's host does not trust its TSC, KVM corrects the first by
 * another clock whenever the guest is entered, and whoever reads it must not go back with it.
 */
static void check_clocks(void)
{
    static uint64_t last_tsc, last_ns;
    static bool was_stable;
    uint64_t tsc, ns = 0;
    bool stable = false;
    if (has_clock)
        ns = kvmclock_read(&clock_page, &tsc, &stable);
    else
        tsc = rdtsc();
    if (last_tsc) {
        CHECK(tsc >= last_tsc);
        CHECK(ns + (stable && was_stable ? 0 : UNSTABLE_NS) >= last_ns);
    }
    if (ns < last_ns)
        ns = last_ns;
    if (last_tsc && has_clock) {
        CHECK(ns - last_ns < jump_ns);
        CHECK(scaled(tsc - last_tsc) < tsc_jump_ns);
    }
    if (last_tsc && stable && was_stable)
        CHECK(ns - last_ns < scaled(tsc - last_tsc) + CLOCKS_AGREE_NS);
    last_tsc = tsc;
    last_ns = ns;
    was_stable = stable;
}

static uint64_t number(uint64_t page, uint64_t times)
{
    return (page + 1) * 0x9e3779b97f4a7c15ull ^ times * 0xc2b2ae3d27d4eb4full;
}

static void write_page(uint64_t page, uint64_t times)
{
    const uint64_t value = number(page, times);
    for (unsigned i = 0; i < WORDS; i++)
        memory[page * WORDS + i] = value;
}

static void check_page(uint64_t page, uint64_t times)
{
    const uint64_t value = number(page, times);
    for (unsigned i = 0; i < WORDS; i++)
        CHECK_EQ(memory[page * WORDS + i], value);
}

/* Wait until the next page is due. Who was kept from it for long does not make up for it. */
static void pace(void)
{
    static uint64_t due;
    if (!rate)
        return;
    uint64_t now = scaled(rdtsc());
    due += 1000000000 / rate;
    if (due + CATCH_UP_NS < now)
        due = now;
    while (now < due) {
        __asm__ volatile("pause");
        now = scaled(rdtsc());
    }
}

static bool told_to_end(void)
{
    return inb(PORT_SERIAL + 5) & 1;
}

static uint64_t run(uint64_t unused)
{
    (void)unused;
    for (uint64_t page = 0; page < pages; page++)
        write_page(page, 0);
    for (uint64_t page = 0; page < ballast; page++)
        write_page(pages + page, 0);
    print("round 0\n");
    for (uint64_t round = 0;; round++) {
        for (uint64_t page = 0; page < pages; page++) {
            check_page(page, round);
            write_page(page, round + 1);
            if (page % LOOK_EVERY == 0)
                check_clocks();
            pace();
        }
        if (ballast)
            check_page(pages + round % ballast, 0);
        if (((round + 1) & round) == 0 || round % 256 == 0) {
            print("round %lu\n", (unsigned long)(round + 1));
            if (told_to_end())
                break;
        } else if (round % 8 == 0 && told_to_end()) {
            break;
        }
    }
    return 0;
}

static bool find_clock(void)
{
    if (!kvmclock_offered())
        return false;
    kvmclock_use(&clock_page);
    return clock_page.tsc_to_system_mul != 0;
}

void guest_main(void)
{
    cpu_init();
    pages = argument("pages", 256);
    ballast = argument("ballast", 0);
    rate = argument("rate", 0);
    jump_ns = argument("jump", 4000) * 1000000ull;
    tsc_jump_ns = argument("tsc_jump", 4000) * 1000000ull;
    has_clock = find_clock();
    rate = has_clock ? rate : 0;
    print("clock %u\n", has_clock);
    enter_user_with_ports(run, 0);
}
