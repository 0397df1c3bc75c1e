/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program that a guest runs while its machine is rolled back, restored, cloned or moved: it keeps looking at its
 * clocks, which may never go backwards, and at its vector registers, which must hold what it put there across every
 * switch to another program. On SIGTERM it says what it saw, in one line.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <x86intrin.h>

enum { VECTORS = 16, VECTOR_SIZE = 32, CLOCKS = 4 };

static volatile sig_atomic_t ended;

static void end(int signal)
{
    (void)signal;
    ended = 1;
}

/* AVX that the processor has and the kernel saves: CPUID.1:ECX.OSXSAVE and .AVX, XCR0 bits 1 and 2 (SDM vol. 1, 14.3). */
static int has_avx(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (1u << 27 | 1u << 28)) != (1u << 27 | 1u << 28))
        return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6;
}

/* Load all vector registers, give the processor away `times` times, and store them: all in one, for nothing else to use. */
static void hold_vectors(const uint8_t *in, uint8_t *out, long times)
{
    __asm__ volatile(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
                     "vmovdqu 32*\\n(%[in]), %%ymm\\n\n\t"
                     ".endr\n"
                     "1: movl $24, %%eax\n\t" /* sched_yield */
                     "syscall\n\t"
                     "decq %[times]\n\t"
                     "jnz 1b\n\t"
                     ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
                     "vmovdqu %%ymm\\n, 32*\\n(%[out])\n\t"
                     ".endr\n\t"
                     "vzeroupper"
                     : [times] "+r"(times)
                     : [in] "r"(in), [out] "r"(out)
                     : "rax", "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",
                       "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

static int64_t clock_ns(clockid_t id)
{
    struct timespec now;
    clock_gettime(id, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

int main(void)
{
    static uint8_t in[VECTORS * VECTOR_SIZE], out[sizeof(in)];
    static const clockid_t clocks[CLOCKS - 1] = {CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME};
    int64_t last[CLOCKS] = {0};
    const int avx = has_avx();
    long rounds = 0, backwards = 0, wrong = 0;
    signal(SIGTERM, end);
    while (!ended) {
        for (size_t i = 0; i < sizeof(in); i++)
            in[i] = (uint8_t)(rounds * 31 + i * 7);
        if (avx) {
            hold_vectors(in, out, 50);
            wrong += memcmp(in, out, sizeof(in)) != 0;
        } else {
            sched_yield();
        }
        for (int i = 0; i < CLOCKS; i++) {
            int64_t now = i < CLOCKS - 1 ? clock_ns(clocks[i]) : (int64_t)__rdtsc();
            backwards += now < last[i];
            last[i] = now;
        }
        rounds++;
    }
    printf("avx %d rounds %d wrong %ld backwards %ld\n", avx, rounds > 0, wrong, backwards);
    return 0;
}
