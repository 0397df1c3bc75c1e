"""Snapshots of a machine on a period, the newest of them kept.

They are named by a number in eight digits, ascending. Every ``retain``-th is full, and those after it are built on
it; all that is older is removed once ``retain`` of the newest chain are there. So the last ``retain`` can always be
restored, and there are at most twice as many. Each is written as any snapshot is: killed at any moment, this leaves
whole ones.
"""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING, Protocol

from vmm.errors import ConfigError, VmmError
from vmm.snapshot.replacement import remove
from vmm.snapshot.series import Series

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.snapshot.reading import Snapshot
    from vmm.snapshot.subject import Stateful

    class Snapshotted(Stateful, Protocol):
        """A machine of which snapshots are written."""

        def snapshot(
            self, path: str | os.PathLike[str], *, differential: bool, series: Series | None = None
        ) -> Snapshot: ...


_DIGITS = 8


class Keeper:
    """What :meth:`vmm.Machine.keep` answers. On a thread of its own; the machine is held while one is written.

    What goes wrong is said in the machine's messages, and tried again after the next period.
    """

    def __init__(
        self,
        machine: Snapshotted,
        stop_fd: int,
        directory: str | os.PathLike[str],
        every: float,
        retain: int,
        tell: Callable[[str], object],
        migrating: Callable[[], bool],
    ) -> None:
        if not 0 < every < 1e9 or retain < 1:
            raise ConfigError(f"a snapshot every {every} s, {retain} of them kept: give numbers greater than 0")
        self._machine = machine
        self._stop_fd = stop_fd
        self._tell = tell
        self._migrating = migrating
        self.directory = os.path.abspath(directory)
        self._every = every
        self._retain = retain
        self._series: Series | None = None
        self._in_chain = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            self._next = max(map(int, kept(self.directory)), default=0) + 1
        except OSError as error:
            raise ConfigError(f"cannot keep snapshots in {directory}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            if select.select([self._stop_fd], [], [], 0)[0]:
                return  # it has ended
            if self._migrating():
                continue
            try:
                self.take()
            except VmmError as error:
                self._tell(str(error))

    def take(self) -> str:
        """One now; answers its path. Raises what :meth:`vmm.Machine.snapshot` does."""
        with self._lock:
            if self._series is None or self._in_chain >= self._retain:
                self._begin_chain()
            path = os.path.join(self.directory, f"{self._next:0{_DIGITS}}")
            self._machine.snapshot(path, differential=True, series=self._series).close()
            self._next += 1
            self._in_chain += 1
            if self._in_chain >= self._retain:
                self._remove_older()
            return path

    def _begin_chain(self) -> None:
        if self._series is not None:
            self._series.close()
        self._series, self._in_chain = Series(self._machine), 0

    def _remove_older(self) -> None:
        """All but this chain; what is built on another before that other."""
        for name in reversed(kept(self.directory)):
            if int(name) < self._next - self._in_chain:
                remove(os.path.join(self.directory, name))

    def stop(self) -> None:
        """Stop and wait for the thread; the snapshots stay. Idempotent."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._lock:
            if self._series is not None:
                self._series.close()
                self._series = None


def kept(directory: str | os.PathLike[str]) -> list[str]:
    """The names of the snapshots in a directory of these, the oldest first."""
    return sorted(name for name in os.listdir(directory) if len(name) == _DIGITS and name.isascii() and name.isdigit())
