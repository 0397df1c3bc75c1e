"""Devices whose model is C: Python configures them and never meets them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from vmm.console import Console
    from vmm.devices.device import State
    from vmm.irq import GsiLine

_UART_FIELDS = (
    "ier", "iir", "fcr", "lcr", "mcr", "lsr", "msr", "scr", "dll", "dlm",
    "thr_empty_pending", "timeout_pending", "rx_count", "rx_trigger",
)  # fmt: skip


class NativeUart(Device):
    """16550A UART in C (``native/devices/uart.c``); :class:`vmm.devices.uart.Uart` is its readable twin.

    Eight byte-wide registers. ``line`` and ``console`` outlive it.
    """

    name = "uart"
    registers = {0: "RBR/THR", 1: "IER", 2: "IIR/FCR", 3: "LCR", 4: "MCR", 5: "LSR", 6: "MSR", 7: "SCR"}

    def __init__(self, line: GsiLine, console: Console) -> None:
        self.line = line
        self._console = console
        out = ffi.new("vmm_uart **")
        check(lib.vmm_uart_create(line.native, console.native, out))
        self._uart: Any = out[0]
        self.native = (lib.vmm_uart_ops(), self._uart)

    def read(self, offset: int, size: int) -> int:
        """One read, as the bus makes it."""
        return int(self.native[0].read(self._uart, offset, size))

    def write(self, offset: int, size: int, value: int) -> None:
        """One write, as the bus makes it."""
        self.native[0].write(self._uart, offset, size, value)

    def reset(self) -> None:
        """Power-on state; queued input stays queued."""
        lib.vmm_uart_reset(self._uart)

    def save(self) -> State:
        """Registers and receive FIFO."""
        state = ffi.new("vmm_uart_state *")
        lib.vmm_uart_save(self._uart, state)
        return {"version": 1, **{f: int(getattr(state, f)) for f in _UART_FIELDS}, "rx": bytes(state.rx)}

    def load(self, state: State) -> None:
        """Take a saved state; ``ValueError`` for one no UART can be in."""
        native = ffi.new("vmm_uart_state *")
        s = checked(self.name, state, dict.fromkeys(_UART_FIELDS, 0xFF), {"rx": len(native.rx)})
        if len(s["rx"]) != len(native.rx):
            raise ValueError(f"{self.name}: rx has {len(s['rx'])} bytes, not {len(native.rx)}")
        for field in _UART_FIELDS:
            setattr(native, field, s[field])
        ffi.memmove(native.rx, s["rx"], len(native.rx))
        if lib.vmm_uart_load(self._uart, native) < 0:
            raise ValueError("not a state a UART can be in")

    def capture(self) -> Any:
        """The same as the model has it."""
        state = ffi.new("vmm_uart_state *")
        lib.vmm_uart_save(self._uart, state)
        return state

    def roll_back(self, captured: Any) -> None:
        """Become that again."""
        check(lib.vmm_uart_load(self._uart, captured))

    def destroy(self) -> None:
        """Free it, once the bus is gone."""
        if self._uart is not None:
            lib.vmm_uart_destroy(self._uart)
            self._uart = None
