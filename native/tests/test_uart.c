/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "vmmcore.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

enum { RBR = 0, THR = 0, IER = 1, IIR = 2, FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };

typedef struct rig {
    atomic_int level;
    vmm_line line;
    vmm_console *console;
    vmm_uart *uart;
} rig;

static void set_level(void *opaque, uint32_t n, int level)
{
    CHECK_EQUAL(n, 4);
    CHECK(level != atomic_exchange(&((rig *)opaque)->level, level)); /* the line is driven on changes only */
}

static void set_up(rig *r, size_t input_limit, size_t high_water)
{
    *r = (rig){.line = {.set = set_level, .opaque = r, .n = 4}};
    CHECK_EQUAL(vmm_console_create(input_limit, 1 << 20, high_water, &r->console), 0);
    CHECK_EQUAL(vmm_uart_create(&r->line, r->console, &r->uart), 0);
}

static void tear_down(rig *r)
{
    vmm_uart_destroy(r->uart);
    vmm_console_destroy(r->console);
}

static uint8_t in(rig *r, unsigned offset)
{
    return (uint8_t)vmm_uart_ops()->read(r->uart, offset, 1);
}

static void out(rig *r, unsigned offset, uint8_t value)
{
    vmm_uart_ops()->write(r->uart, offset, 1, value);
}

static void linux_detects_a_16550a(void)
{
    rig r;
    set_up(&r, 64, 64);
    /* drivers/tty/serial/8250: autoconfig's IER, loopback and IIR tests, then the size of the FIFO. */
    out(&r, IER, 0);
    CHECK_EQUAL(in(&r, IER), 0);
    out(&r, IER, 0x0f);
    CHECK_EQUAL(in(&r, IER), 0x0f);
    out(&r, IER, 0);
    out(&r, MCR, 0x1a);
    CHECK_EQUAL(in(&r, MSR) & 0xf0, 0x90);
    out(&r, MCR, 0);
    out(&r, LCR, 0xbf); /* an EFR would read 0 here */
    CHECK_EQUAL(in(&r, IIR), 0x01);
    out(&r, LCR, 0);
    out(&r, FCR, 0x01);
    CHECK_EQUAL(in(&r, IIR) >> 6, 3);
    out(&r, FCR, 0x21); /* 64 bytes are a 16750's */
    CHECK_EQUAL(in(&r, IIR) >> 5, 6);
    out(&r, IER, 0x40); /* UUE is an XScale's */
    CHECK_EQUAL(in(&r, IER), 0);
    out(&r, FCR, 0);
    /* serial8250_do_startup: the transmit interrupt must come back each time it is enabled. */
    for (int i = 0; i < 2; i++) {
        out(&r, IER, 0x02);
        CHECK_EQUAL(in(&r, IIR), 0x02);
        CHECK_EQUAL(in(&r, IIR), 0x01);
        out(&r, IER, 0);
    }
    tear_down(&r);
}

static void a_driver_that_probes_and_clears_eats_no_typed_ahead_byte(void)
{
    rig r;
    set_up(&r, 256, 64);
    CHECK_EQUAL(vmm_console_send(r.console, (const uint8_t *)"typed ahead, well before anybody listens", 40),
                40);
    for (int i = 0; i < 3; i++) {
        out(&r, FCR, 0x01);
        out(&r, FCR, 0x07);
        out(&r, FCR, 0x00);
        in(&r, LSR);
        in(&r, RBR);
        in(&r, IIR);
        in(&r, MSR);
        for (int j = 0; j < 4; j++) /* serial8250_do_startup asks so often before it discards again */
            in(&r, LSR);
        in(&r, RBR);
    }
    out(&r, MCR, 0x08);
    out(&r, IER, 0x05);
    out(&r, FCR, 0x01); /* enabled after the interrupt: the byte at hand survives the switch */
    out(&r, FCR, 0x81);
    char got[64] = "";
    for (int i = 0; i < 40; i++) {
        CHECK_EQUAL(r.level, 1);
        CHECK(in(&r, LSR) & 1);
        got[i] = (char)in(&r, RBR);
    }
    CHECK_EQUAL(strcmp(got, "typed ahead, well before anybody listens"), 0);
    CHECK_EQUAL(in(&r, LSR), 0x60);
    CHECK_EQUAL(r.level, 0);
    tear_down(&r);
}

