"""ACPI fixed hardware: power management registers, the power management timer, the reset register.

========  =======================================================================================
offset    register of :class:`PowerManagement`
========  =======================================================================================
0..1      PM1_STS events that happened; writing ones clears them
2..3      PM1_EN events that raise the system control interrupt
4..5      PM1_CNT SCI_EN (bit 0), SLP_TYP (bits 10-12), SLP_EN (bit 13, reads as zero)
========  =======================================================================================

:class:`PmTimer` is one 32-bit register, :class:`ResetRegister` one byte.
Source: ACPI 6.5, 4.8.2.1 (PM timer), 4.8.3.1 (PM1 event), 4.8.3.2 (PM1 control), 4.8.3.6 (reset register).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

PM_TIMER_HZ = 3_579_545

GBL, PWRBTN, SLPBTN, RTC, WAK = 1 << 5, 1 << 8, 1 << 9, 1 << 10, 1 << 15
STATUS_BITS = GBL | PWRBTN | SLPBTN | RTC | WAK
ENABLE_BITS = STATUS_BITS & ~WAK
# Cloud Hypervisor's sleep control register (ACPI 6.5, 4.8.3.7) is at PM1_STS here: SLP_EN, type 5. As a write of
# PM1_STS it would clear a reserved bit, which no ACPI driver does (4.8.3.1.1).
SLEEP_CONTROL_S5 = 0x34
SCI_EN = 1
SLP_EN = 1 << 13
CONTROL_BITS = 0x1C03  # SCI_EN, BM_RLD, SLP_TYP; GBL_RLS and SLP_EN are acts, not memory


def _merge(old: int, first: int, size: int, offset: int, value: int) -> int:
    """The 16-bit register at ``first`` after ``size`` bytes of ``value`` were written at ``offset``."""
    for i in range(2):
        at = first + i - offset
        if 0 <= at < size:
            old = old & ~(0xFF << 8 * i) | (value >> 8 * at & 0xFF) << 8 * i
    return old


class PowerManagement(Device):
    """PM1 event and control blocks. There is no SMI_CMD, so ACPI mode is always on and SCI_EN reads as one.

    Entering a sleep state whose SLP_TYP is in ``s5`` calls ``on_poweroff``; any other is over at once (WAK_STS). The
    DSDT names one type; kernels that read none write the type of the machine they were written for.
    """

    name = "acpi-pm"
    registers = {0: "pm1_sts", 2: "pm1_en", 4: "pm1_cnt"}

    def __init__(self, on_poweroff: Callable[[], None], s5: tuple[int, ...] = (5,)) -> None:
        self._on_poweroff = on_poweroff
        self._s5 = s5
        self._status = self._enable = 0
        self._control = SCI_EN

    def read(self, offset: int, size: int) -> int:
        """Any bytes of the three registers; beyond them all-ones."""
        block = self._status | self._enable << 16 | self._control << 32 | 0xFFFF << 48
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Any bytes of the three registers."""
        if offset == 0 and size <= 2 and value == SLEEP_CONTROL_S5:
            self._on_poweroff()
        self._status &= ~_merge(0, 0, size, offset, value)
        self._enable = _merge(self._enable, 2, size, offset, value) & ENABLE_BITS
        control = _merge(self._control, 4, size, offset, value)
        self._control = control & CONTROL_BITS | SCI_EN
        self._update_line()
        if control & SLP_EN:
            if control >> 10 & 7 in self._s5:
                self._on_poweroff()
            else:
                self._event(WAK)

    def press_power_button(self) -> None:
        """Ask the guest to shut down: PWRBTN_STS, and the interrupt if the guest enabled it."""
        self._event(PWRBTN)

    def _event(self, bit: int) -> None:
        self._status |= bit
        self._update_line()

    def _update_line(self) -> None:
        (self.line.raise_ if self._status & self._enable else self.line.lower)()

    def reset(self) -> None:
        """No events, none enabled."""
        self._status = self._enable = 0
        self._control = SCI_EN
        self._update_line()

    def save(self) -> State:
        """The three registers."""
        return {"version": 1, "status": self._status, "enable": self._enable, "control": self._control}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for bits that do not exist."""
        s = checked(self.name, state, dict.fromkeys(("status", "enable", "control"), 0xFFFF))
        if s["status"] & ~STATUS_BITS or s["enable"] & ~ENABLE_BITS or s["control"] & ~CONTROL_BITS | ~s["control"] & 1:
            raise ValueError("acpi-pm: bits are set that these registers do not have, or SCI_EN is clear")
        self.roll_back((s["status"], s["enable"], s["control"]))

    def capture(self) -> Any:
        """The same as they are kept."""
        return self._status, self._enable, self._control

    def roll_back(self, captured: Any) -> None:
        """Become that again."""
        self._status, self._enable, self._control = captured
        self._update_line()


class PmTimer(Device):
    """A 24-bit counter at 3.579545 MHz, without the overflow event (TMR_STS): a guest must read it often enough.

    ``clock`` returns nanoseconds and never runs backwards.
    """

    name = "pm-timer"
    registers = {0: "tmr_val"}

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._zero = clock()  # when the counter was zero

    def _ticks(self) -> int:
        return (self._clock() - self._zero) * PM_TIMER_HZ // 10**9

    def read(self, offset: int, size: int) -> int:
        """The counter; bits 24 and up are zero."""
        return (self._ticks() & 0xFFFFFF) >> 8 * offset

    def reset(self) -> None:
        """Count from zero."""
        self._zero = self._clock()

    def save(self) -> State:
        """The counter."""
        return {"version": 1, "ticks": self._ticks() & 0xFFFFFF}

    def load(self, state: State) -> None:
        """Continue counting from :meth:`save`'s value. Raises ``ValueError`` for one beyond 24 bits."""
        ticks = checked(self.name, state, {"ticks": 0xFFFFFF})["ticks"]
        # Rounded up, or the division in _ticks would lose a tick on every save and load.
        self._zero = self._clock() + (-ticks * 10**9) // PM_TIMER_HZ

    def capture(self) -> Any:
        """Nanoseconds since it was zero."""
        return self._clock() - self._zero

    def roll_back(self, captured: Any) -> None:
        """Continue counting from the loaded value."""
        self._zero = self._clock() - int(captured)


class ResetRegister(Device):
    """One byte: writing ``value`` (in the bits of ``mask``) calls ``on_reset``, anything else does nothing."""

    name = "acpi-reset"
    registers = {0: "reset"}

    def __init__(self, on_reset: Callable[[], None], value: int = 1, mask: int = 0xFF) -> None:
        self._on_reset = on_reset
        self._value = value
        self._mask = mask

    def read(self, offset: int, size: int) -> int:
        """Reads as zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset if it is the value."""
        if offset == 0 and value & self._mask == self._value:
            self._on_reset()

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})
