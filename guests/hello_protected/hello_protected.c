/* SPDX-License-Identifier: Apache-2.0 */
/* 32-bit protected mode: flat segments, paging off. */
#include "cpu.h"
#include "guest.h"

void guest_main(void)
{
    CHECK_EQ(entry_cr0 & CR0_PE, CR0_PE);
    CHECK_EQ(entry_cr0 & CR0_PG, 0);
    CHECK_EQ(entry_eflags & 0x20300, 0); /* VM, IF, TF */
    print("Hello from protected mode\n");
}
