/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory-mapped I/O: every width, string and read-modify-write instructions, accesses split at a page, and
 * unclaimed addresses. "addr=A": two pages of a device that remembers bytes (RAM will do, for a judgement of
 * this guest); "hole=A": an address nobody claims; "edge=1": nobody claims what follows the device either.
 */
#include "cpu.h"

enum { DEVICE_SIZE = 0x2000 };

static void widths(uintptr_t at)
{
    mmio_write64(at, 0x8877665544332211);
    CHECK_EQ(mmio_read64(at), 0x8877665544332211);
    CHECK_EQ(mmio_read32(at), 0x44332211);
    CHECK_EQ(mmio_read32(at + 4), 0x88776655);
    CHECK_EQ(mmio_read16(at + 2), 0x4433);
    CHECK_EQ(mmio_read8(at + 7), 0x88);
    mmio_write8(at + 1, 0xaa);
    mmio_write16(at + 2, 0xccbb);
    mmio_write32(at + 4, 0x00ffeedd);
    CHECK_EQ(mmio_read64(at), 0x00ffeeddccbbaa11);

    int64_t extended;
    __asm__ volatile("movsbq (%1), %0" : "=r"(extended) : "r"(at + 1) : "memory");
    CHECK_EQ(extended, (int8_t)0xaa);
    __asm__ volatile("movzwl (%1), %k0" : "=r"(extended) : "r"(at + 2) : "memory");
    CHECK_EQ(extended, 0xccbb);
}

static void unaligned(uintptr_t at)
{
    mmio_write64(at + 3, 0x0102030405060708); /* across an aligned eight */
    CHECK_EQ(mmio_read64(at + 3), 0x0102030405060708);
    CHECK_EQ(mmio_read8(at + 3), 0x08);
    CHECK_EQ(mmio_read8(at + 10), 0x01);
    mmio_write64(at + 0xffd, 0x1112131415161718); /* across the page: three bytes and five */
    CHECK_EQ(mmio_read64(at + 0xffd), 0x1112131415161718);
    CHECK_EQ(mmio_read8(at + 0xfff), 0x16);
    CHECK_EQ(mmio_read8(at + 0x1000), 0x15);
    mmio_write16(at + 0xfff, 0xbeef);
    CHECK_EQ(mmio_read8(at + 0xfff), 0xef);
    CHECK_EQ(mmio_read8(at + 0x1000), 0xbe);
}

static void read_modify_write(uintptr_t at)
{
    mmio_write32(at, 40);
    __asm__ volatile("addl $2, (%0)" ::"r"(at) : "memory", "cc");
    CHECK_EQ(mmio_read32(at), 42);
    __asm__ volatile("orb $0x80, 1(%0)" ::"r"(at) : "memory", "cc");
    CHECK_EQ(mmio_read32(at), 0x802a);
    uint32_t value = 7;
    __asm__ volatile("xchgl %0, (%1)" : "+r"(value) : "r"(at) : "memory");
    CHECK_EQ(value, 0x802a);
    __asm__ volatile("lock xaddl %0, (%1)" : "+r"(value) : "r"(at) : "memory", "cc");
    CHECK_EQ(value, 7);
    CHECK_EQ(mmio_read32(at), 7 + 0x802a);
}

static void strings(uintptr_t at)
{
    static const char text[] = "bytes through rep movs, to the device and back";
    char back[sizeof text];
    memcpy((void *)(at + 0x100), text, sizeof text);
    memcpy(back, (void *)(at + 0x100), sizeof text);
    CHECK(!memcmp(back, text, sizeof text));
    void *to = (void *)(at + 0x200);
    unsigned long n = 8;
    __asm__ volatile("rep stosl" : "+D"(to), "+c"(n) : "a"(0x5a5a5a5a) : "memory");
    CHECK_EQ(mmio_read32(at + 0x200 + 28), 0x5a5a5a5a);
}

void guest_main(void)
{
    cpu_init();
    uintptr_t at = argument("addr", 0), hole = argument("hole", 0);
    if (at) {
        widths(at);
        unaligned(at);
        read_modify_write(at);
        strings(at);
    }
    if (at && argument("edge", 0)) {
        mmio_write32(at + DEVICE_SIZE - 4, 0x12345678);
        CHECK_EQ(mmio_read64(at + DEVICE_SIZE - 4), 0xffffffff12345678);
        mmio_write64(at + DEVICE_SIZE - 2, 0x9988776655443322);
        CHECK_EQ(mmio_read32(at + DEVICE_SIZE - 4), 0x33225678);
    }
    if (hole) {
        CHECK_EQ(mmio_read8(hole), 0xff);
        CHECK_EQ(mmio_read16(hole), 0xffff);
        CHECK_EQ(mmio_read32(hole), 0xffffffff);
        CHECK_EQ(mmio_read64(hole), ~0ull);
        mmio_write32(hole, 0);
        CHECK_EQ(mmio_read32(hole), 0xffffffff);
    }
}
