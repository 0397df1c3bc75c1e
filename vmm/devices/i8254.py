"""One counter of an i8254, computed from the time rather than run: :class:`vmm.devices.pit.Pit` has three.

Source: Intel 82C54 datasheet, "Mode Definitions", "Counter Latch Command", "Read-Back Command".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from vmm.devices.device import State

HZ = 1_193_182
NS = 10**9
LOW, HIGH, BOTH = 1, 2, 3  # access modes; 0 in a control word latches
ONE_SHOT, TRIGGERED_ONE_SHOT, RATE, SQUARE, STROBE, TRIGGERED_STROBE = range(6)
TICKS_MOST = 1 << 60


class Channel:
    """One counter. Nothing runs: count and output are computed from the time, ``now`` in nanoseconds.

    A new count starts at once in every mode; the datasheet lets modes 2 and 3 finish the period they are in.
    """

    LIMITS = {"mode": 5, "access": 3, "bcd": 1, "reload": 0x10000, "low": 0xFF, "write_high": 1, "read_high": 1,
              "gate": 1, "armed": 1, "seen": TICKS_MOST}  # fmt: skip
    LATCHES = {"latched_status": 1, "latched_count": 2}

    def __init__(self) -> None:
        self.mode, self.access, self.bcd, self.gate = SQUARE, BOTH, 0, 1
        self.reload = 0x10000
        self.armed = 0  # a count was written since the control word
        self.low = self.write_high = self.read_high = 0  # halves of 16-bit accesses
        self.latched_status = self.latched_count = b""
        self.halt(0)

    # -- time: in ticks of 1/HZ seconds since the count was loaded or triggered ---------------------------------

    def go(self, now: int, ticks: int = 0) -> None:
        """Count, from ``ticks`` on."""
        self.start: int | None = now - -(-ticks * NS // HZ)
        self.seen = ticks  # output edges until here have been delivered

    def halt(self, ticks: int) -> None:
        """Stand still at ``ticks``."""
        self.start, self.halted_at, self.seen = None, ticks, ticks

    def ticks(self, now: int) -> int:
        """Where it is."""
        return self.halted_at if self.start is None else max(now - self.start, 0) * HZ // NS

    def count(self, now: int) -> int:
        """What the counter reads as."""
        ticks = self.ticks(now)
        if self.mode == RATE:
            value = self.reload - ticks % self.reload
        elif self.mode == SQUARE:  # down by twos, twice a period
            value = self.reload - 2 * ticks % self.reload & ~1
        else:
            value = self.reload - ticks  # and on, modulo, after it has reached zero
        return int(str(value % 10_000), 16) if self.bcd else value & 0xFFFF

    def output(self, now: int) -> int:
        """The level of OUT."""
        ticks = self.ticks(now)
        if self.mode == ONE_SHOT:
            return int(self.armed and ticks >= self.reload)
        if self.start is None:
            return 1
        if self.mode == TRIGGERED_ONE_SHOT:
            return int(ticks >= self.reload)
        if self.mode == RATE:
            return int(ticks % self.reload != self.reload - 1)
        if self.mode == SQUARE:
            return int(ticks % self.reload < (self.reload + 1) // 2)
        return int(ticks != self.reload)

    def next_rise(self) -> int | None:
        """When (ns) OUT rises next, after what has been ``seen``; ``None``: never."""
        if self.start is None:
            return None
        if self.mode in (RATE, SQUARE):
            rise = (self.seen // self.reload + 1) * self.reload
        else:
            rise = self.reload + (self.mode in (STROBE, TRIGGERED_STROBE))
        return self.start + -(-rise * NS // HZ) if rise > self.seen else None

    # -- programming ------------------------------------------------------------------------------------------------

    def control(self, word: int) -> None:
        """Take a control word that is not a latch command."""
        self.access, self.bcd = word >> 4 & 3, word & 1
        self.mode = word >> 1 & 7
        if self.mode > TRIGGERED_STROBE:
            self.mode -= 4  # 6 and 7 are 2 and 3
        self.armed = self.write_high = self.read_high = 0
        self.latched_status = self.latched_count = b""
        self.halt(0)

    def write(self, byte: int, now: int) -> None:
        """Take a byte of the count."""
        if self.access == BOTH and not self.write_high:
            self.low, self.write_high = byte, 1
            if self.mode == ONE_SHOT:
                self.halt(0)  # "Writing the first byte disables counting"
            return
        self.write_high = 0
        raw = byte if self.access == LOW else byte << 8 | (self.low if self.access == BOTH else 0)
        if self.bcd:
            self.reload = sum((raw >> 4 * i & 15) * 10**i for i in range(4)) or 10_000
        else:
            self.reload = raw or 0x10000
        self.armed = 1
        if self.gate and self.mode not in (TRIGGERED_ONE_SHOT, TRIGGERED_STROBE):
            self.go(now)
        else:
            self.halt(0)

    def read(self, now: int) -> int:
        """A latched status, else a latched count's next byte, else the count's as it runs."""
        if self.latched_status:
            byte, self.latched_status = self.latched_status[0], b""
            return byte
        if self.latched_count:
            byte, self.latched_count = self.latched_count[0], self.latched_count[1:]
            return byte
        high = self.read_high if self.access == BOTH else self.access == HIGH
        if self.access == BOTH:
            self.read_high ^= 1
        return self.count(now) >> (8 if high else 0) & 0xFF

    def latch_count(self, now: int) -> None:
        """Hold the count until it is read; a second latch before that is ignored."""
        if not self.latched_count:
            both = self.count(now).to_bytes(2, "little")
            self.latched_count = {LOW: both[:1], HIGH: both[1:], BOTH: both}[self.access]

    def latch_status(self, now: int) -> None:
        """Hold output, null count, access, mode and BCD until read."""
        null = not self.armed
        status = self.output(now) << 7 | null << 6 | self.access << 4 | self.mode << 1 | self.bcd
        self.latched_status = self.latched_status or bytes([status])

    def set_gate(self, level: int, now: int) -> None:
        """Drive GATE: it pauses modes 0 and 4, stops and restarts 2 and 3, triggers 1 and 5."""
        rising, falling = level > self.gate, level < self.gate
        self.gate = level
        if rising and self.armed:
            self.go(now, self.halted_at if self.mode in (ONE_SHOT, STROBE) else 0)
        elif falling and self.mode in (ONE_SHOT, STROBE):
            self.halt(self.ticks(now))
        elif falling and self.mode in (RATE, SQUARE):
            self.halt(0)

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self, now: int) -> State:
        """All fields; the time as ``ticks``."""
        fields = (*self.LIMITS, *self.LATCHES)
        running = int(self.start is not None)
        return {"version": 1, "ticks": self.ticks(now), "running": running, **{f: getattr(self, f) for f in fields}}

    def load(self, state: State, now: int) -> None:
        """Become what :meth:`save` recorded, ``now``."""
        s = checked("pit", state, {**self.LIMITS, "ticks": TICKS_MOST, "running": 1}, self.LATCHES)
        if not s["reload"] or not s["access"] or s["running"] > s["armed"] or s["seen"] > s["ticks"]:
            raise ValueError("pit: a channel counts from zero, without access mode or count, or ahead of its time")
        for field in (*self.LIMITS, *self.LATCHES):
            setattr(self, field, s[field])
        self.halt(s["ticks"])
        if s["running"]:
            self.go(now, s["ticks"])
            self.seen = s["seen"]
