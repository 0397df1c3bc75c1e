/* SPDX-License-Identifier: Apache-2.0 */
/* Three loaders' structures, read into one. */
#include "guest.h"

static struct boot_info info;

/* Low memory may be reused by the guest (smp.c's trampoline): strings are kept here. */
static char strings[8192];
static size_t strings_used;

static const char *keep_string(uint64_t address)
{
    if (!address)
        return "";
    const char *from = (const char *)(uintptr_t)address;
    size_t n = strlen(from) + 1;
    REQUIRE(EXIT_BOOT_INFO, n <= sizeof strings - strings_used);
    char *to = memcpy(strings + strings_used, from, n);
    strings_used += n;
    return to;
}

static void add_range(uint64_t base, uint64_t size, uint32_t type)
{
    REQUIRE(EXIT_BOOT_INFO, info.ranges < MEMORY_RANGES_MAX);
    info.range[info.ranges++] = (struct memory_range){base, size, type};
}

static void add_module(uint64_t base, uint64_t size, uint64_t text)
{
    REQUIRE(EXIT_BOOT_INFO, info.modules < MODULES_MAX);
    info.module[info.modules++] = (struct module){base, size, keep_string(text)};
}

/* Xen public headers, hvm/start_info.h */
struct pvh_start_info {
    uint32_t magic, version, flags, modules;
    uint64_t module_list, command_line, rsdp, memory_map;
    uint32_t memory_map_entries, reserved;
};
struct pvh_module {
    uint64_t base, size, command_line, reserved;
};
struct pvh_range {
    uint64_t base, size;
    uint32_t type, reserved;
};

static bool is_pvh(void)
{
    return entry_rbx && entry_rbx < 1ull << 32 && entry_rbx % 4 == 0 &&
           *(const uint32_t *)(uintptr_t)entry_rbx == 0x336ec578;
}

static void read_pvh(void)
{
    const struct pvh_start_info *start = (const void *)(uintptr_t)entry_rbx;
    info.protocol = BOOT_PVH;
    info.command_line = keep_string(start->command_line);
    info.rsdp = start->rsdp;
    const struct pvh_module *module = (const void *)(uintptr_t)start->module_list;
    for (uint32_t i = 0; i < start->modules; i++)
        add_module(module[i].base, module[i].size, module[i].command_line);
    const struct pvh_range *range = (const void *)(uintptr_t)start->memory_map;
    for (uint32_t i = 0; start->version >= 1 && i < start->memory_map_entries; i++)
        add_range(range[i].base, range[i].size, range[i].type);
}

#ifndef __x86_64__

/* Multiboot 0.6.96, 3.3. A map entry's size field does not count itself. */
struct multiboot_info {
    uint32_t flags, memory_lower, memory_upper, boot_device, command_line, modules, module_list, symbols[4];
    uint32_t memory_map_length, memory_map;
};
struct multiboot_module {
    uint32_t start, end, text, reserved;
};
struct multiboot_range {
    uint32_t size;
    uint64_t base, length;
    uint32_t type;
} __attribute__((packed));

enum { MULTIBOOT_MAGIC = 0x2badb002 };
enum { MULTIBOOT_COMMAND_LINE = 1 << 2, MULTIBOOT_MODULES = 1 << 3, MULTIBOOT_MEMORY_MAP = 1 << 6 };

static void read_multiboot(void)
{
    const struct multiboot_info *start = (const void *)(uintptr_t)entry_rbx;
    info.protocol = BOOT_MULTIBOOT;
    if (start->flags & MULTIBOOT_COMMAND_LINE)
        info.command_line = keep_string(start->command_line);
    const struct multiboot_module *module = (const void *)(uintptr_t)start->module_list;
    for (uint32_t i = 0; (start->flags & MULTIBOOT_MODULES) && i < start->modules; i++)
        add_module(module[i].start, module[i].end - module[i].start, module[i].text);
    if (!(start->flags & MULTIBOOT_MEMORY_MAP))
        return;
    uint32_t at = start->memory_map, end = at + start->memory_map_length;
    while (at < end) {
        const struct multiboot_range *range = (const void *)(uintptr_t)at;
        add_range(range->base, range->length, range->type);
        at += range->size + sizeof range->size;
    }
}