static void a_busy_transmitter_loses_nothing_and_interrupts_when_it_is_free(void)
{
    rig r;
    set_up(&r, 64, 4);
    vmm_console_set_pump(r.console, 0);
    out(&r, MCR, 0x08);
    out(&r, FCR, 0x01);
    out(&r, IER, 0x02);
    for (int i = 0; i < 4; i++) {
        out(&r, THR, (uint8_t)i);
        CHECK_EQUAL(in(&r, LSR), 0x60);
    }
    for (int i = 4; i < 20; i++) /* a FIFO's worth on the strength of the last THRE */
        out(&r, THR, (uint8_t)i);
    CHECK_EQUAL(in(&r, LSR), 0);
    CHECK_EQUAL(r.level, 0);

    uint8_t bytes[64];
    uint64_t position = 0;
    CHECK_EQUAL(vmm_console_read(r.console, &position, bytes, sizeof bytes), 20);
    for (int i = 0; i < 20; i++)
        CHECK_EQUAL(bytes[i], i);
    vmm_console_set_pump(r.console, position);
    CHECK_EQUAL(in(&r, LSR), 0x60);
    CHECK_EQUAL(r.level, 1);
    CHECK_EQUAL(in(&r, IIR), 0xc2);
    CHECK_EQUAL(r.level, 0);
    tear_down(&r);
}

static void a_state_saved_while_busy_resumes_where_there_is_room(void)
{
    rig busy, fresh;
    set_up(&busy, 64, 1);
    vmm_console_set_pump(busy.console, 0);
    out(&busy, IER, 0x02);
    out(&busy, THR, 'a');
    out(&busy, THR, 'b');
    vmm_uart_state state, again;
    vmm_uart_save(busy.uart, &state);
    CHECK_EQUAL(state.lsr, 0);
    CHECK_EQUAL(vmm_uart_load(busy.uart, &state), 0);
    vmm_uart_save(busy.uart, &again);
    CHECK_EQUAL(memcmp(&state, &again, sizeof state), 0);

    set_up(&fresh, 64, 1);
    CHECK_EQUAL(vmm_uart_load(fresh.uart, &state), 0);
    CHECK_EQUAL(in(&fresh, LSR), 0x60);
    CHECK_EQUAL(in(&fresh, IIR), 0x02);
    tear_down(&busy);
    tear_down(&fresh);
}

/* Each is one field away from a state that loads. */
static void a_state_no_uart_can_be_in_is_refused(void)
{
    rig r;
    set_up(&r, 64, 64);
    vmm_console_send(r.console, (const uint8_t *)"abc", 3);
    out(&r, FCR, 0x41);
    out(&r, IER, 0x03);
    vmm_uart_state good;
    vmm_uart_save(r.uart, &good);
    CHECK_EQUAL(good.rx_count, 3);
    CHECK_EQUAL(good.timeout_pending, 1);
    CHECK_EQUAL(good.iir, 0xcc);
    CHECK_EQUAL(vmm_uart_load(r.uart, &good), 0);
#define REFUSED(change)                                                                                      \
    do {                                                                                                     \
        vmm_uart_state bad = good;                                                                           \
        bad.change;                                                                                          \
        CHECK_EQUAL(vmm_uart_load(r.uart, &bad), -EINVAL);                                                   \
    } while (0)
    REFUSED(ier = 0x13);
    REFUSED(iir = 0xc1);
    REFUSED(fcr = 0x43);
    REFUSED(fcr = 0x40);
    REFUSED(mcr = 0x20);
    REFUSED(lsr = 0x60);
    REFUSED(lsr = 0x41);
    REFUSED(lsr = 0x65);
    REFUSED(msr = 0x30);
    REFUSED(thr_empty_pending = 2);
    REFUSED(timeout_pending = 0);
    REFUSED(rx_count = 17);
    REFUSED(rx_count = 0);
    REFUSED(rx_trigger = 1);
#undef REFUSED
    vmm_uart_state after;
    vmm_uart_save(r.uart, &after);
    CHECK_EQUAL(memcmp(&good, &after, sizeof good), 0);
    tear_down(&r);
}

