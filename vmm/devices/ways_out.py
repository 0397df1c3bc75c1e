"""Ports by which kernels written for one emulator end the machine, without asking ACPI where its registers are.

=========================  ==========================================================================================
:class:`SystemControlA`    port 0x92: bit 0 resets, bit 1 is A20 (IBM PS/2, "System Control Port A")
:class:`SleepControl`      a lone PM1 control register: 0xb004 (Bochs, QEMU before 2.0), 0x4004 (VirtualBox)
:class:`BochsShutdown`     port 0x8900: the word "Shutdown", a letter at a time (Bochs)
:class:`ResetControl`      port 0xcf9: bit 2 resets (Intel ICH9, 13.7.5); with a PCI host it is in native/devices/pci.c
=========================  ==========================================================================================

QEMU's and Cloud Hypervisor's way is :class:`~vmm.devices.acpi_pm.PowerManagement`'s.

Source: osdev wiki, "Shutdown" and "Reboot".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.devices.acpi_pm import SLP_EN, ResetRegister
from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

RST_CPU = 4  # of the reset control register
A20 = 2
FAST_RESET = 1


class ResetControl(Device):
    """Port 0xcf9, and the three around it, where PCI's CONFIG_ADDRESS would be: only a byte of its own reaches it.

    Writing bit 2 calls ``on_reset``, whatever kind of reset the other bits ask for.
    """

    name = "reset-control"
    registers = {1: "reset"}

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """Reads as zero; what would be PCI's as all-ones."""
        return 0 if (offset, size) == (1, 1) else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset, if that is asked for."""
        if (offset, size) == (1, 1) and value & RST_CPU:
            self._on_reset()

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})


class SystemControlA(ResetRegister):
    """Port 0x92: writing bit 0 calls ``on_reset``. A20 is always open, and reads so."""

    name = "system-control-a"
    registers = {0: "control"}

    def __init__(self, on_reset: Callable[[], None]) -> None:
        super().__init__(on_reset, FAST_RESET, FAST_RESET)

    def read(self, offset: int, size: int) -> int:
        """A20 is open."""
        return A20


class SleepControl(Device):
    """Two bytes: writing SLP_EN with a sleep type in ``types`` calls ``on_poweroff``; the rest does nothing."""

    name = "sleep-control"
    registers = {0: "pm1_cnt"}

    def __init__(self, on_poweroff: Callable[[], None], types: tuple[int, ...]) -> None:
        self._on_poweroff = on_poweroff
        self._types = types

    def read(self, offset: int, size: int) -> int:
        """Reads as zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Power off, if that is asked for."""
        value <<= 8 * offset
        if value & SLP_EN and value >> 10 & 7 in self._types:
            self._on_poweroff()

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})


class BochsShutdown(Device):
    """One byte: the letters of "Shutdown", written in this order, call ``on_poweroff``."""

    name = "bochs-shutdown"
    registers = {0: "letter"}
    _WORD = b"Shutdown"

    def __init__(self, on_poweroff: Callable[[], None]) -> None:
        self._on_poweroff = on_poweroff
        self._heard = 0  # letters

    def read(self, offset: int, size: int) -> int:
        """Reads as zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Hear a letter; a wrong one begins again."""
        if offset:
            return
        letter = value & 0xFF
        self._heard = self._heard + 1 if letter == self._WORD[self._heard] else int(letter == self._WORD[0])
        if self._heard == len(self._WORD):
            self._heard = 0
            self._on_poweroff()

    def reset(self) -> None:
        """Forget the letters received."""
        self._heard = 0

    def save(self) -> State:
        """Return the number of letters received."""
        return {"version": 1, "heard": self._heard}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for more letters than the word has."""
        self._heard = checked(self.name, state, {"heard": len(self._WORD) - 1})["heard"]

    def capture(self) -> Any:
        """Return the number of letters received."""
        return self._heard

    def roll_back(self, captured: Any) -> None:
        """As many again."""
        self._heard = captured
