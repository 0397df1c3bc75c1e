/* SPDX-License-Identifier: Apache-2.0 */
/* Reset through the keyboard controller: pulse output line 0. Ends in a reset, not in a verdict. */
#include "guest.h"

void guest_main(void)
{
    enum { DATA = 0x60, STATUS = 0x64, COMMAND = 0x64, INPUT_FULL = 2, OUTPUT_FULL = 1 };

    CHECK(!(inb(STATUS) & INPUT_FULL)); /* all-ones: nothing there */
    for (int i = 0; (inb(STATUS) & OUTPUT_FULL) && i < 16; i++)
        inb(DATA);
    print("resetting\n");
    outb(COMMAND, 0xfe);
    await_the_end();
    CHECK(!"reached: the reset did not happen");
}
