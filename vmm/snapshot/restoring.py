"""Restore a machine from a snapshot in files, or from a server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError, SnapshotError
from vmm.snapshot.origin import Origin
from vmm.snapshot.reading import Snapshot, read
from vmm.snapshot.series import VERSION

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType

    from vmm.config import MachineConfig
    from vmm.snapshot.disks import SavedDisks
    from vmm.snapshot.lazy import LazyMemory
    from vmm.snapshot.subject import BackgroundTask, Restorable

SERVED = "unix:"  # prefix that names a socket in place of a directory


class Prepared:
    """A snapshot opened for one machine: create that from ``origin``, then :meth:`finish`. ``files`` is its memory."""

    def __init__(self, name: str, state: Any, files: list[tuple[int, int]] | None) -> None:
        self._name = name
        if not isinstance(state, dict) or state.keys() != {"version", "description", "machine", "disks"}:
            raise SnapshotError(f"{name} is no snapshot of a machine")
        if state["version"] != VERSION:
            raise SnapshotError(f"{name} is of version {state['version']}: this pyvmm reads {VERSION}")
        self._disks, self._machine_state = state["disks"], state["machine"]
        self._saved: SavedDisks | None = None
        self.origin = Origin(state["description"], files=files)
        if not isinstance(self._disks, list) or len(self._disks) != len(self.origin.described.disks):
            raise SnapshotError(f"{name} does not have a record for each of its machine's disks")

    def config(self, given: dict[str, Any]) -> MachineConfig:
        """Return the configuration on this host: ``given``, with the disks that the snapshot holds.

        Raises :class:`~vmm.errors.ConfigError` naming the option that is missing.
        """
        return self.origin.config(given)

    def finish(self, machine: Restorable, clock: str) -> LazyMemory | None:
        """Load the rest into the machine, which was created with ``origin``; on an error the machine is closed.

        Returns its lazy memory, if it has any.
        """
        try:
            if self._saved is not None:
                self._saved.verify(machine.config.disks, machine.disks)
            later = self.fill(machine)
            machine.timeline.load(self._machine_state, clock=clock)
        except ValueError as error:
            machine.close()
            raise SnapshotError(f"{self._name} does not fit: {error}") from None
        except BaseException:
            machine.close()
            raise
        return later

    def fill(self, machine: Restorable) -> LazyMemory | None:
        """Fill the memory, or return the lazy memory that will fill it."""
        raise NotImplementedError

    def attend(self, memory: LazyMemory | None, tell: Callable[[str], object]) -> BackgroundTask | None:
        """Return a background task for the lazy memory of :meth:`finish`, or ``None``; ``tell`` gets messages for the
        user."""
        return None

    def close(self) -> None:
        """Release the snapshot, after the machine is created or has failed."""

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Checking:
    """Check an open snapshot against its checksums on a thread, while the machine is created."""

    def __init__(self, snapshot: Snapshot) -> None:
        from threading import Thread

        self._snapshot = snapshot
        self._error: BaseException | None = None
        self._thread = Thread(target=self._check, name="snapshot-check", daemon=True)
        self._thread.start()

    def _check(self) -> None:
        try:
            self._snapshot.check()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the check. Raises its exception."""
        self._thread.join()
        if self._error:
            raise self._error


