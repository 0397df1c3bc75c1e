/* SPDX-License-Identifier: Apache-2.0 */
/* An exception without an IDT: #UD, then #GP while delivering it, then #DF, then shutdown. */
#include "guest.h"

void guest_main(void)
{
    static const struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) empty;

    print("triple fault\n");
    __asm__ volatile("lidt %0; ud2" ::"m"(empty));
    CHECK(!"reached: the exception was ignored");
}
