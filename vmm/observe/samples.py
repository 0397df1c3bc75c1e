"""Samples of where vCPUs are while a machine runs, and whether they show an endless loop."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

PLACE_BITS = 6  # a place is a block of 64 bytes of code
_RAN = 0.01  # seconds of processor time that a jump to itself must have had


class Sample(NamedTuple):
    """One vCPU at one time (seconds, monotonic): its linear ``rip``, whether it is halted, a hash of all its registers,
    the processor time (seconds) that its thread has had, and how many accesses to devices it has made."""

    at: float
    vcpu: int
    rip: int
    halted: bool
    state: int = 0
    ran: float = 0.0
    accesses: int = 0


def narrow(samples: list[Sample]) -> bool:
    """Whether samples of one vCPU stay within few places: a quarter as many as there are samples."""
    return len({sample.rip >> PLACE_BITS for sample in samples}) <= max(1, len(samples) // 4)


def looping(samples: list[Sample]) -> bool:
    """Whether samples of one vCPU show a loop that leads back to where it was: few places, and a RIP at which all
    registers were the same once more.

    On a busy host a vCPU may not have run at all from one sample to the next. It has if there were other registers in
    between, or else (a jump to itself; a poll that is always found at its access) by the processor time of its thread
    or by its accesses. Processor time proves nothing by itself: where the host is a virtual machine, it counts what
    others took from it. So more than half of the samples must be the same one after the other.
    """
    runs = [list(run) for _, run in groupby(samples, lambda sample: (sample.rip, sample.state))]
    came_back = len({(run[0].rip, run[0].state) for run in runs}) < len(runs)
    longest = max(runs, key=len, default=[])
    stays = 2 * len(longest) > len(samples) and _ran(longest[0], longest[-1])
    return narrow(samples) and (came_back or stays)


def _ran(first: Sample, last: Sample) -> bool:
    return last.ran - first.ran >= _RAN or last.accesses - first.accesses > 1


def by_vcpu(rounds: list[list[Sample]]) -> dict[int, list[Sample]]:
    """The samples of each vCPU, oldest first."""
    found: dict[int, list[Sample]] = {}
    for samples in rounds:
        for sample in samples:
            found.setdefault(sample.vcpu, []).append(sample)
    return found
