/* SPDX-License-Identifier: Apache-2.0 */
/*
 * 16550A universal asynchronous receiver/transmitter, as PCs have it (National Semiconductor PC16550D
 * datasheet).
 *
 * The wire has no speed. A byte written is transmitted at once; while the console's reader is too far behind,
 * the transmitter stays busy instead. A byte sent to the guest waits in the console until the guest listens
 * for it: there is no overrun from outside, and nothing typed ahead is eaten by a driver that probes and
 * clears FIFOs.
 */
#include "console.h"
#include "core/core.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* Registers by offset; 0 and 1 are the divisor latch while LCR.DLAB is set. */
enum { RBR_THR = 0, IER = 1, IIR_FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };

enum {
    IER_RECEIVE = 0x01, /* data available and character timeout */
    IER_TRANSMIT = 0x02,
    IER_LINE = 0x04,
    IER_MODEM = 0x08,
    IER_BITS = 0x0f,

    IIR_NONE = 0x01,
    IIR_MODEM = 0x00,
    IIR_TRANSMIT = 0x02,
    IIR_RECEIVE = 0x04,
    IIR_LINE = 0x06,
    IIR_TIMEOUT = 0x0c,
    IIR_FIFO = 0xc0,

    FCR_ENABLE = 0x01,
    FCR_CLEAR_RECEIVE = 0x02,
    FCR_KEPT = 0xc9, /* enable, DMA mode, trigger; the clear bits clear themselves */

    LCR_DLAB = 0x80,

    MCR_DTR = 0x01,
    MCR_RTS = 0x02,
    MCR_OUT1 = 0x04,
    MCR_OUT2 = 0x08,
    MCR_LOOP = 0x10,
    MCR_BITS = 0x1f,

    LSR_READY = 0x01,
    LSR_OVERRUN = 0x02,
    LSR_ERRORS = 0x1e,
    LSR_EMPTY = 0x60, /* THRE and TEMT, which move together on a wire without speed */

    MSR_DELTAS = 0x0f,
    MSR_TRAILING_RI = 0x04,
    MSR_CTS = 0x10,
    MSR_DSR = 0x20,
    MSR_RI = 0x40,
    MSR_DCD = 0x80,
    MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD,

    FIFO_DEPTH = 16,
    POLLING = 8, /* LSR reads that asked for nothing else; Linux's start-up makes four in a row at most */
};
_Static_assert(FIFO_DEPTH <= VMM_CONSOLE_SLACK, "a FIFO of held bytes must fit the console's slack");
_Static_assert(sizeof((vmm_uart_state *)0)->rx == FIFO_DEPTH, "the state holds one receive FIFO");

/* Everything the guest can tell apart. */
typedef struct registers {
    uint8_t ier, fcr, lcr, mcr, lsr, msr, scr, dll, dlm;
    bool transmit_pending; /* "transmitter empty" has not been acknowledged */
    bool asked;            /* the previous access read LSR, transmitter empty */
    uint8_t polls;         /* such reads that no write to THR followed, up to POLLING */
    unsigned count;
    unsigned host_count; /* of these the newest so many came from the console; the others were looped back */
    uint8_t rx[FIFO_DEPTH];
} registers;

struct vmm_uart {
    /* Taken before the console's lock, which listeners are called without; held while the line is driven. */
    pthread_mutex_t lock;
    const vmm_line *line;
    vmm_console *console;

    bool level; /* of the line */
    registers r;
};

/* ---- interrupts --------------------------------------------------------------------------------------- */

static bool fifo_enabled(const registers *r)
{
    return r->fcr & FCR_ENABLE;
}

static unsigned trigger(const registers *r)
{
    static const uint8_t levels[4] = {1, 4, 8, 14};
    return fifo_enabled(r) ? levels[r->fcr >> 6] : 1;
}

/*
 * Bytes below the trigger level raise the character timeout after four character times without traffic. A
 * wire without speed has a character time of zero, and needs no timer: the timeout has always passed already.
 */
static bool timeout_pending(const registers *r)
{
    return r->count > 0 && r->count < trigger(r);
}

static uint8_t lsr_value(const registers *r)
{
    return r->lsr | (r->count > 0 ? LSR_READY : 0);
}

/* The enabled cause of the highest priority (datasheet, table "Interrupt Control Functions"). */
static uint8_t cause(const registers *r)
{
    if ((r->ier & IER_LINE) && (r->lsr & LSR_ERRORS))
        return IIR_LINE;
    if ((r->ier & IER_RECEIVE) && r->count >= trigger(r))
        return IIR_RECEIVE;
    if ((r->ier & IER_RECEIVE) && timeout_pending(r))
        return IIR_TIMEOUT;
    if ((r->ier & IER_TRANSMIT) && r->transmit_pending)
        return IIR_TRANSMIT;
    if ((r->ier & IER_MODEM) && (r->msr & MSR_DELTAS))
        return IIR_MODEM;
    return IIR_NONE;
}

