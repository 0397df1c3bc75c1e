"""Pre-copy: send what the guest writes in rounds while it runs, until little is left."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmm.memory import runs_of
from vmm.migrate import wire
from vmm.migrate.wire import Channel, Kind
from vmm.snapshot.regions import Ram, pages_not_zero

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmm.memory import DirtyLog, GuestMemory
    from vmm.migrate.subject import Mover

    Runs = Iterable[tuple[int, int]]

HANDOVER = 0.05  # seconds of downtime beside memory: the state, creating devices there, three messages
ROUNDS_MAX = 60  # rounds after which a throttled guest is paused for the handover
WORTH_IT = 0.7  # a round makes progress if it leaves less than this share of the previous remainder
STEP = 0.2  # fraction by which each throttling step cuts the guest's share of time
SHARE_MIN = 0.02  # least share of its time that the guest keeps
SLICE = 0.05  # seconds of one run and pause of a throttled guest
_ZEROS = bytes(wire.DATA_MAX)


class Progress(NamedTuple):
    """Progress in bytes, bytes per second and seconds; ``share`` is the fraction of time in which the guest runs."""

    phase: str
    round: int
    sent: int
    remaining: int
    rate: float
    dirty_rate: float
    downtime: float
    share: float


class Interruptible(Protocol):
    """A migration that can be cancelled and reports its progress."""

    def check(self) -> None:
        """Raise if the migration is to end."""
        ...

    def show(self, progress: Progress, *, always: bool = False) -> None:
        """Report progress."""
        ...


class Part(Protocol):
    """A part of the machine's state that is sent while the guest writes it: memory, or a disk."""

    def remaining(self) -> int:
        """Collect what was written since the last send; return the bytes to send now, at first all of it."""
        ...

    def send(self, channel: Channel, each: Callable[[int], object] | None = None) -> None:
        """Send what remains; ``each`` is called after every frame with the bytes it covered."""
        ...


class MemoryPart:
    """A machine's memory as a :class:`Part`. ``log`` must be open before the first scan."""

    def __init__(self, memory: GuestMemory, log: DirtyLog) -> None:
        self._memory = memory
        self._log = log
        self._first: list[tuple[int, int]] | None = resident(memory)

    def remaining(self) -> int:
        """Return the bytes to send now: all that is resident at first, then what was written."""
        return self._log.collect() * wire.PAGE if self._first is None else sum(size for _, size in self._first)

    def send(self, channel: Channel, each: Callable[[int], object] | None = None) -> None:
        """Send that."""
        runs, self._first = self._first, None
        send_runs(channel, self._memory, self._log.take() if runs is None else runs, each)


class Rounds:
    """Send parts of a machine in rounds, each with what was written during the last, until little is left."""

    def __init__(
        self, migration: Interruptible, downtime: float, channel: Channel, parts: Sequence[Part], brake: Brake
    ) -> None:
        self.migration = migration
        self.downtime = downtime
        self.channel = channel
        self.parts = parts
        self.brake = brake
        self.round = 0
        self.rate = 0.0
        self.dirty_rate = 0.0

    def run(self) -> int:
        """Send rounds until little is left, and return how many it took."""
        remaining, before = self._remaining(), 0
        while True:
            self.round += 1
            left_before, before = before, remaining
            seconds = self._send(remaining)
            remaining = self._remaining()
            self.dirty_rate = remaining / seconds
            self._show(remaining, always=True)
            if self._expected(remaining) <= self.downtime or self.round >= ROUNDS_MAX:
                return self.round
            if self.round > 1 and remaining > WORTH_IT * left_before:
                self.brake.press()

    def _remaining(self) -> int:
        return sum(part.remaining() for part in self.parts)

    def _expected(self, remaining: int) -> float:
        return remaining / self.rate + HANDOVER if self.rate else 0.0

    def _send(self, remaining: int) -> float:
        began, sent = time.monotonic(), self.channel.sent

        def each(n: int) -> None:
            nonlocal remaining
            remaining = max(remaining - n, 0)
            self.migration.check()
            self._show(remaining)

        self.migration.check()
        for part in self.parts:
            part.send(self.channel, each)
        self.channel.send(Kind.ROUND)
        self.channel.receive(Kind.SEEN)  # the data has arrived, and is not only in a socket buffer
        seconds = max(time.monotonic() - began, 1e-6)
        if self.channel.sent - sent > wire.DATA_MAX or not self.rate:
            self.rate = (self.channel.sent - sent) / seconds
        return seconds

    def _show(self, remaining: int, *, always: bool = False) -> None:
        self.migration.show(
            Progress(
                "memory", self.round, self.channel.sent, remaining, self.rate, self.dirty_rate,
                self._expected(remaining), self.brake.share,
            ),
            always=always,
        )  # fmt: skip


class Brake:
    """Throttle a guest that writes faster than the link sends: pause it for a part of every slice of time."""

    def __init__(self, machine: Mover) -> None:
        self._machine = machine
        self.share = 1.0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def press(self) -> None:
        """Cut the guest's share of time by one step."""
        self.share = max(self.share * (1 - STEP), SHARE_MIN)
        if self._thread is None:
            self._thread = threading.Thread(target=self._hold, name="brake", daemon=True)
            self._thread.start()

    def _hold(self) -> None:
        while not self._end.is_set():
            self._machine.pause()
            try:
                self._end.wait(SLICE * (1 - self.share))
            finally:
                self._machine.resume()
            self._end.wait(SLICE * self.share)

    def __enter__(self) -> Brake:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()


def open_log(machine: Mover) -> DirtyLog:
    """Open a dirty log; a running machine is paused meanwhile."""
    machine.pause()
    try:
        return machine.memory.dirty_log()
    finally:
        machine.resume()


def resident(memory: GuestMemory) -> list[tuple[int, int]]:
    """Return the runs ``(gpa, size)`` of resident pages. Pages that were never touched are not touched now."""
    runs = []
    for region in memory.backing():
        ram = Ram(*region)
        bits = int.from_bytes(pages_not_zero(ram), "little")
        runs += [(ram.gpa + first * wire.PAGE, n * wire.PAGE) for first, n in runs_of(bits)]
    return runs


def send_runs(channel: Channel, memory: GuestMemory, runs: Runs, each: Callable[[int], object] | None = None) -> None:
    """Send these runs of memory; ``each`` is called after every frame with the bytes it covered."""
    for gpa, size in runs:
        for at in range(gpa, gpa + size, wire.DATA_MAX):
            # A copy, so that the checksum matches what is sent although the guest writes meanwhile.
            data = memory.read(at, min(wire.DATA_MAX, gpa + size - at))
            if data == _ZEROS[: len(data)]:
                channel.send(Kind.ZEROS, len(data).to_bytes(8, "little"), address=at)
            else:
                channel.send(Kind.PAGES, data, address=at)
            if each:
                each(len(data))


def send_rest(channel: Channel, parts: Iterable[Part]) -> None:
    """Send what was written since the last send. The machine must be paused."""
    for part in parts:
        part.remaining()
        part.send(channel)
