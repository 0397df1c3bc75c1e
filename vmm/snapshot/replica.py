"""A second machine that begins where this one's present course began: at the boot, or at its newest checkpoint.

It is for looking, and so it must do nothing outside: it has no console, no control socket and no writable disk but one
that goes with it. What cannot be repeated without the world outside is refused, in a sentence that says what it was.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from vmm.errors import StateError

if TYPE_CHECKING:
    from vmm.machine import Machine
    from vmm.snapshot.checkpoint import Checkpoint

_CHECKPOINT = "take a checkpoint shortly before, from which it can be repeated"
# How a machine is used; nothing of it is the guest's.
_QUIET = {
    "timeout": None, "stall": None, "console": "none", "gdb": "", "control": None, "checkpoint_dir": None,
    "standby": "", "reboot": False, "symbols": None,
}  # fmt: skip


class Course(NamedTuple):
    """Where a machine's present course began: at ``checkpoint``, or at the boot (``None``).

    ``exits`` each vCPU had recorded then, and how much came from outside until then: ``inputs`` (bytes of console
    input) and ``changes`` (registers that were set). ``obstacle``: why it cannot be repeated whatever came then.
    """

    checkpoint: Checkpoint | None = None
    exits: tuple[int, ...] = ()
    inputs: int = 0
    changes: int = 0
    obstacle: str = ""


def course(machine: Machine, checkpoint: Checkpoint | None = None, obstacle: str = "") -> Course:
    """The course that begins with the machine as it is now."""
    exits = tuple(vcpu.recorded for vcpu in machine.vcpus)
    return Course(checkpoint, exits, machine.console.inputs, sum(vcpu.changes for vcpu in machine.vcpus), obstacle)


def obstacle(machine: Machine) -> str:
    """Why the machine's course cannot be repeated, or ``""``."""
    began, config = machine.course, machine.config
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
    if machine.hooked:
        return "it has hooks, whose code may not be run twice"
    if sum(vcpu.changes for vcpu in machine.vcpus) != began.changes:
        return "registers were set from outside"
    return ""


def replica(machine: Machine) -> Machine:
    """A machine that begins as ``machine``'s present course did; it is the caller's. The one of a checkpoint needs
    ``machine`` open and ended, the one of a boot not.

    Raises :class:`~vmm.errors.StateError` where that cannot be, :class:`~vmm.errors.ConfigError` and
    :class:`~vmm.errors.HostError` as a new machine does.
    """
    if why := obstacle(machine):
        raise StateError(why)
    made = _booted(machine) if machine.course.checkpoint is None else _gone_back(machine, machine.course.checkpoint)
    try:
        _compare(machine, made)
        if made.entry is None:
            made.load()
            with contextlib.suppress(StateError):  # closed, and its memory with it
                made.generation_id.place(machine.generation_id.value)
    except BaseException:
        made.close()
        raise
    return made


def _compare(machine: Machine, made: Machine) -> None:
    names = [device.name for device in made.devices]
    for device in machine.devices:
        if device.name not in names:
            raise StateError(f"the device {device.name} was added to it, and no second one is there")
    if made.entry is None and machine.image.stamp != made.image.stamp:
        raise StateError(f"the image {machine.config.kernel} is not what it was")


def _booted(machine: Machine) -> Machine:
    return type(machine)(machine.config.with_(**_QUIET), kvm=machine.kvm_path)


def _gone_back(machine: Machine, checkpoint: Checkpoint) -> Machine:
    """A clone, with the same identity, of what ``machine`` was at a checkpoint; it is then as it was before."""
    from vmm.snapshot.clones import Mould

    began, position = machine.course, machine.console.position
    machine.pause()
    try:
        with machine.checkpoint() as end:
            machine.rollback(checkpoint)
            try:
                with Mould(machine, 1, "kept") as mould:
                    made = type(machine)(mould.config({}).with_(**_QUIET), kvm=machine.kvm_path, origin=mould.origin)
                    mould.finish(made, renew=False)
            finally:
                machine.rollback(end)
    finally:
        machine.resume()
        machine.course, machine.console.position = began, position
    return made
