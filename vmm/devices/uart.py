"""16550A UART in Python: the readable twin of ``native/devices/uart.c``, register for register.

======  ====  ============================================================================================
offset  DLAB  register
======  ====  ============================================================================================
0       0     RBR (read) received byte; THR (write) byte to transmit
1       0     IER interrupt enable: receive, transmit, line status, modem status
0, 1    1     DLL, DLM divisor latch: remembered, for this wire has no speed
2             IIR (read) the most urgent interrupt; FCR (write) FIFO control
3             LCR line control; bit 7 is DLAB
4             MCR modem control: DTR, RTS, OUT1, OUT2 (gates the interrupt on PCs), loopback
5             LSR line status: data ready, overrun, transmitter empty
6             MSR modem status: inputs CTS, DSR, RI, DCD and what changed since the last read
7             SCR scratch
======  ====  ============================================================================================

Source: National Semiconductor PC16550D datasheet, section 8 "Registers".
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

FIFO_DEPTH = 16
POLLING = 8  # LSR reads that asked for nothing else; Linux's start-up makes four in a row at most
TRIGGER_LEVELS = (1, 4, 8, 14)

IER_RECEIVE, IER_TRANSMIT, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_MODEM, IIR_NONE, IIR_TRANSMIT, IIR_RECEIVE, IIR_LINE, IIR_TIMEOUT, IIR_FIFO = 0, 1, 2, 4, 6, 0x0C, 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVE, FCR_KEPT = 0x01, 0x02, 0xC9
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
LSR_READY, LSR_OVERRUN, LSR_ERRORS, LSR_EMPTY = 0x01, 0x02, 0x1E, 0x60
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD, MSR_DELTAS, MSR_TRAILING_RI = 0x10, 0x20, 0x40, 0x80, 0x0F, 0x04


class SerialConsole(Protocol):
    """The far end of the wire."""

    def put(self, byte: int) -> bool:
        """Take a byte the guest sent; ``False``: no room now, ``on_room`` will be called."""

    def get(self) -> int | None:
        """The next byte for the guest, if there is one."""

    def unget(self, data: bytes) -> None:
        """Take back the newest bytes got, to be got again before all others."""

    def listen(self, on_input: Callable[[], None], on_room: Callable[[], None]) -> None:
        """Call these, holding no lock, when input arrives and when ``put`` would succeed again."""


class Uart(Device):
    """A 16550A between a :class:`SerialConsole` and an interrupt line.

    Bytes leave at once; while the console refuses them they wait in the transmit FIFO and THRE stays clear. Bytes
    for the guest stay with the console until the driver listens (enables the receive interrupt, or keeps reading
    LSR for something else than leave to send), and return there when it clears a FIFO unread: a driver that probes,
    clears and discards as it starts up costs no input.
    """

    name = "uart"
    registers = dict(enumerate(("rbr/thr/dll", "ier/dlm", "iir/fcr", "lcr", "mcr", "lsr", "msr", "scr")))

    _ier: int
    _fcr: int
    _lcr: int
    _mcr: int
    _lsr: int
    _msr: int
    _scr: int
    _dll: int
    _dlm: int

    def __init__(self, console: SerialConsole) -> None:
        self.console = console
        self._lock = threading.RLock()  # taken before the console's; vCPUs and the console's listeners meet here
        self._rx: list[int] = []
        self._from_host = 0  # the newest so many of _rx came from the console, the others were looped back
        self._level = False
        self._power_on()
        console.listen(self._on_input, self._on_room)

    # -- interrupts: one cause is reported, the most urgent; the line is up while there is one ------------------

    @property
    def _trigger(self) -> int:
        return TRIGGER_LEVELS[self._fcr >> 6] if self._fcr else 1

    def _cause(self) -> int:
        received = len(self._rx) if self._ier & IER_RECEIVE else 0
        if self._ier & IER_LINE and self._lsr & LSR_ERRORS:
            return IIR_LINE
        if received >= self._trigger:
            return IIR_RECEIVE
        if received:  # four character times of a wire without speed have always passed
            return IIR_TIMEOUT
        if self._ier & IER_TRANSMIT and self._transmit_pending:
            return IIR_TRANSMIT
        if self._ier & IER_MODEM and self._msr & MSR_DELTAS:
            return IIR_MODEM
        return IIR_NONE

    def _update_line(self) -> None:
        gate = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2  # loopback forces OUT2 inactive
        level = gate and self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            (self.line.raise_ if level else self.line.lower)()

    # -- receiver -----------------------------------------------------------------------------------------------

    @property
    def _depth(self) -> int:
        return FIFO_DEPTH if self._fcr else 1

    def _pull(self) -> None:
        if self._mcr & MCR_LOOP:
            return  # the receiver is disconnected from its pin
        while len(self._rx) < self._depth and (byte := self.console.get()) is not None:
            self._rx.append(byte)
            self._from_host += 1

    def _pull_if_listened_for(self) -> None:
        if self._ier & IER_RECEIVE or self._polls == POLLING:
            self._pull()

    def _return_host_bytes(self) -> None:
        looped = len(self._rx) - self._from_host
        self.console.unget(bytes(self._rx[looped:]))
        del self._rx[looped:]
        self._from_host = 0

    def _clear_receiver(self) -> None:
        self._return_host_bytes()
        self._rx.clear()
        self._polls = 0

    def _read_rbr(self) -> int:
        if not self._rx:
            self._polls = 0
            return 0
        byte = self._rx.pop(0)
        self._from_host = min(self._from_host, len(self._rx))  # looped bytes are older, so they went first
        self._pull_if_listened_for()
        return byte

    def _loop_back(self, byte: int) -> None:
        if len(self._rx) < self._depth:
            self._rx.append(byte)
            return
        self._lsr |= LSR_OVERRUN  # a FIFO keeps what it has, the single register takes the newer byte
        if not self._fcr:
            self._rx[0] = byte

    # -- transmitter --------------------------------------------------------------------------------------------

    def _transmitter_empty(self) -> None:
        self._lsr |= LSR_EMPTY
        self._transmit_pending = True

    def _drain(self) -> None:
        while self._tx and self.console.put(self._tx[0]):
            del self._tx[0]
        if not self._tx and not self._lsr & LSR_EMPTY:
            self._transmitter_empty()

    def _write_thr(self, byte: int, asked: bool) -> None:
        if asked and self._polls < POLLING:
            self._polls -= 1  # that LSR read was to learn whether this byte may be sent
        self._transmit_pending = False
        if self._mcr & MCR_LOOP:
            self._loop_back(byte)
            self._transmit_pending = bool(self._lsr & LSR_EMPTY)
            return
        if len(self._tx) < FIFO_DEPTH:  # what a driver writes beyond that without THRE is lost
            self._tx.append(byte)
        self._lsr &= ~LSR_EMPTY
        self._drain()

    # -- modem lines --------------------------------------------------------------------------------------------

    def _modem_inputs(self, mcr: int) -> int:
        if not mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD
        looped = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(inside for output, inside in looped if mcr & output)

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F
        inputs = self._modem_inputs(self._mcr)
        deltas = (self._msr ^ inputs) >> 4 & MSR_DELTAS  # a delta bit lies four below its input
        if inputs & MSR_RI:
            deltas &= ~MSR_TRAILING_RI  # RI's tells of the trailing edge only
        self._msr = inputs | self._msr & MSR_DELTAS | deltas
        if self._mcr & MCR_LOOP:
            self._return_host_bytes()
        else:
            self._pull_if_listened_for()

    # -- registers ----------------------------------------------------------------------------------------------

    def _read_register(self, offset: int) -> int:
        dlab = self._lcr & LCR_DLAB
        self._asked = False
        if offset == 0:
            return self._dll if dlab else self._read_rbr()
        if offset == 1:
            return self._dlm if dlab else self._ier
        if offset == 2:
            cause = self._cause()
            if cause == IIR_TRANSMIT:
                self._transmit_pending = False  # reading it as the cause acknowledges it
            return cause | (IIR_FIFO if self._fcr else 0)
        if offset == 5:
            self._asked = bool(self._lsr & LSR_EMPTY)
            self._polls = min(self._polls + self._asked, POLLING)
            self._pull_if_listened_for()
            value = self._lsr | (LSR_READY if self._rx else 0)
            self._lsr &= ~LSR_ERRORS
            return value
        if offset == 6:
            value, self._msr = self._msr, self._msr & ~MSR_DELTAS
            return value
        return {3: self._lcr, 4: self._mcr, 7: self._scr}.get(offset, 0xFF)

    def _write_ier(self, value: int) -> None:
        # Enabling the transmit interrupt with an idle transmitter raises it: drivers start sending this way.
        if value & ~self._ier & IER_TRANSMIT:
            self._transmit_pending = bool(self._lsr & LSR_EMPTY)
        self._ier = value & 0x0F
        self._pull_if_listened_for()

    def _write_fcr(self, value: int) -> None:
        fcr = value & FCR_KEPT if value & FCR_ENABLE else 0
        if (fcr ^ self._fcr) & FCR_ENABLE or (fcr and value & FCR_CLEAR_RECEIVE):
            self._clear_receiver()
        self._fcr = fcr
        self._pull_if_listened_for()

    def _write_register(self, offset: int, value: int) -> None:
        dlab = self._lcr & LCR_DLAB
        asked, self._asked = self._asked, False
        if offset == 0 and dlab:
            self._dll = value
        elif offset == 0:
            self._write_thr(value, asked)
        elif offset == 1 and dlab:
            self._dlm = value
        elif offset == 1:
            self._write_ier(value)
        elif offset == 2:
            self._write_fcr(value)
        elif offset == 3:
            self._lcr = value
        elif offset == 4:
            self._write_mcr(value)
        elif offset == 7:
            self._scr = value

    # -- bus: the ISA bus splits what is wider than a byte, lowest port first --------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read ``size`` consecutive byte registers."""
        with self._lock:
            value = sum(self._read_register(offset + i) << 8 * i for i in range(size))
            self._update_line()
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` consecutive byte registers."""
        with self._lock:
            for i in range(size):
                self._write_register(offset + i, value >> 8 * i & 0xFF)
            self._update_line()

    # -- console --------------------------------------------------------------------------------------------------

    def _on_input(self) -> None:
        with self._lock:
            self._pull_if_listened_for()
            self._update_line()

    def _on_room(self) -> None:
        with self._lock:
            self._drain()
            self._update_line()

    # -- life and state -------------------------------------------------------------------------------------------

    def _power_on(self) -> None:
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = self._dlm = 0
        self._dll = 1  # 115200 baud, as firmware would leave it
        self._lsr = LSR_EMPTY
        self._msr = self._modem_inputs(0)
        self._transmit_pending = False
        self._asked = False  # the previous access read LSR, transmitter empty
        self._polls = 0  # such reads that no write to THR followed, up to POLLING
        self._tx: list[int] = []

    def reset(self) -> None:
        """Master reset: as after power-on; input not yet read stays with the console."""
        with self._lock:
            self._clear_receiver()
            self._power_on()
            self._update_line()

    _BYTES = ("ier", "fcr", "lcr", "mcr", "lsr", "msr", "scr", "dll", "dlm")

    def save(self) -> State:
        """Registers, both FIFOs, and whether "transmitter empty" waits to be acknowledged."""
        with self._lock:
            state: State = {"version": 1, **{field: getattr(self, "_" + field) for field in self._BYTES}}
            state.update(rx=bytes(self._rx), tx=bytes(self._tx), transmit_pending=int(self._transmit_pending))
            return state

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for a state no UART can be in."""
        limits = {**dict.fromkeys(self._BYTES, 0xFF), "ier": 0x0F, "fcr": FCR_KEPT, "mcr": 0x1F}
        s = checked(self.name, state, {**limits, "transmit_pending": 1}, {"rx": FIFO_DEPTH, "tx": FIFO_DEPTH})
        if s["fcr"] & ~FCR_KEPT or (s["fcr"] and not s["fcr"] & FCR_ENABLE):
            raise ValueError(f"uart: no FIFO control register holds {s['fcr']:#x}")
        if len(s["rx"]) > (FIFO_DEPTH if s["fcr"] else 1):
            raise ValueError("uart: more than one received byte without a FIFO")
        if s["lsr"] & ~LSR_OVERRUN != (0 if s["tx"] else LSR_EMPTY) or (s["transmit_pending"] and s["tx"]):
            raise ValueError(f"uart: line status {s['lsr']:#x} contradicts a transmit FIFO of {len(s['tx'])}")
        if s["msr"] & ~MSR_DELTAS != self._modem_inputs(s["mcr"]):
            raise ValueError(f"uart: modem status {s['msr']:#x} contradicts modem control {s['mcr']:#x}")
        with self._lock:
            for field in self._BYTES:
                setattr(self, "_" + field, s[field])
            self._rx, self._tx = list(s["rx"]), list(s["tx"])
            self._from_host = 0 if self._mcr & MCR_LOOP else len(self._rx)
            self._transmit_pending, self._asked, self._polls = bool(s["transmit_pending"]), False, 0
            self._drain()
            self._pull_if_listened_for()
            self._update_line()
