/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The UART's registers, its console's peer, and states of it that nobody saved. What must hold: the wire follows the
 * interrupt identification where OUT2 lets it, a state that was saved loads and is then saved again as it was, one that is refused leaves
 * no trace, and the guest gets input in the order in which it was typed.
 */
#include "check.h"
#include "vmmcore.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

enum { INPUT = 64, LOG = 1 << 16, HIGH_WATER = 600, RBR = 0, IIR = 2, LCR = 3, MCR = 4, LSR = 5 };
enum { DIVISOR_LATCH = 0x80, OUT2 = 0x08, LOOP = 0x10, NO_INTERRUPT = 1 };

struct input {
    const uint8_t *at, *end;
};

static int level;

static uint8_t take(struct input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

static void set_level(void *opaque, uint32_t n, int now)
{
    (void)opaque;
    CHECK_EQUAL(n, 4);
    CHECK(now != level); /* it is driven on changes only */
    level = now;
}

static void load(vmm_uart *uart, struct input *in)
{
    vmm_uart_state before, wrong, after;
    vmm_uart_save(uart, &before);
    wrong = before;
    for (unsigned n = take(in) & 3; n--;) {
        const uint8_t at = take(in) % sizeof wrong;
        ((uint8_t *)&wrong)[at] = take(in);
    }
    const bool same = !memcmp(&before, &wrong, sizeof before);
    const int rc = vmm_uart_load(uart, &wrong);
    CHECK(rc == 0 || (rc == -EINVAL && !same));
    vmm_uart_save(uart, &after);
    if (rc)
        CHECK(!memcmp(&before, &after, sizeof before));
    CHECK_EQUAL(vmm_uart_load(uart, &after), 0);
}

/* Typed bytes are numbered, so that what is read is known again; those of a loop or a loaded state are not typed. */
struct typing {
    uint8_t next, seen;
    bool known;
};

static void read_register(vmm_uart *uart, uint8_t offset, struct typing *typing)
{
    const vmm_device_ops *ops = vmm_uart_ops();
    const bool data = offset == RBR && !(ops->read(uart, LCR, 1) & DIVISOR_LATCH) &&
                      !(ops->read(uart, MCR, 1) & LOOP) && ops->read(uart, LSR, 1) & 1;
    const uint8_t value = (uint8_t)ops->read(uart, offset, 1);
    if (data && typing->known)
        CHECK_EQUAL(value, typing->seen++);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const vmm_line line = {.set = set_level, .n = 4};
    static vmm_console *console;
    static vmm_uart *uart;
    if (!console) {
        CHECK_EQUAL(vmm_console_create(INPUT, LOG, HIGH_WATER, &console), 0);
        CHECK_EQUAL(vmm_uart_create(&line, console, &uart), 0);
    }
    const vmm_device_ops *ops = vmm_uart_ops();
    struct input in = {data, data + size};
    vmm_uart_reset(uart);
    while (vmm_console_get(console) >= 0)
        ;
    vmm_console_set_pump(console, vmm_console_end(console));
    struct typing typing = {.known = true};
    while (in.at < in.end) {
        const uint8_t op = take(&in), offset = op >> 4 & 7;
        switch (op & 7) {
        case 0:
        case 1:
            typing.known =
                typing.known && offset != MCR && offset != 2; /* a loop, or FIFOs that are cleared */
            ops->write(uart, offset, 1, take(&in));
            break;
        case 2:
        case 3:
            read_register(uart, offset, &typing);
            break;
        case 4:
            for (unsigned n = take(&in) & 31; n--;)
                typing.next += vmm_console_send(console, &typing.next, 1) == 1;
            break;
        case 5:
            vmm_console_set_pump(console, vmm_console_end(console));
            break;
        case 6:
            load(uart, &in);
            typing.known = false;
            break;
        default:
            ops->read(uart, take(&in), 1u << (op >> 4 & 3));
            ops->write(uart, take(&in) | 8, 1u << (op >> 4 & 3), take(&in));
            typing.known = false;
        }
        vmm_uart_state state;
        vmm_uart_save(uart, &state);
        const bool gate = (state.mcr & (OUT2 | LOOP)) == OUT2; /* as PCs are wired */
        CHECK_EQUAL(level, gate && !(state.iir & NO_INTERRUPT));
    }
    return 0;
}
