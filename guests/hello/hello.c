/* SPDX-License-Identifier: Apache-2.0 */
/* The smallest long mode guest; its first byte of output is what start-up is measured by. */
#include "guest.h"

void guest_main(void)
{
    print("Hello from long mode\n");
}
