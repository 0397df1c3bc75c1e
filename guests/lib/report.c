/* SPDX-License-Identifier: Apache-2.0 */
/* The guest's way to speak: a polled serial line, a small print, and the verdict port. */
#include "guest.h"

#include <stdarg.h>

enum { SERIAL_DATA = PORT_SERIAL, SERIAL_LCR = PORT_SERIAL + 3, SERIAL_MCR, SERIAL_LSR };
enum { LCR_8N1 = 3, MCR_DTR_RTS = 3, LSR_DATA_READY = 1, LSR_THR_EMPTY = 0x20 };

void serial_putc(char c)
{
    while (!(inb(SERIAL_LSR) & LSR_THR_EMPTY))
        ;
    outb(SERIAL_DATA, (uint8_t)c);
}

int serial_getc(void)
{
    while (!(inb(SERIAL_LSR) & LSR_DATA_READY))
        ;
    return inb(SERIAL_DATA);
}

static void print_string(const char *s)
{
    while (*s)
        serial_putc(*s++);
}

static void print_number(unsigned long value, unsigned base, int width)
{
    char digits[24];
    int n = 0;
    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    for (; width > n; width--)
        serial_putc('0');
    while (n)
        serial_putc(digits[--n]);
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            serial_putc(*format);
            continue;
        }
        int width = 0;
        while (*++format >= '0' && *format <= '9')
            width = width * 10 + (*format - '0');
        bool is_long = *format == 'l';
        if (is_long)
            format++;
        if (*format == 's') {
            print_string(va_arg(arguments, const char *));
        } else if (*format == 'c') {
            serial_putc((char)va_arg(arguments, int));
        } else if (*format == 'u' || *format == 'x') {
            unsigned long value = is_long ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned);
            print_number(value, *format == 'x' ? 16 : 10, width);
        } else if (*format == 'd') {
            int value = va_arg(arguments, int);
            if (value < 0)
                serial_putc('-');
            print_number(value < 0 ? 0u - (unsigned)value : (unsigned)value, 10, width);
        } else {
            serial_putc(*format);
        }
    }
    va_end(arguments);
}

void halt_forever(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

void await_the_end(void)
{
    uint64_t start = rdtsc();
    while (rdtsc() - start < 2000000000)
        ;
}

void guest_exit(uint32_t value)
{
    outl(PORT_DEBUG_EXIT, value);
    halt_forever();
}

void guest_pass(void)
{
    print_string("PASS\n");
    guest_exit(EXIT_PASS);
}

/* A check may fail with the line looped back or its divisor latched. */
static void serial_recover(void)
{
    outb(SERIAL_LCR, LCR_8N1);
    outb(SERIAL_MCR, MCR_DTR_RTS);
}

void guest_fail(uint32_t value, const char *file, int line, const char *expression)
{
    serial_recover();
    print("FAIL %s:%d: %s\n", file, line, expression);
    guest_exit(value);
}

void guest_fail_eq(uint32_t value, const char *file, int line, const char *expression, unsigned long left,
                   unsigned long right)
{
    serial_recover();
    print("FAIL %s:%d: %s (0x%lx, 0x%lx)\n", file, line, expression, left, right);
    guest_exit(value);
}

/* Before C23 gcc may emit calls to these even when freestanding. */
void *memcpy(void *to, const void *from, size_t n)
{
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
    return result;
}

void *memset(void *to, int byte, size_t n)
{
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    return result;
}

int memcmp(const void *left, const void *right, size_t n)
{
    const unsigned char *a = left, *b = right;
    for (; n; n--, a++, b++)
        if (*a != *b)
            return *a - *b;
    return 0;
}

size_t strlen(const char *s)
{
    const char *end = s;
    while (*end)
        end++;
    return (size_t)(end - s);
}
