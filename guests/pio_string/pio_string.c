/* SPDX-License-Identifier: Apache-2.0 */
/*
 * String I/O: rep outs and rep ins of each width, both directions, no repetition at all, and across a page.
 * By default against the serial port; with "pci=1" the PCI address register at 0xcf8 too; with "port=P"
 * against a test device that takes what is written and answers reads with 0, 1, 2, ... in order, whatever the
 * width.
 */
#include "guest.h"

#define STRING_IO(name, instruction, direction)                                                              \
    static uintptr_t name(uint16_t port, void *at, size_t n)                                                 \
    {                                                                                                        \
        __asm__ volatile(instruction : "+" direction(at), "+c"(n) : "d"(port) : "memory", "cc");             \
        CHECK_EQ(n, 0);                                                                                      \
        return (uintptr_t)at;                                                                                \
    }

STRING_IO(outs8, "rep outsb", "S")
STRING_IO(outs16, "rep outsw", "S")
STRING_IO(outs32, "rep outsl", "S")
STRING_IO(ins8, "rep insb", "D")
STRING_IO(ins16, "rep insw", "D")
STRING_IO(ins32, "rep insl", "D")
STRING_IO(ins16_down, "std; rep insw; cld", "D")
STRING_IO(outs8_down, "std; rep outsb; cld", "S")

static uint8_t buffer[3 * 4096] __attribute__((aligned(4096)));

static void against_device(uint16_t port)
{
    static uint8_t bytes[] = {1, 2, 3, 4, 5};
    static uint16_t words[] = {0x1122, 0x3344, 0x5566};
    static uint32_t longs[] = {0x11223344, 0x55667788};
    CHECK_EQ(outs8(port, bytes, 5), (uintptr_t)(bytes + 5));
    CHECK_EQ(outs16(port, words, 3), (uintptr_t)(words + 3));
    CHECK_EQ(outs32(port, longs, 2), (uintptr_t)(longs + 2));
    CHECK_EQ(outs8(port, bytes, 0), (uintptr_t)bytes);
    CHECK_EQ(outs8_down(port, bytes + 4, 5), (uintptr_t)bytes - 1);

    uint32_t next = 0;
    CHECK_EQ(ins8(port, buffer, 100), (uintptr_t)(buffer + 100));
    for (unsigned i = 0; i < 100; i++)
        CHECK_EQ(buffer[i], (uint8_t)next++);
    uint16_t *in16 = (uint16_t *)(buffer + 4096 - 15); /* unaligned, and across the page */
    ins16(port, in16, 40);
    for (unsigned i = 0; i < 40; i++)
        CHECK_EQ(in16[i], next++);
    uint32_t *in32 = (uint32_t *)(buffer + 8192 - 6);
    ins32(port, in32, 1500 / 4);
    for (unsigned i = 0; i < 1500 / 4; i++)
        CHECK_EQ(in32[i], next++);
    in16 = (uint16_t *)buffer;
    CHECK_EQ(ins16_down(port, in16 + 9, 10), (uintptr_t)in16 - 2);
    for (unsigned i = 0; i < 10; i++)
        CHECK_EQ(in16[9 - i], next++);
    print("device read %u times\n", next);
}

void guest_main(void)
{
    static char text[] = "by rep outsb\n";
    outs8(PORT_SERIAL, text, sizeof text - 1);

    outb(PORT_SERIAL + 7, 0x3c); /* the scratch register */
    ins8(PORT_SERIAL + 7, buffer, 20);
    for (unsigned i = 0; i < 20; i++)
        CHECK_EQ(buffer[i], 0x3c);
    CHECK_EQ(buffer[20], 0);

    uint16_t port = (uint16_t)argument("port", 0);
    if (port)
        against_device(port);
    if (argument("pci", 0)) {
        static uint32_t address[] = {0x80000000, 0x80000800};
        outs32(0xcf8, address, 2);
        CHECK_EQ(inl(0xcf8), address[1]);
    }
}
