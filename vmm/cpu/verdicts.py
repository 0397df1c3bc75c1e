"""Verdicts from a probe's measurements. Nothing here runs a guest, and no verdict depends on an absolute time.

A host may be busy, nested, or a hundred times slower than hardware. Valid on each of them are KVM's counts, whether a
vCPU's registers changed, and the ratio of two guests' processor times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Verdict(NamedTuple):
    """A decision and the measurement it rests on."""

    value: bool
    basis: str


# ---- is guest kernel code emulated? ----

# A loop at CPL 0 took so many times the processor time of the same at CPL 3. Emulators are found at 100 and more,
# processors at 1, also such as are emulated themselves: both levels are then.
RATIO_NATIVE = 3
RATIO_EMULATED = 10
ROUNDS_LEAST = 10  # so that each level has an undisturbed run


def emulation_counted(instructions: int, grew: int) -> Verdict:
    """By KVM's statistic ``insn_emulation``, which ``grew`` so much more in a longer loop than in a shorter one.

    ``instructions`` is by how many the loops differ. A KVM that emulates counts each; one that does not counts none,
    but for a few that it emulates now and then (after a fault of its own, say).
    """
    return Verdict(2 * grew >= instructions, f"insn_emulation grew by {grew} in {instructions} instructions")


def emulation_timed(kernel: Sequence[int], user: Sequence[int]) -> Verdict | None:
    """By processor times of the same loop at CPL 0 and at CPL 3, each in turn. ``None``: it takes more rounds.

    The best of each counts: what disturbs a run only ever makes it longer.
    """
    if min(len(kernel), len(user)) < ROUNDS_LEAST:
        return None
    ratio = min(kernel) / max(1, min(user))
    if RATIO_NATIVE < ratio < RATIO_EMULATED:
        return None
    return Verdict(ratio >= RATIO_EMULATED, f"a loop at CPL 0 took {ratio:.3g} times the same at CPL 3")


# ---- does a guest make progress? ----

STEPS_STUCK = 1000  # of instructions emulated, or exits: with no register changed by any of them
LOOKS_COUNTED, LOOKS_TIMED = 4, 8
TIMES_ENDLESS = 1000  # of processor time between two looks, with registers that do change


class Look(NamedTuple):
    """A sample of an interrupted vCPU: all registers, its thread's processor time, KVM's counts (possibly none)."""

    registers: tuple[int, ...]
    cpu_ns: int
    counted: Mapping[str, int]


def due(looks: Sequence[Look], cpu_ns: int, patience_ns: int) -> bool:
    """Return whether the thread has run long enough since the last sample (or the start) for another one."""
    return cpu_ns - (looks[-1].cpu_ns if looks else 0) >= patience_ns


def stuck(looks: Sequence[Look], patience_ns: int) -> str:
    """Return why a guest that should have ended will not; empty while it still may.

    Between two looks its thread had at least ``patience_ns`` of processor time, many times what a guest of this kind
    needs from start to end on this host. Each look makes KVM enter the guest anew.
    """
    if not looks:
        return ""
    same = 1
    while same < len(looks) and looks[-1 - same].registers == looks[-1].registers:
        same += 1
    first, last = looks[-same], looks[-1]
    if same >= LOOKS_COUNTED:
        for name, now in last.counted.items():
            grew = now - first.counted.get(name, now)
            if grew >= STEPS_STUCK:
                return f"{name} grew by {grew} with no register changed in {same} looks"
    if same >= LOOKS_TIMED:
        spent = (last.cpu_ns - first.cpu_ns) * 1e-6
        return f"no register changed in {same} looks and {spent:.0f} ms of processor time"
    if last.cpu_ns >= TIMES_ENDLESS * patience_ns:
        return f"it had not ended after {last.cpu_ns * 1e-9:.0f} s of processor time"
    return ""
