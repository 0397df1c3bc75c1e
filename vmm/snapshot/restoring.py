"""From a snapshot in files to a machine that goes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm.errors import SnapshotError
from vmm.snapshot.origin import Origin
from vmm.snapshot.reading import Snapshot, read
from vmm.snapshot.series import VERSION

if TYPE_CHECKING:
    from types import TracebackType

    from vmm.machine import Machine


class Prepared:
    """An open snapshot, checked, for one machine to be made of it: ``origin`` first, then :meth:`finish`."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        state = snapshot.state
        if not isinstance(state, dict) or state.keys() != {"version", "description", "machine", "disks"}:
            raise SnapshotError(f"{snapshot.path} is no snapshot of a machine")
        if state["version"] != VERSION:
            raise SnapshotError(f"{snapshot.path} is of version {state['version']}: this pyvmm reads {VERSION}")
        self._disks, self._machine_state = state["disks"], state["machine"]
        base = snapshot.layers[0]
        self.origin = Origin(
            state["description"], files=[(base.memory_fd, region.offset) for region in snapshot.regions]
        )

    def with_disks(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields, with the snapshot's disks where none are given."""
        if "disks" in fields or not self._disks:
            return fields
        from vmm.snapshot.disks import restore_disks

        try:
            disks = restore_disks(self._disks, os.path.abspath(self._snapshot.path))
        except ValueError as error:
            raise SnapshotError(f"{self._snapshot.path}: {error}") from None
        return {**fields, "disks": disks}

    def finish(self, machine: Machine) -> None:
        """Have the machine, made with ``origin``, take up the rest; it is closed when it cannot."""
        try:
            self._snapshot.overlay(machine.memory.view)
            machine.load_state(self._machine_state)
        except ValueError as error:
            machine.close()
            raise SnapshotError(f"{self._snapshot.path} does not fit: {error}") from None
        except BaseException:
            machine.close()
            raise

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._snapshot.close()


def prepare(path: str | os.PathLike[str], *, check: bool = True) -> Prepared:
    """Open a snapshot to make a machine of it, every byte compared with its checksum if ``check``.

    Raises :class:`~vmm.errors.SnapshotError`.
    """
    snapshot = read(path)
    try:
        if check:
            snapshot.check(files=False)  # disks are checked as they are opened
        return Prepared(snapshot)
    except BaseException:
        snapshot.close()
        raise
