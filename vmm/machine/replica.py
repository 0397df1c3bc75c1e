"""A second machine that begins where this one's present course began: at the boot, or at its newest checkpoint.

It is for looking, and so it must do nothing outside: it has no console, no control socket and no writable disk but one
that goes with it. What cannot be repeated without the world outside is refused, in a sentence that says what it was.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from vmm.errors import StateError
from vmm.outcome import Replayed

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.config import MachineConfig
    from vmm.machine.parts import Parts
    from vmm.observe.subject import Replayable
    from vmm.outcome import Outcome
    from vmm.snapshot.checkpoint import Checkpoint
    from vmm.snapshot.origin import Origin

    M = TypeVar("M", bound=Parts)
    Make = Callable[[MachineConfig, Origin | None], M]

_CHECKPOINT = "take a checkpoint shortly before, from which it can be repeated"
# How a machine is used; nothing of it is the guest's.
_QUIET = {
    "timeout": None, "stall": None, "console": "none", "gdb": "", "control": None, "checkpoint_dir": None,
    "standby": "", "reboot": False, "symbols": None,
}  # fmt: skip


def obstacle(machine: Parts) -> str:
    """Return why the machine's course cannot be repeated, or ``""``."""
    began, config = machine.timeline.course, machine.config
    if began.obstacle:
        return began.obstacle
    for name, parts in (("network", config.nets), ("share", config.shares), ("vsock", config.vsock)):
        if parts:
            return f"it has a {name}, and what came from there does not come again"
    for disk in config.disks:
        if not disk.readonly and not (disk.temporary and began.checkpoint is None):
            return (
                f"what was on the disk {disk.path} before the guest wrote there may be gone: give it temporary, or ro"
                if began.checkpoint is None
                else f"the disk {disk.path} can be written: only read-only disks are there for both"
            )
    if machine.console.inputs != began.inputs:
        return f"it was sent console input, at times that nothing recorded: {_CHECKPOINT}"
    if machine.interception.hooked:
        return "it has hooks, whose code may not be run twice"
    if sum(vcpu.changes for vcpu in machine.vcpus) != began.changes:
        return "registers were set from outside"
    return ""


def replica(machine: Parts, make: Make[M]) -> M:
    """Return a machine that begins as ``machine``'s present course did; the caller closes it.

    The replica of a checkpoint needs ``machine`` open and ended, the one of a boot does not. ``make`` is Machine's
    constructor. Raises :class:`~vmm.errors.StateError` for a course that cannot be repeated,
    :class:`~vmm.errors.ConfigError` and :class:`~vmm.errors.HostError` as a new machine does.
    """
    if why := obstacle(machine):
        raise StateError(why)
    checkpoint = machine.timeline.course.checkpoint
    quiet = machine.config.with_(**_QUIET)
    made = make(quiet, None) if checkpoint is None else _gone_back(machine, make, checkpoint)
    try:
        _compare(machine, made)
        if made.entry is None:
            made.firmware.load()
            with contextlib.suppress(StateError):  # closed, and its memory with it
                made.generation_id.place(machine.generation_id.value)
    except BaseException:
        made.close()
        raise
    return made


def _compare(machine: Parts, made: Parts) -> None:
    names = [device.name for device in made.devices]
    for device in machine.devices:
        if device.name not in names:
            raise StateError(f"the device {device.name} was added to it, and no second one is there")
    if made.entry is None and (machine.image and machine.image.stamp) != (made.image and made.image.stamp):
        raise StateError(f"the image {machine.config.kernel} is not what it was")


def _gone_back(machine: Parts, make: Make[M], checkpoint: Checkpoint) -> M:
    """Return a clone, with the same identity, of what ``machine`` was at a checkpoint; ``machine`` is as it was."""
    from vmm.snapshot.clones import CloneSource

    timeline, console = machine.timeline, machine.console
    began, position = timeline.course, console.position
    machine.vm.pause()
    try:
        with timeline.checkpoint() as end:
            timeline.rollback(checkpoint)
            try:
                with CloneSource(timeline, machine.symbols_file, 1, "kept") as source:
                    made = make(source.config({}).with_(**_QUIET), source.origin)
                    source.finish(made, renew=False)
            finally:
                timeline.rollback(end)
    finally:
        machine.vm.resume()
        timeline.course, console.position = began, position
    return made


def replay_of(machine: Parts, outcome: Outcome, make: Callable[[], Replayable]) -> Callable[[], Replayed]:
    """Return what repeats the run that ended so, in a replica that ``make`` returns.

    It may be called after ``machine`` was closed if the run began at the boot.
    """
    from vmm.observe.replay import Death, find

    timeline, number = machine.timeline, outcome.vcpu or 0
    began = timeline.course
    before = began.exits[number] if began.exits else 0
    exits = machine.vcpus[number].recorded - before

    def look() -> Replayed:
        if timeline.course is not began or machine.execution.running:
            return Replayed(why="the machine has gone on since, or its checkpoint is closed")
        ram = machine.memory if machine.vm.is_open else None
        death = Death(number, exits, outcome.last_exits, outcome.seconds, ram)
        with machine.view.aside():
            return find(death, make)

    return look