static uint8_t iir_value(const registers *r)
{
    return cause(r) | (fifo_enabled(r) ? IIR_FIFO : 0);
}

/* On a PC the interrupt output is gated by OUT2, and loopback forces every modem output inactive. */
static void update_line(vmm_uart *uart)
{
    const bool gate = (uart->r.mcr & MCR_OUT2) && !(uart->r.mcr & MCR_LOOP);
    const bool level = gate && cause(&uart->r) != IIR_NONE;
    if (level == uart->level)
        return;
    uart->level = level;
    uart->line->set(uart->line->opaque, uart->line->n, level);
}

/* ---- receiver ----------------------------------------------------------------------------------------- */

static unsigned depth(const registers *r)
{
    return fifo_enabled(r) ? FIFO_DEPTH : 1;
}

static void pull(vmm_uart *uart)
{
    if (uart->r.mcr & MCR_LOOP)
        return; /* the receiver is disconnected from its pin */
    while (uart->r.count < depth(&uart->r)) {
        const int byte = vmm_console_get(uart->console);
        if (byte < 0)
            return;
        uart->r.rx[uart->r.count++] = (uint8_t)byte;
        uart->r.host_count++;
    }
}

/*
 * A driver listens once it enables the receive interrupt, or keeps reading LSR for something else than leave
 * to send. Until then bytes stay with the console: a driver that starts up reads RBR to discard what is
 * there.
 */
static void pull_if_listened_for(vmm_uart *uart)
{
    if ((uart->r.ier & IER_RECEIVE) || uart->r.polls == POLLING)
        pull(uart);
}

/*
 * Bytes from the host that the guest never read go back to the head of the queue, as if they had been sent a
 * moment later: dropping a FIFO's worth out of the middle of what is being sent would help nobody.
 */
static void return_host_bytes(vmm_uart *uart)
{
    uart->r.count -= uart->r.host_count;
    vmm_console_unget(uart->console, uart->r.rx + uart->r.count, uart->r.host_count);
    uart->r.host_count = 0;
}

static void clear_receiver(vmm_uart *uart)
{
    return_host_bytes(uart);
    uart->r.count = 0;
    uart->r.polls = 0;
}

static uint8_t read_rbr(vmm_uart *uart)
{
    if (uart->r.count == 0) {
        uart->r.polls = 0;
        return 0;
    }
    const uint8_t byte = uart->r.rx[0];
    uart->r.count--;
    memmove(uart->r.rx, uart->r.rx + 1, uart->r.count);
    if (uart->r.host_count > uart->r.count)
        uart->r.host_count = uart->r.count; /* looped bytes are older, so they went first */
    pull_if_listened_for(uart);
    return byte;
}

/* Overrun: a FIFO keeps what it has, the single holding register takes the newer byte (datasheet, LSR bit 1).
 */
static void loop_back(vmm_uart *uart, uint8_t byte)
{
    if (uart->r.count == depth(&uart->r)) {
        uart->r.lsr |= LSR_OVERRUN;
        if (!fifo_enabled(&uart->r))
            uart->r.rx[0] = byte;
        return;
    }
    uart->r.rx[uart->r.count++] = byte;
}

/* ---- transmitter -------------------------------------------------------------------------------------- */

static void transmitter_empty(vmm_uart *uart)
{
    uart->r.lsr |= LSR_EMPTY;
    uart->r.transmit_pending = true;
}

/* A driver that saw THRE may write a FIFO's worth without looking again: these are taken after put refused. */
static void write_thr(vmm_uart *uart, uint8_t byte, bool asked)
{
    if (asked && uart->r.polls < POLLING)
        uart->r.polls--;
    uart->r.transmit_pending = false;
    if (uart->r.mcr & MCR_LOOP) {
        loop_back(uart, byte);
        if (uart->r.lsr & LSR_EMPTY)
            transmitter_empty(uart);
    } else if ((uart->r.lsr & LSR_EMPTY) && vmm_console_put(uart->console, byte)) {
        transmitter_empty(uart);
    } else {
        uart->r.lsr &= (uint8_t)~LSR_EMPTY;
        vmm_console_put_late(uart->console, byte);
    }
}

/* Asks again: room may be gone by now, and asking is what makes the console tell when it is back. */
static void resume_transmitter(vmm_uart *uart)
{
    if (!(uart->r.lsr & LSR_EMPTY) && vmm_console_ready(uart->console))
        transmitter_empty(uart);
}

/* ---- modem lines -------------------------------------------------------------------------------------- */