class _Local(Prepared):
    """A snapshot in a local directory."""

    def __init__(self, snapshot: Snapshot, check: bool, files: list[tuple[int, int]] | None) -> None:
        self._snapshot = snapshot
        self._checking = None
        super().__init__(snapshot.path, snapshot.state, files)
        self._checking = _Checking(snapshot) if check else None

    def config(self, given: dict[str, Any]) -> MachineConfig:
        if not self._disks:
            return self.origin.config(given)
        from vmm.snapshot.disks import SavedDisks

        try:
            saved = self._saved = SavedDisks(self._disks, os.path.abspath(self._name))
        except ValueError as error:
            raise SnapshotError(f"{self._name}: {error}") from None
        return self.origin.config(given, ready=saved.ready, based=saved.based)

    def finish(self, machine: Restorable, clock: str) -> LazyMemory | None:
        try:
            memory = super().finish(machine, clock)
        except SnapshotError:
            self._compare()  # damage explains the error better than "does not fit"
            raise
        try:
            self._compare()
        except BaseException:
            machine.close()
            raise
        return memory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, ConfigError) and not isinstance(error, SnapshotError):
                self._compare()  # damage explains why a disk cannot be opened
        finally:
            self.close()

    def _compare(self) -> None:
        if self._checking:
            self._checking.finish()

    def close(self) -> None:
        import contextlib

        with contextlib.suppress(SnapshotError):
            self._compare()  # the check reads the files that are closed next
        self._snapshot.close()


class _Mapped(_Local):
    """Map the full snapshot's file privately, and copy the differentials' pages over it."""

    def __init__(self, snapshot: Snapshot, check: bool) -> None:
        fd = snapshot.layers[0].memory_fd
        super().__init__(snapshot, check, [(fd, region.offset) for region in snapshot.regions])

    def fill(self, machine: Restorable) -> None:
        self._snapshot.overlay(machine.memory.view)


class _Later(_Local):
    """Lazy memory, filled from the file on demand and by prefetching."""

    def __init__(self, snapshot: Snapshot, check: bool) -> None:
        super().__init__(snapshot, check, None)

    def fill(self, machine: Restorable) -> LazyMemory:
        from vmm.snapshot import working_set
        from vmm.snapshot.lazy import LazyMemory

        memory = LazyMemory(machine.native, machine.memory)
        memory.want_snapshot(self._snapshot)
        memory.prefetch(working_set.load(self._snapshot))
        memory.start()
        return memory


class _Remote(Prepared):
    """Lazy memory, filled over a socket (:mod:`vmm.snapshot.serving`).

    With a ``path`` this object owns the connection, and reconnects to it after a loss.
    """

    def __init__(self, connection: socket.socket, path: str | None = None) -> None:
        from vmm.snapshot.fetching import receive

        self._connection = connection
        self._path = path
        self._what = receive(connection)
        state, self._regions = self._what
        super().__init__("what the server sends", state, None)

    def config(self, given: dict[str, Any]) -> MachineConfig:
        return self.origin.config(given, why="is not served, as only memory is,")

    def fill(self, machine: Restorable) -> LazyMemory:
        from vmm.snapshot.lazy import LazyMemory

        memory = LazyMemory(machine.native, machine.memory)
        for number, region in enumerate(self._regions):
            memory.want(number, region)
        memory.connect(self._connection)
        memory.start()
        return memory

    def attend(self, memory: LazyMemory | None, tell: Callable[[str], object]) -> BackgroundTask | None:
        from vmm.snapshot.fetching import Reconnection

        return Reconnection(memory, self._path, self._what, tell) if memory and self._path else None

    def close(self) -> None:
        if self._path:
            self._connection.close()


def prepare(source: str | os.PathLike[str] | socket.socket, *, check: bool = True, later: bool = False) -> Prepared:
    """Open a snapshot for one machine; with ``check`` every byte is compared with its checksum meanwhile.

    ``later`` selects lazy memory, with the pages of the recorded working set first; without it memory is mapped.
    ``source`` may also be a socket to a :class:`vmm.snapshot.serving.PageServer`, which the caller keeps, or
    ``"unix:PATH"`` of ``pyvmm serve``: memory is lazy then. Raises :class:`~vmm.errors.SnapshotError`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _Remote(source)
    if isinstance(source, str) and source.startswith(SERVED):
        return _served(source.removeprefix(SERVED))
    snapshot = read(source)
    try:
        return (_Later if later else _Mapped)(snapshot, check)
    except BaseException:
        snapshot.close()
        raise


def _served(path: str) -> Prepared:
    from vmm.snapshot.fetching import connect

    connection = connect(path)
    try:
        return _Remote(connection, path)
    except BaseException:
        connection.close()
        raise
