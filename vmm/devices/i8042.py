"""i8042 keyboard controller with nothing plugged in: what remains of it in PCs is the reset line and A20.

======  ======================================================================================================
offset  register (port 0x60 is offset 0, port 0x64 offset 4)
======  ======================================================================================================
0       data: read the output buffer; write a command's parameter, or a byte for the keyboard
4       read status: output full 0x01, system 0x04, last write was a command 0x08, unlocked 0x10, timeout 0x40;
        write a command
======  ======================================================================================================

Source: Intel 8042 as in the IBM PC/AT Technical Reference, "Keyboard Controller"; PS/2 additions for the second port.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

DATA, STATUS = 0, 4
OUTPUT_FULL, SYSTEM, COMMAND, UNLOCKED, TIMEOUT = 0x01, 0x04, 0x08, 0x10, 0x40
KEYBOARD_INTERRUPT, KEYBOARD_OFF, SECOND_OFF = 0x01, 0x10, 0x20  # of the command byte
RESET_HIGH, A20 = 0x01, 0x02  # of the output port: bit 0 low resets
NO_ANSWER = 0xFE

# Commands that return a constant. Port tests: 0 is good; 1, clock stuck low, is how there is no second port.
ANSWERS = {0xAA: 0x55, 0xAB: 0x00, 0xA9: 0x01, 0xC0: 0x80}
COMMAND_BYTE_BITS = {
    0xA7: (SECOND_OFF, True),
    0xA8: (SECOND_OFF, False),
    0xAD: (KEYBOARD_OFF, True),
    0xAE: (KEYBOARD_OFF, False),
}


class I8042(Device):
    """Calls ``on_reset`` when the reset line is pulsed (commands 0xf0-0xff with bit 0 clear) or driven low (0xd1).

    Bytes for a keyboard result immediately in 0xfe and the timeout bit, so that a driver gives up without
    waiting. A20 is remembered, and always open.
    """

    name = "i8042"
    registers = {DATA: "data", STATUS: "status/command"}

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._power_on()

    def _power_on(self) -> None:
        self._ram = bytearray(32)  # byte 0 is the command byte
        self._ram[0] = SYSTEM | KEYBOARD_OFF | SECOND_OFF
        self._output_port = RESET_HIGH | A20
        self._output = 0
        self._status = SYSTEM | UNLOCKED
        self._expects = 0  # the command whose parameter comes next, 0: none

    def read(self, offset: int, size: int) -> int:
        """Take the output buffer, or look at the status."""
        if offset == STATUS:
            return self._status
        if offset != DATA:
            return (1 << 8 * size) - 1
        self._status &= ~(OUTPUT_FULL | TIMEOUT)
        self._update_line()
        return self._output

    def write(self, offset: int, size: int, value: int) -> None:
        """A command, or what follows one."""
        value &= 0xFF
        if offset == STATUS:
            self._status |= COMMAND
            self._expects = 0
            self._command(value)
        elif offset == DATA:
            self._status &= ~COMMAND
            command, self._expects = self._expects, 0
            self._parameter(command, value)
        self._update_line()

    def _answer(self, byte: int, status: int = 0) -> None:
        self._output = byte
        self._status = self._status & ~TIMEOUT | OUTPUT_FULL | status

    def _command(self, command: int) -> None:
        if command in ANSWERS:
            self._answer(ANSWERS[command])
        elif command in COMMAND_BYTE_BITS:
            bit, on = COMMAND_BYTE_BITS[command]
            self._ram[0] = self._ram[0] | bit if on else self._ram[0] & ~bit
        elif command < 0x40:
            if command >= 0x20:
                self._answer(self._ram[command & 31])
        elif 0x60 <= command < 0x80 or command in (0xD1, 0xD2, 0xD3, 0xD4):
            self._expects = command
        elif command == 0xD0:
            self._answer(self._output_port)
        elif command in (0xDD, 0xDF):
            self._output_port = self._output_port & ~A20 | (A20 if command == 0xDF else 0)
        elif command >= 0xF0 and not command & RESET_HIGH:
            self._on_reset()

    def _parameter(self, command: int, value: int) -> None:
        if 0x60 <= command < 0x80:
            self._ram[command & 31] = value
        elif command == 0xD1:
            self._output_port = value | RESET_HIGH
            if not value & RESET_HIGH:
                self._on_reset()
        elif command == 0xD2:
            self._answer(value)
        else:  # for the keyboard (no command), or the second port (0xd3, 0xd4): there is no device
            self._answer(NO_ANSWER, TIMEOUT)

    def _update_line(self) -> None:
        full = self._status & OUTPUT_FULL and self._ram[0] & KEYBOARD_INTERRUPT
        (self.line.raise_ if full else self.line.lower)()

    def reset(self) -> None:
        """Power-on state: nothing to read, interrupts off, both ports off."""
        self._power_on()
        self._update_line()

    def save(self) -> State:
        """The controller's RAM, buffers and output port."""
        names = ("output_port", "output", "status", "expects")
        return {"version": 1, "ram": bytes(self._ram), **{n: getattr(self, "_" + n) for n in names}}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for a state no controller can be in."""
        numbers = dict.fromkeys(("output_port", "output", "status", "expects"), 0xFF)
        s = checked(self.name, state, numbers, {"ram": 32})
        fixed = s["status"] & (SYSTEM | UNLOCKED | 0xA2)
        if len(s["ram"]) != 32 or fixed != SYSTEM | UNLOCKED or not s["output_port"] & RESET_HIGH:
            raise ValueError(f"i8042: status {s['status']:#x}, output port {s['output_port']:#x} or RAM cannot be")
        self._ram = bytearray(s["ram"])
        for field in numbers:
            setattr(self, "_" + field, s[field])
        self._update_line()

    def capture(self) -> Any:
        """The same as it is kept."""
        return bytes(self._ram), self._output_port, self._output, self._status, self._expects

    def roll_back(self, captured: Any) -> None:
        """Become that again."""
        ram, self._output_port, self._output, self._status, self._expects = captured
        self._ram = bytearray(ram)
        self._update_line()
