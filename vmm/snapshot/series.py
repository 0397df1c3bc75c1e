"""The snapshots of one machine: full ones, and differentials with the pages written since the last."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

from vmm.errors import SnapshotError
from vmm.snapshot.reading import Snapshot, read
from vmm.snapshot.regions import Ram
from vmm.snapshot.writing import beside, write

if TYPE_CHECKING:
    from vmm.devices.device import State
    from vmm.memory import DirtyLog
    from vmm.snapshot.subject import Stateful

VERSION = 1


class Series:
    """Write snapshots of a machine, with a dirty log since the last one that can be a parent."""

    def __init__(self, machine: Stateful) -> None:
        self._machine = machine
        self._log: DirtyLog | None = None
        self._last: tuple[str, bytes] | None = None  # path and id

    def write(self, path: str | os.PathLike[str], differential: bool) -> Snapshot:
        """Write a snapshot of the paused machine. The first differential in a directory is written as a full one."""
        state = state_of(self._machine)  # before memory: quiescing devices completes requests, which writes it
        if not differential:
            return self._write(path, state)
        parent = self._parent(path)
        if self._log is None:
            self._log = self._machine.memory.dirty_log()
        self._log.collect()
        dirty = self._log.take()
        try:
            with parent or nullcontext() as under:
                written = self._write(path, state, under, dirty if under else None)
        except BaseException:
            for gpa, size in dirty:  # the write failed: these pages are in no snapshot yet
                self._machine.memory.wrote(gpa, size)
            raise
        self._last = (os.path.abspath(path), written.id)
        return written

    def _write(
        self,
        path: str | os.PathLike[str],
        state: State,
        parent: Snapshot | None = None,
        dirty: list[tuple[int, int]] | None = None,
    ) -> Snapshot:
        machine = self._machine

        def add_disks(directory: str) -> None:
            from vmm.snapshot.disks import save_disks

            state["disks"] = save_disks(machine.config.disks, machine.disks, directory)

        memory = [Ram(*region) for region in machine.memory.backing()]
        return write(path, state, memory, parent=parent, dirty=dirty, extra_files=add_disks if machine.disks else None)

    def _parent(self, path: str | os.PathLike[str]) -> Snapshot | None:
        """Return the last of the series if it is unchanged and in the directory of ``path``, where a reader looks."""
        if self._last is None or not beside(self._last[0], path):
            return None
        try:
            parent = read(self._last[0])
        except SnapshotError:
            return None
        if parent.id == self._last[1]:
            return parent
        parent.close()
        return None

    def close(self) -> None:
        """Close the dirty log."""
        if self._log is not None:
            self._log.close()
            self._log = None


def state_of(machine: Stateful) -> State:
    """Return the state of a snapshot, without memory and disks, as a plain value."""
    return {"version": VERSION, "description": machine.describe(), "machine": machine.save(), "disks": []}
