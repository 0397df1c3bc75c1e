/* SPDX-License-Identifier: Apache-2.0 */
/* Exits with "value=N" of the command line: the host's status is (N << 1) | 1. "width=1|2|4": bytes of the
 * write. */
#include "guest.h"

void guest_main(void)
{
    uint32_t value = (uint32_t)argument_required("value");
    switch (argument("width", 4)) {
    case 1:
        outb(PORT_DEBUG_EXIT, (uint8_t)value);
        break;
    case 2:
        outw(PORT_DEBUG_EXIT, (uint16_t)value);
        break;
    default:
        outl(PORT_DEBUG_EXIT, value);
    }
    CHECK(!"reached: there is no debug exit");
}
