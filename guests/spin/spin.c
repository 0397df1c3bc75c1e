/* SPDX-License-Identifier: Apache-2.0 */
/* Never exits to the host: only a kick ends this. */
#include "guest.h"

void guest_main(void)
{
    print("spinning\n");
    for (;;)
        __asm__ volatile("");
}
