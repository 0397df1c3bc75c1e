/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Instructions at CPL 0 that CPUID promises and a kernel may use, each for its result: what the kind of KVM
 * that emulates kernel code is likely not to know. Prints each by name before it runs; those CPUID denies are
 * left out.
 * What completion by the monitor cannot reach, because KVM's emulator does not fail, can be left out:
 *   counts=0   tzcnt and lzcnt: taken for the bsf and bsr they are encoded as on older processors
 *   movbe=0    movbe: #UD where KVM's own CPUID has none, though the guest's shows it
 */
#include "cpu.h"

enum { CR4_OSFXSR = 1 << 9, CR4_FSGSBASE = 1 << 16, CR4_OSXSAVE = 1 << 18 };
enum {
    ECX1_CX16 = 1 << 13,
    ECX1_SSE42 = 1 << 20,
    ECX1_MOVBE = 1 << 22,
    ECX1_POPCNT = 1 << 23,
    ECX1_XSAVE = 1 << 26
};
enum {
    ECX1_RDRAND = 1 << 30,
    EBX7_FSGSBASE = 1,
    EBX7_BMI1 = 1 << 3,
    EBX7_SMAP = 1 << 20,
    EBX7_CLFLUSHOPT = 1 << 23
};
enum { ECX81_LZCNT = 1 << 5 };

static uint32_t ecx1, ebx7, ecx81;

static void cpuid(uint32_t leaf, uint32_t *ebx, uint32_t *ecx)
{
    uint32_t eax = leaf, edx;
    *ecx = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(*ebx), "+c"(*ecx), "=d"(edx));
}

static bool has(const char *name, bool promised)
{
    print("%s%s", name, promised ? "\n" : ": not there\n");
    return promised;
}

static void integer(void)
{
    bool counts = argument("counts", 1);
    uint64_t result, memory = 0x1122334455667788;
    if (has("popcnt", ecx1 & ECX1_POPCNT)) {
        __asm__("popcntq %1, %0" : "=r"(result) : "r"(0xf0f0ull) : "cc");
        CHECK_EQ(result, 8);
        __asm__("popcntl %1, %k0" : "=r"(result) : "m"(memory) : "cc");
        CHECK_EQ(result, __builtin_popcount(0x55667788));
    }
    if (has("tzcnt", ebx7 & EBX7_BMI1 && counts)) {
        __asm__("tzcntq %1, %0" : "=r"(result) : "r"(0x100ull) : "cc");
        CHECK_EQ(result, 8);
        __asm__("tzcntq %1, %0" : "=r"(result) : "r"(0ull) : "cc"); /* where bsf leaves it undefined */
        CHECK_EQ(result, 64);
    }
    if (has("lzcnt", ecx81 & ECX81_LZCNT && counts)) {
        __asm__("lzcntl %1, %k0" : "=r"(result) : "r"(0x100) : "cc");
        CHECK_EQ(result, 23);
    }
    if (has("movbe", ecx1 & ECX1_MOVBE && argument("movbe", 1))) {
        __asm__("movbeq %1, %0" : "=r"(result) : "m"(memory));
        CHECK_EQ(result, 0x8877665544332211);
        __asm__("movbel %k1, %0" : "+m"(memory) : "r"(0xaabbccddull));
        CHECK_EQ(memory, 0x11223344ddccbbaa);
    }
    if (has("crc32", ecx1 & ECX1_SSE42)) {
        result = 0xffffffff;
        for (const char *c = "123456789"; *c; c++)
            __asm__("crc32b %1, %k0" : "+r"(result) : "r"(*c));
        CHECK_EQ(result ^ 0xffffffff, 0xe3069283); /* CRC-32C's check value */
    }
    if (has("cmpxchg16b", ecx1 & ECX1_CX16)) {
        static uint64_t pair[2] __attribute__((aligned(16))) = {1, 2};
        uint64_t low = 1, high = 2;
        bool equal;
        __asm__("lock cmpxchg16b %1"
                : "=@ccz"(equal), "+m"(pair), "+a"(low), "+d"(high)
                : "b"(3ull), "c"(4ull));
        CHECK(equal && pair[0] == 3 && pair[1] == 4);
        __asm__("lock cmpxchg16b %1"
                : "=@ccz"(equal), "+m"(pair), "+a"(low), "+d"(high)
                : "b"(5ull), "c"(6ull));
        CHECK(!equal && low == 3 && high == 4 && pair[0] == 3);
    }
    if (has("rdrand", ecx1 & ECX1_RDRAND)) {
        uint64_t other;
        bool carry = false;
        for (int i = 0; i < 10 && !carry; i++)
            __asm__ volatile("rdrand %1" : "=@ccc"(carry), "=r"(result));
        CHECK(carry);
        __asm__ volatile("rdrand %0" : "=r"(other)::"cc");
        CHECK(result != other);
    }
}

static void system(void)
{
    if (has("fsgsbase", ebx7 & EBX7_FSGSBASE)) {
        uint64_t base;
        write_cr4(read_cr4() | CR4_FSGSBASE);
        __asm__ volatile("wrgsbase %1; rdgsbase %0" : "=r"(base) : "r"(0x123456789aull));
        CHECK_EQ(base, 0x123456789a);
        CHECK_EQ(rdmsr(0xc0000101), base);
    }
    if (has("stac and clac", ebx7 & EBX7_SMAP)) {
        uint64_t with, without;
        __asm__ volatile("stac; pushfq; pop %0; clac; pushfq; pop %1"
                         : "=r"(with), "=r"(without)::"memory", "cc");
        CHECK_EQ(with & RFLAGS_AC, RFLAGS_AC);
        CHECK_EQ(without & RFLAGS_AC, 0);
    }
    if (has("clflushopt", ebx7 & EBX7_CLFLUSHOPT))
        __asm__ volatile("clflushopt %0" : "+m"(ecx1));
    if (has("xgetbv", ecx1 & ECX1_XSAVE)) {
        uint32_t low, high;
        write_cr4(read_cr4() | CR4_OSXSAVE);
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        CHECK_EQ(low & 1, 1); /* the x87 is always on */
        CHECK_EQ(high, 0);
    }
    has("fninit, fwait, fnstcw", true);
    uint16_t control = 0;
    __asm__ volatile("fninit; fwait; fnstcw %0" : "=m"(control));
    CHECK_EQ(control, 0x37f);
    has("ldmxcsr and stmxcsr", true);
    uint32_t mxcsr = 0x1f80, stored = 0;
    write_cr4(read_cr4() | CR4_OSFXSR);
    __asm__ volatile("ldmxcsr %1; stmxcsr %0" : "=m"(stored) : "m"(mxcsr));
    CHECK_EQ(stored, mxcsr);
}

void guest_main(void)
{
    uint32_t unused;
    cpu_init();
    cpuid(1, &unused, &ecx1);
    cpuid(7, &ebx7, &unused);
    cpuid(0x80000001, &unused, &ecx81);
    integer();
    system();
}
