"""Periodic snapshots of a machine, of which the newest are kept.

Their names are ascending numbers of eight digits. Every ``retain``-th is full, and those after it are differentials of
it; older chains are removed once the newest has ``retain`` snapshots. So the last ``retain`` can always be restored,
and at most twice as many exist. Each is written atomically: a process killed at any moment leaves complete ones.
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
        """A machine that can write snapshots."""

        def snapshot(
            self, path: str | os.PathLike[str], *, differential: bool, series: Series | None = None
        ) -> Snapshot: ...


_DIGITS = 8


class Keeper:
    """Periodic snapshots, as :meth:`vmm.Machine.keep` returns it. It has a thread; the machine is paused while one is
    written.

    Errors go to the machine's messages, and the next period tries again.
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
        """Write a snapshot now; return its path. Raises what :meth:`vmm.Machine.snapshot` raises."""
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
        """Remove older chains, each differential before its parent."""
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
    """Return the names of the snapshots in such a directory, oldest first."""
    return sorted(name for name in os.listdir(directory) if len(name) == _DIGITS and name.isascii() and name.isdigit())
