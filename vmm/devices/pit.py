"""i8254 programmable interval timer in user space.

======  ======================================================================================================
offset  register (port 0x40 is offset 0, port 0x61 offset 0x21)
======  ======================================================================================================
0..2    counter of channel 0 (timer interrupt), 1 (memory refresh), 2 (speaker): 16 bits, by the access mode
3       write: channel (bits 6-7; 3 is read-back), access mode (4-5; 0 latches), mode (1-3), BCD (0)
0x21    gate of channel 2 (bit 0), speaker (1), refresh toggle (4, read only), channel 2's output (5, read only)
======  ======================================================================================================

Source: Intel 82C54 datasheet, "Control Word Format"; port 0x61 from the IBM PC/AT Technical Reference.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from vmm.devices.device import Device
from vmm.devices.i8254 import NS, Channel
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

CONTROL, PORT61 = 3, 0x21
SPEAKER_BITS, REFRESH, OUTPUT = 0x03, 0x10, 0x20
REFRESH_NS = 15_085  # between changes of the refresh toggle
SHORTEST_NS = 200_000  # between ticks, whatever the guest programs: a reload of 1 would take a whole host CPU


class Pit(Device):
    """An i8254 whose channel 0 pulses the line each time its output rises, for hosts where ticks drown the guest.

    A thread sleeps until the next rise (:meth:`start`, :meth:`stop`). Ticks come at least ``min_period`` seconds
    apart (and 200 us); those that fall due in between, or while the thread is late, are merged into one. ``clock``
    returns nanoseconds and never runs backwards.
    """

    name = "pit"
    registers = {0: "counter0", 1: "counter1", 2: "counter2", CONTROL: "control", PORT61: "port61"}

    def __init__(self, min_period: float = 0.0, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._min_period = max(int(min_period * NS), SHORTEST_NS)
        self._changed = threading.Condition()  # guards all below; held while the line is pulsed
        self._running = self._held = False
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
            if self._held:
                return None
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

    def hold(self) -> None:
        """No tick until :meth:`release`: what drives interrupt controllers must not while their state is taken."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        """Resume ticks; one that fell due meanwhile is delivered immediately."""
        with self._changed:
            self._held = False
            self._changed.notify()

    def stop(self) -> None:
        """Stop the thread and wait for it; counters continue. Must not be called from the line."""
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

    @property
    def armed(self) -> bool:
        """Whether channel 0's output will rise again."""
        with self._changed:
            return self._channels[0].next_rise() is not None

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