static void wide_accesses_go_to_consecutive_registers(void)
{
    rig r;
    set_up(&r, 64, 64);
    vmm_uart_ops()->write(r.uart, LCR, 4, 0x5a5a0b03); /* LCR, MCR, and LSR and MSR, which do not take it */
    CHECK_EQUAL(vmm_uart_ops()->read(r.uart, LCR, 2), 0x0b03);
    CHECK_EQUAL(vmm_uart_ops()->read(r.uart, SCR, 2), 0xff00);
    CHECK_EQUAL(in(&r, LSR), 0x60);
    tear_down(&r);
}

/* A paste beside a flood: an interrupt-driven guest echoes all it gets, through a pump that pauses. */
enum { PASTE = 100000 };

static void *paste(void *opaque)
{
    rig *r = opaque;
    for (uint32_t sent = 0; sent < PASTE;) {
        const uint8_t byte = (uint8_t)(sent * 13);
        if (vmm_console_send(r->console, &byte, 1))
            sent++;
        else
            sched_yield();
    }
    return NULL;
}

static void *collect(void *opaque)
{
    rig *r = opaque;
    uint64_t position = 0;
    uint8_t bytes[97];
    while (position < PASTE) {
        CHECK(vmm_console_wait(r->console, position, 20000));
        uint64_t at = position;
        vmm_console_read(r->console, &position, bytes, sizeof bytes);
        for (size_t i = 0; at < position; i++, at++)
            CHECK_EQUAL(bytes[i], (uint8_t)(at * 13));
        vmm_console_set_pump(r->console, position);
    }
    return NULL;
}

static void a_paste_is_echoed_whole_by_an_interrupt_driven_guest(void)
{
    rig r;
    set_up(&r, 300, 50);
    vmm_console_set_pump(r.console, 0);
    out(&r, MCR, 0x08);
    out(&r, FCR, 0x81);
    out(&r, IER, 0x03);
    pthread_t threads[2];
    CHECK_EQUAL(pthread_create(&threads[0], NULL, paste, &r), 0);
    CHECK_EQUAL(pthread_create(&threads[1], NULL, collect, &r), 0);
    uint8_t held[16];
    unsigned n = 0, echoed = 0, idle = 1;
    while (echoed < PASTE) {
        if (!atomic_load(&r.level)) {
            sched_yield();
            continue;
        }
        switch (in(&r, IIR) & 0x0f) {
        case 0x04:
        case 0x0c:
            while (n < 16 && in(&r, LSR) & 1)
                held[n++] = in(&r, RBR);
            break;
        case 0x02:
            idle = 1;
            break;
        }
        if (idle && n > 0) {
            for (unsigned i = 0; i < n; i++)
                out(&r, THR, held[i]);
            echoed += n;
            n = 0;
            idle = 0;
        }
        if (n == 16) { /* full until the transmitter is free: mask the receiver, as a driver would */
            out(&r, IER, 0x02);
            while (!(in(&r, LSR) & 0x20))
                sched_yield();
            idle = 1;
            for (unsigned i = 0; i < n; i++)
                out(&r, THR, held[i]);
            echoed += n;
            n = 0;
            out(&r, IER, 0x03);
        }
    }
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    CHECK_EQUAL(vmm_console_end(r.console), PASTE);
    tear_down(&r);
}

int main(void)
{
    linux_detects_a_16550a();
    a_driver_that_probes_and_clears_eats_no_typed_ahead_byte();
    a_busy_transmitter_loses_nothing_and_interrupts_when_it_is_free();
    a_state_saved_while_busy_resumes_where_there_is_room();
    a_state_no_uart_can_be_in_is_refused();
    wide_accesses_go_to_consecutive_registers();
    a_paste_is_echoed_whole_by_an_interrupt_driven_guest();
    return 0;
}
