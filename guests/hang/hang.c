/* SPDX-License-Identifier: Apache-2.0 */
/* Halts with interrupts off: nothing but the host can end this. */
#include "guest.h"

void guest_main(void)
{
    print("hanging\n");
    halt_forever();
}