static uint8_t modem_inputs(uint8_t mcr)
{
    if (!(mcr & MCR_LOOP))
        return MSR_CONNECTED;
    return (mcr & MCR_RTS ? MSR_CTS : 0) | (mcr & MCR_DTR ? MSR_DSR : 0) | (mcr & MCR_OUT1 ? MSR_RI : 0) |
           (mcr & MCR_OUT2 ? MSR_DCD : 0);
}

/* A delta bit lies four below its input. RI's tells of the trailing edge only. */
static void write_mcr(vmm_uart *uart, uint8_t value)
{
    uart->r.mcr = value & MCR_BITS;
    const uint8_t inputs = modem_inputs(uart->r.mcr);
    uint8_t deltas = (uint8_t)(uart->r.msr ^ inputs) >> 4;
    if (inputs & MSR_RI)
        deltas &= (uint8_t)~MSR_TRAILING_RI;
    uart->r.msr = inputs | (uart->r.msr & MSR_DELTAS) | deltas;
    if (uart->r.mcr & MCR_LOOP)
        return_host_bytes(uart);
    else
        pull_if_listened_for(uart);
}

/* ---- registers ---------------------------------------------------------------------------------------- */

static uint8_t read_register(vmm_uart *uart, uint64_t offset)
{
    const bool dlab = uart->r.lcr & LCR_DLAB;
    uart->r.asked = false;
    uint8_t value;
    switch (offset) {
    case RBR_THR:
        return dlab ? uart->r.dll : read_rbr(uart);
    case IER:
        return dlab ? uart->r.dlm : uart->r.ier;
    case IIR_FCR:
        value = iir_value(&uart->r);
        if (cause(&uart->r) == IIR_TRANSMIT)
            uart->r.transmit_pending = false;
        return value;
    case LCR:
        return uart->r.lcr;
    case MCR:
        return uart->r.mcr;
    case LSR:
        uart->r.asked = uart->r.lsr & LSR_EMPTY;
        if (uart->r.asked && uart->r.polls < POLLING)
            uart->r.polls++;
        pull_if_listened_for(uart);
        value = lsr_value(&uart->r);
        uart->r.lsr &= (uint8_t)~LSR_ERRORS;
        return value;
    case MSR:
        value = uart->r.msr;
        uart->r.msr &= (uint8_t)~MSR_DELTAS;
        return value;
    case SCR:
        return uart->r.scr;
    default:
        return 0xff;
    }
}

static void write_ier(vmm_uart *uart, uint8_t value)
{
    const uint8_t enabled = value & IER_BITS & ~uart->r.ier;
    uart->r.ier = value & IER_BITS;
    /* Enabling the transmit interrupt with an idle transmitter raises it: drivers start sending this way. */
    if (enabled & IER_TRANSMIT)
        uart->r.transmit_pending = uart->r.lsr & LSR_EMPTY;
    pull_if_listened_for(uart);
}

static void write_fcr(vmm_uart *uart, uint8_t value)
{
    const uint8_t fcr = value & FCR_ENABLE ? value & FCR_KEPT : 0;
    const bool switched = (fcr ^ uart->r.fcr) & FCR_ENABLE;
    if (switched || (value & FCR_ENABLE && value & FCR_CLEAR_RECEIVE))
        clear_receiver(uart);
    uart->r.fcr = fcr;
    pull_if_listened_for(uart);
}

static void write_register(vmm_uart *uart, uint64_t offset, uint8_t value)
{
    const bool dlab = uart->r.lcr & LCR_DLAB;
    const bool asked = uart->r.asked;
    uart->r.asked = false;
    switch (offset) {
    case RBR_THR:
        if (dlab)
            uart->r.dll = value;
        else
            write_thr(uart, value, asked);
        break;
    case IER:
        if (dlab)
            uart->r.dlm = value;
        else
            write_ier(uart, value);
        break;
    case IIR_FCR:
        write_fcr(uart, value);
        break;
    case LCR:
        uart->r.lcr = value; /* a break is a state of the wire, and ours has nobody to notice */
        break;
    case MCR:
        write_mcr(uart, value);
        break;
    case SCR:
        uart->r.scr = value;
        break;
    default:
        break; /* LSR and MSR are the device's own */
    }
}

/* ---- bus ---------------------------------------------------------------------------------------------- */

/* The ISA bus splits what is wider than a byte into bytes at consecutive ports, lowest first. */
static uint64_t uart_read(void *opaque, uint64_t offset, uint32_t size)
{
    vmm_uart *uart = opaque;
    uint64_t value = 0;
    pthread_mutex_lock(&uart->lock);
    for (uint32_t i = 0; i < size && i < 8; i++)
        value |= (uint64_t)read_register(uart, offset + i) << (8 * i);
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
    return value;
}

