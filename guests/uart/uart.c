/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The 16550A at 0x3f8 as its data sheet has it: scratch, divisor latch, FIFOs, loop-back, interrupts on
 * IRQ 4. With "bytes=N" it then prints "ready", takes N bytes from the host and prints their number and
 * Fletcher sums (modulo 65535, a byte at a time); "mode=1" takes them by interrupt rather than by polling,
 * "slow=1" dawdles so that the host must hold back.
 * "qemu=1": QEMU 7.2 has no modem deltas in loop-back.
 */
#include "interrupts.h"

enum { RBR = 0x3f8, DLL = 0x3f8, IER, DLM = 0x3f9, IIR, FCR = 0x3fa, LCR, MCR, LSR, MSR, SCR };
enum { IER_RECEIVED = 1, IER_THR_EMPTY = 2, IER_MODEM = 8, LCR_8N1 = 3, LCR_DLAB = 0x80 };
enum { IIR_NONE = 1, IIR_MODEM = 0, IIR_THR_EMPTY = 2, IIR_RECEIVED = 4, IIR_TIMEOUT = 12, IIR_FIFOS = 0xc0 };
enum { FCR_ENABLE = 1, FCR_CLEAR_RECEIVED = 2, FCR_CLEAR_SENT = 4, FCR_TRIGGER_14 = 0xc0 };
enum { MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 0x10 };
enum { LSR_READY = 1, LSR_OVERRUN = 2, LSR_THR_EMPTY = 0x20, LSR_IDLE = 0x40 };
enum { MSR_DELTA_CTS = 1, MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80 };

static bool qemu;
static volatile unsigned interrupts;
static volatile uint8_t first_cause, take;
static volatile uint32_t received, sum, sum_of_sums;

static void receive(void)
{
    sum = (sum + inb(RBR)) % 65535;
    sum_of_sums = (sum_of_sums + sum) % 65535;
    received++;
}

static void on_irq4(struct trap_frame *frame)
{
    (void)frame;
    first_cause = inb(IIR) & 0x0f;
    interrupts++;
    while (take && (inb(LSR) & LSR_READY))
        receive();
    pic_eoi(4);
}

static void registers(void)
{
    outb(IER, 0);
    outb(SCR, 0x5a);
    CHECK_EQ(inb(SCR), 0x5a);
    outb(SCR, 0xa5);
    CHECK_EQ(inb(SCR), 0xa5);
    outb(LCR, LCR_8N1 | LCR_DLAB);
    outb(DLL, 0x34);
    outb(DLM, 0x12);
    CHECK_EQ(inb(DLL), 0x34);
    CHECK_EQ(inb(DLM), 0x12);
    outb(DLL, 1);
    outb(DLM, 0);
    outb(LCR, LCR_8N1);
    CHECK_EQ(inb(LCR), LCR_8N1);
    CHECK_EQ(inb(IER), 0); /* not the divisor any more */
    outb(FCR, FCR_ENABLE | FCR_CLEAR_RECEIVED | FCR_CLEAR_SENT);
    CHECK_EQ(inb(IIR), IIR_FIFOS | IIR_NONE);
    CHECK_EQ(inb(LSR), LSR_THR_EMPTY | LSR_IDLE);
}

static void modem_lines(void)
{
    static const uint8_t pairs[][2] = {
        {MCR_DTR, MSR_DSR}, {MCR_RTS, MSR_CTS}, {MCR_OUT1, MSR_RI}, {MCR_OUT2, MSR_DCD}};
    for (unsigned i = 0; i < 4; i++) {
        outb(MCR, MCR_LOOP | pairs[i][0]);
        CHECK_EQ(inb(MSR) & 0xf0, pairs[i][1]);
    }
    outb(MCR, MCR_LOOP);
    inb(MSR);
    outb(MCR, MCR_LOOP | MCR_RTS);
    if (!qemu)
        CHECK_EQ(inb(MSR), MSR_CTS | MSR_DELTA_CTS);
    CHECK_EQ(inb(MSR), MSR_CTS); /* reading clears the delta */
}

