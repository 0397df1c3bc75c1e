"""i8254 programmable interval timer in user space.

======  ======================================================================================================
offset  register (port 0x40 is offset 0, port 0x61 offset 0x21)
======  ======================================================================================================
0..2    counter of channel 0 (timer interrupt), 1 (memory refresh), 2 (speaker): 16 bits, by the access mode
3       write: channel (bits 6-7; 3 is read-back), access mode (4-5; 0 latches), mode (1-3), BCD (0)
0x21    gate of channel 2 (bit 0), speaker (1), refresh toggle (4, read only), channel 2's output (5, read only)
======  ======================================================================================================

Source: Intel 82C54 datasheet, "Control Word Format", "Read-Back Command", "Mode Definitions"; port 0x61 from the
IBM PC/AT Technical Reference.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from vmm.devices.device import Device
from vmm.devices.state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

HZ = 1_193_182
NS = 10**9
CONTROL, PORT61 = 3, 0x21
LOW, HIGH, BOTH = 1, 2, 3  # access modes; 0 latches
ONE_SHOT, TRIGGERED_ONE_SHOT, RATE, SQUARE, STROBE, TRIGGERED_STROBE = range(6)
SPEAKER_BITS, REFRESH, OUTPUT = 0x03, 0x10, 0x20
REFRESH_NS = 15_085  # between changes of the refresh toggle
SHORTEST_NS = 200_000  # between ticks, whatever the guest programs: a reload of 1 would take a whole host CPU
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
        return self.start - -(-rise * NS // HZ) if rise > self.seen else None

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


class Pit(Device):
    """An i8254 whose channel 0 pulses the line each time its output rises, for hosts where ticks drown the guest.

    A thread sleeps until the next rise (:meth:`start`, :meth:`stop`). Ticks come at least ``min_period`` seconds
    apart (and 200 us); those that fall due in between, or while the thread is late, are merged into one. ``clock``
    answers nanoseconds and never runs backwards.
    """

    name = "pit"
    registers = {0: "counter0", 1: "counter1", 2: "counter2", CONTROL: "control", PORT61: "port61"}

    def __init__(self, min_period: float = 0.0, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._min_period = max(int(min_period * NS), SHORTEST_NS)
        self._changed = threading.Condition()  # guards all below; held while the line is pulsed
        self._running = False
        self._thread: threading.Thread | None = None
        self._power_on()

    def _power_on(self) -> None:
        self._channels = (Channel(), Channel(), Channel())
        self._channels[2].gate = 0
        self._port61 = 0
        self._pulsed_at: int | None = None

    # -- ticks --------------------------------------------------------------------------------------------------------

    def service(self) -> float | None:
        """Pulse the line if that is due. Answers the seconds until it is next; ``None``: nothing is programmed."""
        with self._changed:
            now, channel = self._clock(), self._channels[0]
            due = channel.next_rise()
            if due is not None and due <= now and self._may_pulse(now):
                channel.seen, self._pulsed_at = channel.ticks(now), now
                self.line.pulse()
                due = channel.next_rise()
            if due is None:
                return None
            if self._pulsed_at is not None:
                due = max(due, self._pulsed_at + self._min_period)
            return max(due - now, 0) / NS

    def _may_pulse(self, now: int) -> bool:
        return self._pulsed_at is None or now >= self._pulsed_at + self._min_period

    def _run(self) -> None:
        with self._changed:
            while self._running:
                self._changed.wait(self.service())

    def start(self) -> None:
        """Start the thread; once is enough."""
        with self._changed:
            if self._running:
                return
            self._running = True
            self._thread = threading.Thread(target=self._run, name="pit", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it; counters go on. Not to be called from the line."""
        with self._changed:
            self._running = False
            self._changed.notify()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    # -- ports --------------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A counter's byte, or port 0x61; the control word reads as all-ones."""
        with self._changed:
            now = self._clock()
            if offset < CONTROL:
                return self._channels[offset].read(now)
            if offset == PORT61:
                refresh = REFRESH if now // REFRESH_NS & 1 else 0
                return self._port61 | refresh | (OUTPUT if self._channels[2].output(now) else 0)
            return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Program a channel, or drive port 0x61."""
        value &= 0xFF
        with self._changed:
            now = self._clock()
            if offset < CONTROL:
                self._channels[offset].write(value, now)
            elif offset == CONTROL:
                self._control(value, now)
            elif offset == PORT61:
                self._port61 = value & SPEAKER_BITS
                self._channels[2].set_gate(value & 1, now)
            if offset in (0, CONTROL):
                self._changed.notify()

    def _control(self, word: int, now: int) -> None:
        select = word >> 6
        if select == 3:  # read-back: a clear bit 5 latches counts, a clear bit 4 statuses, of the channels chosen
            for i, channel in enumerate(self._channels):
                if word >> (i + 1) & 1 and not word & 0x20:
                    channel.latch_count(now)
                if word >> (i + 1) & 1 and not word & 0x10:
                    channel.latch_status(now)
        elif word & 0x30:
            self._channels[select].control(word)
        else:
            self._channels[select].latch_count(now)

    # -- life and state -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """No channel programmed, so no tick; a running thread sleeps until one is."""
        with self._changed:
            self._power_on()

    def save(self) -> State:
        """Three channels and port 0x61."""
        with self._changed:
            now = self._clock()
            channels = [channel.save(now) for channel in self._channels]
            return {"version": 1, "port61": self._port61, "channels": channels}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for a state no i8254 can be in."""
        channels = state.get("channels") if isinstance(state, dict) else None
        if not isinstance(channels, list) or len(channels) != 3:
            raise ValueError("pit: a state has three channels")
        port61 = checked(self.name, {**state, "channels": b""}, {"port61": SPEAKER_BITS}, {"channels": 0})["port61"]
        loaded = (Channel(), Channel(), Channel())
        with self._changed:
            now = self._clock()
            for channel, saved in zip(loaded, channels, strict=True):
                channel.load(saved, now)
            if loaded[2].gate != port61 & 1 or not loaded[0].gate or not loaded[1].gate:
                raise ValueError("pit: gates 0 and 1 are always up, gate 2 is bit 0 of port 0x61")
            self._channels, self._port61, self._pulsed_at = loaded, port61, None
            self._changed.notify()
