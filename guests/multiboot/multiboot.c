/* SPDX-License-Identifier: Apache-2.0 */
/* What multiboot 0.6.96, 3.2 and 3.3 promise a kernel. "modules=N" on the command line: how many to expect. */
#include "cpu.h"
#include "guest.h"

void guest_main(void)
{
    CHECK_EQ(entry_eax, 0x2badb002);
    CHECK_EQ(entry_cr0 & CR0_PE, CR0_PE);
    CHECK_EQ(entry_cr0 & CR0_PG, 0);
    CHECK_EQ(entry_eflags & 0x20200, 0); /* VM, IF */

    const uint32_t *raw = (const uint32_t *)(uintptr_t)entry_rbx;
    CHECK_EQ(raw[0] & 0x41, 0x41); /* mem_lower and mem_upper; memory map */
    CHECK(raw[1] <= 640 && raw[1] >= 256);
    CHECK(raw[2] >= 1024);

    const struct boot_info *info = boot_info();
    bool upper_found = false;
    for (uint32_t i = 0; i < info->ranges; i++) {
        const struct memory_range *range = &info->range[i];
        print("memory %08lx%08lx + %08lx%08lx type %u\n", (unsigned long)(range->base >> 32),
              (unsigned long)range->base, (unsigned long)(range->size >> 32), (unsigned long)range->size,
              range->type);
        CHECK(range->size != 0);
        /* mem_upper is the first hole's distance from 1 MiB (3.3), give or take what the loader keeps for
         * itself. */
        if (range->type == MEMORY_RAM && range->base == 0x100000)
            upper_found = range->size / 1024 <= raw[2] + 1024u && raw[2] <= range->size / 1024 + 1024u;
    }
    CHECK(upper_found);

    CHECK(info->command_line[0]);
    print("command line: %s\n", info->command_line);
    CHECK_EQ(info->modules, argument("modules", 0));
    for (uint32_t i = 0; i < info->modules; i++) {
        const struct module *module = &info->module[i];
        CHECK_EQ(module->base & 0xfff, 0); /* the header asked for it */
        CHECK(module->base >= 0x100000);
        uint32_t sum = 0;
        for (uint32_t j = 0; j < module->size; j++)
            sum += ((const uint8_t *)(uintptr_t)module->base)[j];
        print("module %u: size %lu sum %u text %s\n", i, (unsigned long)module->size, sum, module->text);
    }
}