#else

/* Linux Documentation/arch/x86/zero-page.rst. A 64-bit entry without a zero page is legal: nothing was
 * passed. */
enum {
    ZERO_PAGE_RSDP = 0x70,
    ZERO_PAGE_RAMDISK_HIGH = 0xc0,
    ZERO_PAGE_E820_ENTRIES = 0x1e8,
    ZERO_PAGE_MAGIC = 0x202,
    ZERO_PAGE_RAMDISK = 0x218,
    ZERO_PAGE_COMMAND_LINE = 0x228,
    ZERO_PAGE_E820 = 0x2d0,
    E820_ENTRY_SIZE = 20,
    HDRS = 0x53726448,
};

#define FIELD(type, offset) (*(const type *)((uintptr_t)entry_rsi + (offset)))

static bool is_zero_page(void)
{
    return entry_rsi && entry_rsi < 1ull << 32 && entry_rsi % 16 == 0 &&
           FIELD(uint32_t, ZERO_PAGE_MAGIC) == HDRS;
}

static void read_zero_page(void)
{
    info.protocol = BOOT_LINUX;
    info.command_line = keep_string(FIELD(uint32_t, ZERO_PAGE_COMMAND_LINE));
    info.rsdp = FIELD(uint64_t, ZERO_PAGE_RSDP);
    uint64_t size =
        FIELD(uint32_t, ZERO_PAGE_RAMDISK + 4) | (uint64_t)FIELD(uint32_t, ZERO_PAGE_RAMDISK_HIGH + 4) << 32;
    if (size)
        add_module(FIELD(uint32_t, ZERO_PAGE_RAMDISK) | (uint64_t)FIELD(uint32_t, ZERO_PAGE_RAMDISK_HIGH)
                                                            << 32,
                   size, 0);
    for (unsigned i = 0; i < FIELD(uint8_t, ZERO_PAGE_E820_ENTRIES); i++) {
        unsigned at = ZERO_PAGE_E820 + i * E820_ENTRY_SIZE;
        add_range(FIELD(uint64_t, at), FIELD(uint64_t, at + 8), FIELD(uint32_t, at + 16));
    }
}

#endif

const struct boot_info *boot_info(void)
{
    static bool done;
    if (done)
        return &info;
    done = true;
    info.command_line = "";
#ifdef __x86_64__
    if (is_pvh())
        read_pvh();
    else if (is_zero_page())
        read_zero_page();
#else
    if (entry_eax == MULTIBOOT_MAGIC)
        read_multiboot();
    else if (is_pvh())
        read_pvh();
#endif
    return &info;
}

uint64_t parse_number(const char **text)
{
    const char *at = *text;
    uint64_t value = 0;
    unsigned base = 10;
    if (at[0] == '0' && at[1] == 'x') {
        base = 16;
        at += 2;
    }
    for (;; at++) {
        char c = *at | 0x20;
        if (c >= '0' && c <= '9')
            value = value * base + (uint64_t)(c - '0');
        else if (base == 16 && c >= 'a' && c <= 'f')
            value = value * base + (uint64_t)(c - 'a' + 10);
        else
            break;
    }
    *text = at;
    return value;
}

static bool parse_argument(const char *name, uint64_t *value)
{
    size_t n = strlen(name);
    const char *line = boot_info()->command_line;
    for (const char *at = line; *at; at++) {
        if ((at != line && at[-1] != ' ') || memcmp(at, name, n) || at[n] != '=')
            continue;
        at += n + 1;
        *value = parse_number(&at);
        return true;
    }
    return false;
}

uint64_t argument(const char *name, uint64_t otherwise)
{
    uint64_t value;
    return parse_argument(name, &value) ? value : otherwise;
}

uint64_t argument_required(const char *name)
{
    uint64_t value = 0;
    if (!parse_argument(name, &value))
        guest_fail(EXIT_ARGUMENT, "command line", 0, name);
    return value;
}
