/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a bare-metal guest stands on: ports and memory, a serial line, checks that report to the host, and
 * what the boot loader said. cpu.h, interrupts.h, acpi.h and smp.h add the rest (long mode only).
 *
 * How a guest reports
 *   Text goes to the serial port at 0x3f8. The verdict is a 32-bit write to isa-debug-exit at port 0xf4; as
 * under QEMU the host's exit status for value v is (v << 1) | 1.
 *
 *       value       status   meaning
 *       0x10            33   passed: guest_main() returned; the last line is "PASS"
 *       0x11 + n   35 + 2n   CHECK number n of the guest, counted from 0 in source order, failed; the last line
 *                            is "FAIL file:line: expression"
 *       0x01 .. 0x0f         the library gave up (enum guest_exit); the last line is "FAIL ..." too
 *
 *   Where there is no such port the guest halts with interrupts off.
 *
 * How a guest starts
 *   long        ELF64 at 1 MiB. Its entry point wants 64-bit mode with the first 4 GiB identity mapped, and
 * looks for an hvm_start_info at rbx, then for a Linux zero page at rsi; its PVH note names a 32-bit entry.
 *               guest_main() has a 16 KiB stack, interrupts off, and after cpu_init() its own tables.
 *   protected   ELF32 at 1 MiB, flat 32-bit segments, paging off; the PVH note's entry is the ELF's.
 *   real        a flat binary without assumptions about its address, see hello_real.
 */
#ifndef GUEST_H
#define GUEST_H

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#endif

#define PORT_POST 0x80
#define PORT_DEBUG_EXIT 0xf4
#define PORT_SERIAL 0x3f8

#ifndef __ASSEMBLER__

enum guest_exit {
    EXIT_EXCEPTION = 0x01, /* an exception nobody expected */
    EXIT_BOOT_INFO = 0x02, /* the loader's structures are missing or wrong */
    EXIT_ACPI = 0x03,      /* an ACPI table is missing or its checksum is wrong */
    EXIT_ARGUMENT = 0x04,  /* the command line lacks a value this guest needs */
    EXIT_DEVICE = 0x05,    /* a device is missing, or is not what its specification says */
    EXIT_PASS = 0x10,
    EXIT_CHECK = 0x11, /* + the check's number */
};

/* ---- verdicts ---- */

/* Not an expression: each use is one numbered check. */
#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        enum { check_number = __COUNTER__ };                                                                 \
        _Static_assert(check_number < 0x80 - EXIT_CHECK, "exit statuses have room for 111 checks");          \
        if (!(condition))                                                                                    \
            guest_fail(EXIT_CHECK + check_number, __FILE__, __LINE__, #condition);                           \
    } while (0)

/* Same, and the report shows both values. */
#define CHECK_EQ(left, right)                                                                                \
    do {                                                                                                     \
        enum { check_number = __COUNTER__ };                                                                 \
        _Static_assert(check_number < 0x80 - EXIT_CHECK, "exit statuses have room for 111 checks");          \
        unsigned long left_value = (unsigned long)(left), right_value = (unsigned long)(right);              \
        if (left_value != right_value)                                                                       \
            guest_fail_eq(EXIT_CHECK + check_number, __FILE__, __LINE__, #left " == " #right, left_value,    \
                          right_value);                                                                      \
    } while (0)

/* For the library, whose checks have fixed values. */
#define REQUIRE(value, condition)                                                                            \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            guest_fail(value, __FILE__, __LINE__, #condition);                                               \
    } while (0)

/* What every guest defines. Returning is passing. */
void guest_main(void);

_Noreturn void guest_exit(uint32_t value);
_Noreturn void guest_pass(void);
_Noreturn void guest_fail(uint32_t value, const char *file, int line, const char *expression);
_Noreturn void guest_fail_eq(uint32_t value, const char *file, int line, const char *expression,
                             unsigned long left, unsigned long right);
_Noreturn void halt_forever(void);
/* Return only after about a second: a power-off or reset may take effect some time after it was asked for. */
void await_the_end(void);

/* ---- serial line, polled ---- */

void serial_putc(char c);
int serial_getc(void); /* waits */
/* %c %s %d %u %x %lu %lx %% and a zero-padded width. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);

/* ---- what the loader said ---- */

enum boot_protocol { BOOT_NOTHING, BOOT_PVH, BOOT_MULTIBOOT, BOOT_LINUX };
enum { MEMORY_RAM = 1, MEMORY_RANGES_MAX = 64, MODULES_MAX = 8 };

struct memory_range {
    uint64_t base, size;
    uint32_t type; /* e820's */
};

struct module {
    uint64_t base, size;
    const char *text; /* its command line or "" */
};

struct boot_info {
    enum boot_protocol protocol; /* whose structure was found */
    const char *command_line;
    uint64_t rsdp; /* 0: not told */
    uint32_t ranges, modules;
    struct memory_range range[MEMORY_RANGES_MAX];
    struct module module[MODULES_MAX];
};

/* How the guest was entered; the last three at the 32-bit entry points only. */
extern uint64_t entry_rbx, entry_rsi;
extern uint32_t entry_eax, entry_width;
extern uint32_t entry_cr0, entry_cr4, entry_eflags;

/* Read (and copied out of low memory) on the first call. */
const struct boot_info *boot_info(void);

/* "name=number" (decimal or 0x...) from the command line, else the default. */
uint64_t argument(const char *name, uint64_t otherwise);
/* The same, but the guest cannot do without. */
uint64_t argument_required(const char *name);
/* A number at *text, decimal or 0x..., behind which *text is left. */
uint64_t parse_number(const char **text);

/* ---- strings the compiler may call for ---- */

void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int byte, size_t n);
int memcmp(const void *left, const void *right, size_t n);
size_t strlen(const char *s);

/* ---- ports and memory-mapped registers ---- */

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline void outw(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint16_t inw(uint16_t port)
{
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* One mov of exactly this width, whatever the compiler thinks of volatile. */
#define MMIO_ACCESSORS(bits, suffix, constraint)                                                             \
    static inline uint##bits##_t mmio_read##bits(uintptr_t address)                                          \
    {                                                                                                        \
        uint##bits##_t value;                                                                                \
        __asm__ volatile("mov" suffix " %1, %0"                                                              \
                         : "=" constraint(value)                                                             \
                         : "m"(*(const volatile uint##bits##_t *)address)                                    \
                         : "memory");                                                                        \
        return value;                                                                                        \
    }                                                                                                        \
    static inline void mmio_write##bits(uintptr_t address, uint##bits##_t value)                             \
    {                                                                                                        \
        __asm__ volatile("mov" suffix " %1, %0"                                                              \
                         : "=m"(*(volatile uint##bits##_t *)address)                                         \
                         : constraint(value)                                                                 \
                         : "memory");                                                                        \
    }

MMIO_ACCESSORS(8, "b", "q")
MMIO_ACCESSORS(16, "w", "r")
MMIO_ACCESSORS(32, "l", "r")
#ifdef __x86_64__
MMIO_ACCESSORS(64, "q", "r")
#endif

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

#endif /* __ASSEMBLER__ */
#endif
