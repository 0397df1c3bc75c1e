/* SPDX-License-Identifier: Apache-2.0 */
/* MC146818 clock and CMOS memory at ports 0x70 and 0x71. Prints the date for the host to compare with its
 * own. */
#include "guest.h"

enum {
    SECONDS = 0,
    MINUTES = 2,
    HOURS = 4,
    DAY = 7,
    MONTH = 8,
    YEAR = 9,
    A = 10,
    B = 11,
    D = 13,
    CENTURY = 0x32
};
enum { A_UPDATING = 0x80, B_24H = 2, B_BINARY = 4, D_VALID = 0x80, PLAIN_MEMORY = 0x70 };

static uint8_t cmos(uint8_t index)
{
    outb(0x70, index);
    return inb(0x71);
}

static void cmos_write(uint8_t index, uint8_t value)
{
    outb(0x70, index);
    outb(0x71, value);
}

static bool binary;

static unsigned decimal(uint8_t index)
{
    uint8_t raw = cmos(index);
    if (!binary)
        CHECK((raw & 0xf) < 10 && raw >> 4 < 10);
    return binary ? raw : (raw >> 4) * 10u + (raw & 0xf);
}

void guest_main(void)
{
    CHECK(cmos(D) & D_VALID);
    CHECK_EQ(cmos(B) & B_24H, B_24H);
    binary = cmos(B) & B_BINARY;

    /* Between updates, and the same twice: the data sheet's way to a consistent reading. */
    unsigned now[6], again[6];
    static const uint8_t fields[6] = {YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS};
    unsigned tries = 0;
    do {
        CHECK(tries++ < 10);
        while (cmos(A) & A_UPDATING)
            ;
        for (unsigned i = 0; i < 6; i++)
            now[i] = decimal(fields[i]);
        for (unsigned i = 0; i < 6; i++)
            again[i] = decimal(fields[i]);
    } while (memcmp(now, again, sizeof now));

    CHECK(now[1] >= 1 && now[1] <= 12);
    CHECK(now[2] >= 1 && now[2] <= 31);
    CHECK(now[3] < 24 && now[4] < 60 && now[5] < 60);
    unsigned century = decimal(CENTURY);
    CHECK(century >= 20);
    print("%02u%02u-%02u-%02u %02u:%02u:%02u\n", century, now[0], now[1], now[2], now[3], now[4], now[5]);

    cmos_write(PLAIN_MEMORY, 0x5a);
    cmos_write(PLAIN_MEMORY + 1, 0xa5);
    CHECK_EQ(cmos(PLAIN_MEMORY), 0x5a);
    CHECK_EQ(cmos(PLAIN_MEMORY + 1), 0xa5);
    CHECK_EQ(cmos(PLAIN_MEMORY | 0x80), 0x5a); /* bit 7 is the NMI mask, not part of the index */
}