static void uart_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    vmm_uart *uart = opaque;
    pthread_mutex_lock(&uart->lock);
    for (uint32_t i = 0; i < size && i < 8; i++)
        write_register(uart, offset + i, (uint8_t)(value >> (8 * i)));
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
}

const vmm_device_ops *vmm_uart_ops(void)
{
    static const vmm_device_ops ops = {.read = uart_read, .write = uart_write};
    return &ops;
}

/* ---- console ------------------------------------------------------------------------------------------ */

static void uart_on_input(void *opaque)
{
    vmm_uart *uart = opaque;
    pthread_mutex_lock(&uart->lock);
    pull_if_listened_for(uart);
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
}

static void uart_on_room(void *opaque)
{
    vmm_uart *uart = opaque;
    pthread_mutex_lock(&uart->lock);
    resume_transmitter(uart);
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
}

/* ---- life --------------------------------------------------------------------------------------------- */

/* Master reset. The datasheet leaves the divisor alone; 115200 baud here, as firmware would. */
static const registers power_on = {.dll = 1, .lsr = LSR_EMPTY, .msr = MSR_CONNECTED};

int vmm_uart_create(const vmm_line *line, vmm_console *console, vmm_uart **out)
{
    vmm_uart *uart = calloc(1, sizeof *uart);
    if (!uart)
        return vmm_error_set(-ENOMEM, "a UART");
    pthread_mutex_init(&uart->lock, NULL);
    uart->line = line;
    uart->console = console;
    uart->r = power_on;
    vmm_console_listen(console, uart_on_input, uart_on_room, uart);
    *out = uart;
    return 0;
}

void vmm_uart_destroy(vmm_uart *uart)
{
    if (!uart)
        return;
    vmm_console_listen(uart->console, NULL, NULL, NULL);
    pthread_mutex_destroy(&uart->lock);
    free(uart);
}

void vmm_uart_reset(vmm_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    clear_receiver(uart);
    uart->r = power_on;
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
}

/* ---- state -------------------------------------------------------------------------------------------- */

void vmm_uart_save(vmm_uart *uart, vmm_uart_state *state)
{
    pthread_mutex_lock(&uart->lock);
    *state = (vmm_uart_state){
        .ier = uart->r.ier,
        .iir = iir_value(&uart->r),
        .fcr = uart->r.fcr,
        .lcr = uart->r.lcr,
        .mcr = uart->r.mcr,
        .lsr = lsr_value(&uart->r),
        .msr = uart->r.msr,
        .scr = uart->r.scr,
        .dll = uart->r.dll,
        .dlm = uart->r.dlm,
        .thr_empty_pending = uart->r.transmit_pending,
        .timeout_pending = timeout_pending(&uart->r),
        .rx_count = (uint8_t)uart->r.count,
        .rx_trigger = (uint8_t)trigger(&uart->r),
    };
    memcpy(state->rx, uart->r.rx, uart->r.count);
    pthread_mutex_unlock(&uart->lock);
}

int vmm_uart_load(vmm_uart *uart, const vmm_uart_state *state)
{
    const vmm_uart_state s = *state;
    const uint8_t empty = s.lsr & LSR_EMPTY;
    if (s.ier & ~IER_BITS || s.fcr & ~FCR_KEPT || (s.fcr && !(s.fcr & FCR_ENABLE)) || s.mcr & ~MCR_BITS ||
        s.lsr & ~(LSR_READY | LSR_OVERRUN | LSR_EMPTY) || (empty && empty != LSR_EMPTY) ||
        (s.msr & ~MSR_DELTAS) != modem_inputs(s.mcr) || s.thr_empty_pending > 1 ||
        (s.thr_empty_pending && !empty))
        return vmm_error_set(-EINVAL, "not the state of a UART");
    registers r = {
        .ier = s.ier,
        .fcr = s.fcr,
        .lcr = s.lcr,
        .mcr = s.mcr,
        .lsr = s.lsr & (uint8_t)~LSR_READY,
        .msr = s.msr,
        .scr = s.scr,
        .dll = s.dll,
        .dlm = s.dlm,
        .transmit_pending = s.thr_empty_pending,
        .count = s.rx_count,
        .host_count = s.mcr & MCR_LOOP ? 0 : s.rx_count,
    };
    /* What is left of the state follows from the registers, so it must agree with them. */
    if (s.rx_count > depth(&r) || s.rx_trigger != trigger(&r) || s.lsr != lsr_value(&r) ||
        s.timeout_pending != timeout_pending(&r) || s.iir != iir_value(&r))
        return vmm_error_set(-EINVAL, "not the state of a UART");
    memcpy(r.rx, s.rx, s.rx_count);

    pthread_mutex_lock(&uart->lock);
    uart->r = r;
    resume_transmitter(uart);
    pull_if_listened_for(uart);
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
    return 0;
}
