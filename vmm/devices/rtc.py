"""MC146818 real-time clock and CMOS memory.

======  ==========================================================================================
offset  register (port 0x70 is offset 0)
======  ==========================================================================================
0       write: index of the CMOS byte, bits 0-6; bit 7 masks NMIs on PCs (remembered)
1       the byte: 0x00-0x09 time, date and alarm, 0x0a-0x0d registers A-D, 0x32 century, rest memory
======  ==========================================================================================

The time is computed when it is read, and so is register A's update-in-progress bit: it is set for the last 2228 us of
each second (244 us of warning and an update of 1984 us, as with a 32.768 kHz crystal), and the new time is there when
it falls. No alarm or periodic interrupt is raised; their bits in B are remembered. Firmware's memory size is in
0x15-0x18, 0x30-0x31 and 0x34-0x35.
Source: Motorola MC146818 datasheet, "Time, Calendar and Alarm Locations", "Registers"; century as the ACPI FADT tells.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
A_RUNNING = 0x26  # 32.768 kHz time base, 1024 Hz periodic rate: as firmware leaves it
A_UPDATING, A_DIVIDER, A_DIVIDER_RUNS = 0x80, 0x70, 0x20
UPDATE_NS = (244 + 1984) * 1000  # MC146818 datasheet, table 6: tBUC and tUC
B_SET, B_BINARY, B_24H = 0x80, 0x04, 0x02
D_VALID = 0x80
PM = 0x80  # of the hours, on a twelve-hour clock
YEARS = 10_000  # the clock has four digits, and goes on at 0000; a guest may set two that are no decimal digits
OFFSET_MOST = 1 << 40  # seconds: beyond any two dates of four digits
NS = 10**9


def seconds_since_1970(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int:
    """Proleptic Gregorian date and time, UTC, to POSIX time. Fields out of range carry into the next."""
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    # Years from March, so that the leap day is the last: the months' lengths are then linear in 153/5.
    y, m = (year, month - 3) if month > 2 else (year - 1, month + 9)
    days = 365 * y + y // 4 - y // 100 + y // 400 + (153 * m + 2) // 5 + day - 1 - 719468
    return ((days * 24 + hour) * 60 + minute) * 60 + second


class Rtc(Device):
    """Time of day from ``clock`` (POSIX seconds, default the host's), in UTC; the guest may set it, for itself.

    A state that is loaded has the host's time again, but for what the guest set, until it is :meth:`set_back`; one
    that was captured continues from the saved time.

    ``memory`` is the size of RAM below 4 GiB in bytes, for guests that ask CMOS.
    """

    name = "rtc"
    registers = {0: "index", 1: "data"}

    def __init__(self, clock: Callable[[], float] = time.time, memory: int = 0) -> None:
        self._clock = clock
        self._memory = memory
        self._power_on()

    def _power_on(self) -> None:
        self._index = 0
        self._offset = 0  # ns that the guest's clock is ahead of ours
        self._cmos = bytearray(128)
        self._cmos[A], self._cmos[B], self._cmos[D] = A_RUNNING, B_24H, D_VALID
        base = min(self._memory >> 10, 640)
        above_1m = min(max(self._memory - (1 << 20), 0) >> 10, 0xFFFF)  # KiB
        above_16m = min(max(self._memory - (16 << 20), 0) >> 16, 0xFFFF)  # units of 64 KiB
        for at, value in ((0x15, base), (0x17, above_1m), (0x30, above_1m), (0x34, above_16m)):
            self._cmos[at : at + 2] = value.to_bytes(2, "little")

    # -- time: computed into the time bytes, unless the guest holds them (B.SET) to set them ----------------------

    def _encode(self, value: int) -> int:
        return value if self._cmos[B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, byte: int) -> int:
        return byte if self._cmos[B] & B_BINARY else (byte >> 4) * 10 + (byte & 15)

    def _now(self) -> int:
        seconds, part = divmod(self._clock(), 1)
        return int(seconds) * NS + int(part * NS) + self._offset

    def _show_time(self) -> None:
        if self._cmos[B] & B_SET:
            return
        now = time.gmtime(self._now() // NS)
        hour = self._encode(now.tm_hour)
        if not self._cmos[B] & B_24H:
            hour = self._encode((now.tm_hour + 11) % 12 + 1) | (PM if now.tm_hour >= 12 else 0)
        fields = (now.tm_sec, now.tm_min, 0, (now.tm_wday + 1) % 7 + 1, now.tm_mday, now.tm_mon)
        for at, value in zip(TIME, fields, strict=False):
            self._cmos[at] = self._encode(value)
        self._cmos[HOURS] = hour
        self._cmos[CENTURY], self._cmos[YEAR] = map(self._encode, divmod(now.tm_year % YEARS, 100))

    def _updating(self) -> int:
        """The bit of register A: no update takes place while the guest holds the time, or the divider."""
        if self._cmos[B] & B_SET or self._cmos[A] & A_DIVIDER != A_DIVIDER_RUNS:
            return 0
        return A_UPDATING if self._now() % NS >= NS - UPDATE_NS else 0

    def _take_time(self) -> None:
        second, minute, _, _, day, month, year, century = (self._decode(self._cmos[at]) for at in TIME)
        hour = self._cmos[HOURS]
        if self._cmos[B] & B_24H:
            hour = self._decode(hour)
        else:
            hour = self._decode(hour & ~PM) % 12 + (12 if hour & PM else 0)
        set_to = seconds_since_1970((century * 100 + year) % YEARS, month, day, hour, minute, second)
        self._offset += (set_to - self._now() // NS) * NS

    # -- ports ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The byte under the index; the index itself reads as all-ones, as on PCs."""
        if offset != 1:
            return (1 << 8 * size) - 1
        at = self._index & 0x7F
        if at in TIME:
            self._show_time()
        return self._cmos[at] | (self._updating() if at == A else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose a byte, or change it; two bytes at offset 0 do both."""
        if offset == 0:
            self._index = value & 0xFF
        if offset == 1 or (offset == 0 and size > 1):
            self._write_byte(self._index & 0x7F, (value >> 8 * (1 - offset)) & 0xFF)

    def _write_byte(self, at: int, value: int) -> None:
        if at in TIME:
            self._show_time()
            self._cmos[at] = value
            if not self._cmos[B] & B_SET:
                self._take_time()
        elif at == B:
            self._show_time()  # what is held from now on, if this sets B.SET
            was_held = self._cmos[B] & B_SET
            self._cmos[B] = value
            if was_held and not value & B_SET:
                self._take_time()
        elif at == A:
            self._cmos[A] = value & ~A_UPDATING
        elif at not in (C, D):
            self._cmos[at] = value

    # -- life and state -------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """A PC's reset leaves CMOS and the time alone: only the index, and the bits RESET# clears in B."""
        self._index = 0
        self._cmos[B] &= ~0x78  # PIE, AIE, UIE, SQWE

    def save(self) -> State:
        """Memory, index, and how far its time is ahead of ours: ``ahead - behind`` seconds, and ``fraction`` ns."""
        seconds, fraction = divmod(self._offset, NS)
        time = {"ahead": max(seconds, 0), "behind": max(-seconds, 0), "fraction": fraction}
        return {"version": 1, "index": self._index, "cmos": bytes(self._cmos), **time}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for a state no clock can be in."""
        most = {"index": 0xFF, "ahead": OFFSET_MOST, "behind": OFFSET_MOST, "fraction": NS - 1}
        s = checked(self.name, state, most, {"cmos": 128})
        cmos = s["cmos"]
        if len(cmos) != 128 or cmos[A] & A_UPDATING or cmos[C] or cmos[D] != D_VALID or (s["ahead"] and s["behind"]):
            raise ValueError("rtc: memory is not 128 bytes, or its registers A, C or D cannot read so")
        self._index, self._cmos = s["index"], bytearray(cmos)
        self._offset = (s["ahead"] - s["behind"]) * NS + s["fraction"]

    def capture(self) -> Any:
        """Memory and index, and the time."""
        return self._index, bytes(self._cmos), self._now()

    def roll_back(self, captured: Any) -> None:
        """Load a captured state, and continue from its time."""
        self._index, cmos, now = captured
        self._cmos = bytearray(cmos)
        self._offset += now - self._now()

    def set_back(self, ns: int) -> None:
        """Have the time of so many nanoseconds ago."""
        self._offset -= ns