/* In loop-back what is sent is received: order, FIFO depth, overrun. */
static void loop_back(void)
{
    outb(MCR, MCR_LOOP);
    for (unsigned i = 0; i < 16; i++) {
        outb(RBR, (uint8_t)(0x41 + i));
        while (!(inb(LSR) & LSR_IDLE))
            ;
    }
    CHECK_EQ(inb(LSR) & (LSR_READY | LSR_OVERRUN), LSR_READY);
    outb(RBR, 0x99); /* the seventeenth */
    CHECK_EQ(inb(LSR) & (LSR_READY | LSR_OVERRUN), LSR_READY | LSR_OVERRUN);
    CHECK_EQ(inb(LSR) & LSR_OVERRUN, 0); /* reading clears it */
    for (unsigned i = 0; i < 16; i++)
        CHECK_EQ(inb(RBR), 0x41 + i);
    CHECK_EQ(inb(LSR) & LSR_READY, 0);
    outb(RBR, 0x55);
    outb(FCR, FCR_ENABLE | FCR_CLEAR_RECEIVED);
    CHECK_EQ(inb(LSR) & LSR_READY, 0);
    outb(MCR, 0);
}

static void wait_for_cause(uint8_t cause)
{
    unsigned before = interrupts;
    while (interrupts == before)
        wait_for_interrupt();
    CHECK_EQ(first_cause, cause);
}

static void interrupt_causes(void)
{
    outb(MCR, MCR_OUT2);
    outb(IER, IER_THR_EMPTY); /* the register is empty: at once */
    wait_for_cause(IIR_THR_EMPTY);
    CHECK_EQ(inb(IIR) & 0x0f, IIR_NONE); /* reading IIR took it back */
    outb(IER, 0);

    outb(MCR, MCR_LOOP | MCR_OUT2);
    outb(RBR, 0x77);
    outb(IER, IER_RECEIVED);
    const uint8_t received = inb(IIR) & 0x0f; /* trigger level 1 */
    CHECK(received == IIR_RECEIVED ||
          (qemu && received == IIR_TIMEOUT)); /* QEMU's clock goes on where this waits */
    CHECK_EQ(inb(RBR), 0x77);
    CHECK_EQ(inb(IIR) & 0x0f, IIR_NONE);
    outb(IER, 0);
    if (qemu)
        return;
    inb(MSR);
    outb(IER, IER_MODEM);
    outb(MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS);
    CHECK_EQ(inb(IIR) & 0x0f, IIR_MODEM);
    inb(MSR);
    CHECK_EQ(inb(IIR) & 0x0f, IIR_NONE);
}

static void take_bytes(uint32_t wanted, bool by_interrupt, bool slow)
{
    print("ready\n");
    if (by_interrupt) {
        take = 1;
        outb(FCR, FCR_ENABLE | FCR_TRIGGER_14);
        outb(IER, IER_RECEIVED);
        while (received < wanted)
            wait_for_interrupt();
        outb(IER, 0);
    }
    while (received < wanted) {
        for (volatile int i = 0; slow && i < 100; i++)
            ;
        uint8_t status = inb(LSR);
        CHECK_EQ(status & LSR_OVERRUN, 0);
        if (status & LSR_READY)
            receive();
    }
    print("received %u sums %u %u\n", received, sum, sum_of_sums);
}

void guest_main(void)
{
    cpu_init();
    qemu = argument("qemu", 0);
    pic_init();
    trap_handlers[VECTOR_PIC + 4] = on_irq4;
    pic_unmask(4);
    registers();
    modem_lines();
    loop_back();
    interrupt_causes();
    outb(IER, 0);
    outb(MCR, MCR_DTR | MCR_RTS | MCR_OUT2);
    if (argument("bytes", 0))
        take_bytes((uint32_t)argument("bytes", 0), argument("mode", 0), argument("slow", 0));
}
