"""From a snapshot in files to a machine that goes on."""

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

SERVED = "unix:"  # begins the name of a socket in place of a directory


class Prepared:
    """What one machine is made of: ``origin`` first, then :meth:`finish`. ``files`` is the memory under it, if any."""

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
        """The machine's configuration here: ``given``, with the snapshot's disks where none need be said.

        Raises :class:`~vmm.errors.ConfigError` naming what must be said.
        """
        return self.origin.config(given)

    def finish(self, machine: Restorable, clock: str) -> LazyMemory | None:
        """Have the machine, made with ``origin``, take up the rest; it is closed when it cannot, or must not.

        Answers its memory, where that is still to come.
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
        """Bring the memory, or have it come."""
        raise NotImplementedError

    def attend(self, memory: LazyMemory | None, tell: Callable[[str], object]) -> BackgroundTask | None:
        """Who is to look after the memory that :meth:`finish` answered; ``tell`` is told what a person should know."""
        return None

    def close(self) -> None:
        """Once the machine is made, or could not be."""

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Checking:
    """All of an open snapshot compared with its checksums, while the machine is made."""

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
        """Wait for it. Raises what it found."""
        self._thread.join()
        if self._error:
            raise self._error


class _Local(Prepared):
    """Memory is in the snapshot's directory."""

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
            self._compare()  # what does not fit may be damaged
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
                self._compare()  # a disk that cannot be opened may be damaged
        finally:
            self.close()

    def _compare(self) -> None:
        if self._checking:
            self._checking.finish()

    def close(self) -> None:
        import contextlib

        with contextlib.suppress(SnapshotError):
            self._compare()  # it reads the files that are closed now
        self._snapshot.close()


class _Mapped(_Local):
    """The full snapshot's file is mapped privately, and what the differentials have copied over it."""

    def __init__(self, snapshot: Snapshot, check: bool) -> None:
        fd = snapshot.layers[0].memory_fd
        super().__init__(snapshot, check, [(fd, region.offset) for region in snapshot.regions])

    def fill(self, machine: Restorable) -> None:
        self._snapshot.overlay(machine.memory.view)


class _Later(_Local):
    """Memory is the machine's own, and its pages come from the file when they are touched, or before that."""

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
    """Memory of the machine's own, whose pages come over a socket (:mod:`vmm.snapshot.serving`).

    With a ``path`` the connection is one to there, and ours; a lost one is made again.
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
    """Open a snapshot to make a machine of it, every byte compared with its checksum meanwhile if ``check``.

    ``later``: memory comes by userfaultfd, where it is touched; first the pages of the recorded working set. Without,
    it is mapped. A socket, which stays the caller's, is one to a :class:`vmm.snapshot.serving.PageServer`, and
    ``"unix:PATH"`` is where ``pyvmm serve`` has one: memory comes later. Raises :class:`~vmm.errors.SnapshotError`.
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
