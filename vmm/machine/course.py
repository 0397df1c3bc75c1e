"""The start of a machine's present course of events, from which a replay has to begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.console import Console
    from vmm.cpu.vcpu import Vcpu
    from vmm.snapshot.checkpoint import Checkpoint


class Course(NamedTuple):
    """A beginning: at ``checkpoint``, or at the boot (``None``).

    ``exits`` each vCPU had recorded then, and how much came from outside until then: ``inputs`` (bytes of console
    input) and ``changes`` (registers that were set). ``obstacle``: why the course cannot be repeated, whatever came
    then.
    """

    checkpoint: Checkpoint | None = None
    exits: tuple[int, ...] = ()
    inputs: int = 0
    changes: int = 0
    obstacle: str = ""


def course_from(checkpoint: Checkpoint, vcpus: Sequence[Vcpu], console: Console) -> Course:
    """Return the course that begins at ``checkpoint``, with the machine as it is now."""
    exits = tuple(vcpu.recorded for vcpu in vcpus)
    return Course(checkpoint, exits, console.inputs, sum(vcpu.changes for vcpu in vcpus))
