/* SPDX-License-Identifier: Apache-2.0 */
/* The PVH boot ABI (Xen docs/misc/pvh.pandoc). "modules=N" on the command line: how many to expect. */
#include "cpu.h"
#include "guest.h"

void guest_main(void)
{
    CHECK_EQ(entry_width, 32);
    CHECK_EQ(boot_info()->protocol, BOOT_PVH);
    CHECK_EQ(entry_cr0 & CR0_PE, CR0_PE);
    CHECK_EQ(entry_cr0 & CR0_PG, 0);
    CHECK_EQ(entry_cr4, 0);
    CHECK_EQ(entry_eflags & 0x20300, 0); /* VM, IF, TF */

    const uint32_t *raw = (const uint32_t *)entry_rbx;
    CHECK(raw[1] >= 1); /* version 1 has the memory map */

    const struct boot_info *info = boot_info();
    CHECK(info->ranges > 0);
    uint64_t end = 0;
    for (uint32_t i = 0; i < info->ranges; i++) {
        const struct memory_range *range = &info->range[i];
        print("memory %016lx + %016lx type %u\n", range->base, range->size, range->type);
        CHECK(range->size != 0);
        CHECK(range->base >= end);
        end = range->base + range->size;
        CHECK(end > range->base);
    }
    print("command line: %s\n", info->command_line);
    print("rsdp: %lx\n", info->rsdp);
    if (info->rsdp)
        CHECK(!memcmp((const void *)info->rsdp, "RSD PTR ", 8));

    CHECK_EQ(info->modules, argument("modules", 0));
    for (uint32_t i = 0; i < info->modules; i++) {
        const struct module *module = &info->module[i];
        uint32_t sum = 0;
        for (uint64_t j = 0; j < module->size; j++)
            sum += ((const uint8_t *)module->base)[j];
        print("module %u: size %lu sum %u text %s\n", i, module->size, sum, module->text);
    }
}
