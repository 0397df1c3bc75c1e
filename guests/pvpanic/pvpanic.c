/* SPDX-License-Identifier: Apache-2.0 */
/* Tells the host that the guest panicked (QEMU docs/specs/pvpanic.rst). "port=N", else 0x505. "event=N",
 * else 1. */
#include "guest.h"

void guest_main(void)
{
    uint16_t port = (uint16_t)argument("port", 0x505);
    uint8_t event = (uint8_t)argument("event", 1);
    uint8_t supported = inb(port);
    CHECK(supported != 0xff); /* nothing there */
    CHECK_EQ(supported & event, event);
    print("panicking\n");
    outb(port, event);
    await_the_end();
    CHECK(!"reached: the panic went unheard");
}
