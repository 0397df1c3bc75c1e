"""Looking at a machine while it runs: samples of where its vCPUs are, and whether it has stalled.

A guest is stalled when for ``stall`` seconds (off by default) all of these hold:

- nothing was printed on the console;
- no virtio queue had a request or a doorbell;
- no access to a device was one that had not been seen in that time already: polling a register that always returns
  the same is no progress, nor is reading a clock or programming a timer;
- each vCPU, sampled :data:`ROUNDS` times, is in an endless loop (:func:`~vmm.observe.samples.looping`), or was halted
  in at least a quarter of the samples: idle, with ticks in between.

A loop that computes has other registers each time round: a counter, a pointer that moves. It is not endless for all
that can be seen, and never a stall; the price is that a loop which counts up forever is no stall either.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmm.bus import MMIO, PIO
from vmm.observe.samples import Sample, by_vcpu, looping

if TYPE_CHECKING:
    from vmm.cpu.vcpu import Exit
    from vmm.observe.subject import Sampled

ROUNDS = 32
_BEFORE_TIMEOUT = 4  # the samples of a time limit are of its last quarter

_CLOCKS = frozenset({"pit", "pm-timer", "rtc"})

TIMEOUT, STALLED = 1, 4  # codes of Machine.interrupt


def take(machine: Sampled) -> list[Sample]:
    """A sample of each vCPU that has been started; they are held for it."""
    machine.pause()
    try:
        found, now = [], time.monotonic()
        for vcpu in machine.vcpus:
            state = vcpu.mp_state
            if state in ("runnable", "halted"):
                r = vcpu.registers()
                rip = r["rip"] + (0 if vcpu.bits == 64 else r["cs_base"])
                ran = machine.processor_seconds(vcpu.number)
                exits = vcpu.exit_counts()
                accesses = exits.get("io", 0) + exits.get("mmio", 0)
                found.append(Sample(now, vcpu.number, rip, state == "halted", hash(tuple(r.items())), ran, accesses))
        return found
    finally:
        machine.resume()


def _idle(samples: list[Sample]) -> bool:
    return sum(sample.halted for sample in samples) >= len(samples) / 4


class Watch:
    """Watches a machine that has a time limit, or may be stalled, or both; leaves what it saw in ``machine.samples``.

    The caller waits :attr:`left` seconds at a time for the end, then calls :meth:`due`.
    """

    def __init__(self, machine: Sampled, timeout: float | None, stall: float | None) -> None:
        self._machine = machine
        self._stall = stall
        now = time.monotonic()
        self._deadline = None if timeout is None else now + timeout
        periods = [limit / parts for limit, parts in ((stall, ROUNDS), (timeout, ROUNDS * _BEFORE_TIMEOUT)) if limit]
        self._period = min(periods, default=0.0)
        self._next = now if stall else now + (timeout or 0) * (1 - 1 / _BEFORE_TIMEOUT)
        self._quiet_since = now
        self._printed = self._requests = -1
        self._accesses: list[set[tuple[object, ...]]] = []  # of the last rounds

    @property
    def left(self) -> float:
        """Seconds until there is something to do."""
        until = self._next if self._deadline is None else min(self._next, self._deadline)
        return max(0.0, until - time.monotonic())

    def due(self) -> int | None:
        """Do the work that is due; return the code to end the machine with, once it is stalled."""
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            return TIMEOUT
        if now < self._next:
            return None
        self._next = now + self._period
        if self._machine.paused:  # a debugger's: it is not the guest that does nothing
            self._quiet_since = now
            return None
        rounds = self._machine.samples
        rounds.append(take(self._machine))
        del rounds[:-ROUNDS]
        if self._stall is None:
            return None
        if self._progressed():
            self._quiet_since = now
            del rounds[:-1]
        quiet = now - self._quiet_since >= self._stall
        return STALLED if quiet and all(looping(seen) or _idle(seen) for seen in by_vcpu(rounds).values()) else None

    def _progressed(self) -> bool:
        """Whether the guest did something since the last round that it had not done in the last :data:`ROUNDS`."""
        machine = self._machine
        before = self._printed, self._requests
        self._printed = machine.console.end
        self._requests = sum(q["requests"] + q["doorbells"] for d in machine.virtio for q in d.queue_statistics())
        newest: set[tuple[object, ...]] = {
            (vcpu.number, exit_.reason, exit_.address, exit_.size, exit_.write, exit_.value)
            for vcpu in machine.vcpus
            for exit_ in vcpu.last_exits()
            if not self._of_a_clock(exit_)
        }
        new = not newest <= set().union(*self._accesses)
        self._accesses = [*self._accesses[1 - ROUNDS :], newest]
        return new or before != (self._printed, self._requests)

    def _of_a_clock(self, exit_: Exit) -> bool:
        spaces = {"io": PIO, "mmio": MMIO}
        if exit_.reason not in spaces:
            return False
        attachment = self._machine.bus.find(spaces[exit_.reason], exit_.address)
        return attachment is not None and attachment.name in _CLOCKS
