/* SPDX-License-Identifier: Apache-2.0 */
/* Power-on self-test codes: a known sequence on port 0x80. */
#include "guest.h"

void guest_main(void)
{
    static const uint8_t codes[] = {0x01, 0x10, 0x7f, 0x80, 0xff, 0x00, 0xaa};
    for (unsigned i = 0; i < sizeof codes; i++)
        outb(PORT_POST, codes[i]);
}
