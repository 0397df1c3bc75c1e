"""Atomic replacement of a directory: it takes its name only when it is complete.

It is filled under a temporary name beside the target, flushed, and renamed; an existing snapshot is exchanged with it
and removed. Each writer holds a lock on its temporary directory, so that the next writer can remove unlocked ones,
whose writer has died.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm._ffi import lib
from vmm.errors import HostError, SnapshotError

if TYPE_CHECKING:
    from types import TracebackType

PARTIAL = ".pyvmm-partial"
_TRIES = 100  # another writer may take or release the name between check and rename


class Replacement:
    """``with Replacement(path, marker) as new:`` write into ``new.directory``, then ``new.commit()``.

    Without the commit nothing remains. A directory at ``path`` is replaced only if it is empty or has a file
    ``marker``. Raises :class:`~vmm.errors.SnapshotError` otherwise, ``OSError`` if the host refuses.
    """

    def __init__(self, path: str, marker: str) -> None:
        self.path = os.path.abspath(path)
        self.marker = marker
        self.beside = os.path.dirname(self.path)
        self._refuse_others()
        self._remove_leftovers()
        self.directory, self._lock = self._make()

    def _refuse_others(self) -> None:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise SnapshotError(f"{self.path} is a file: give the snapshot another name") from None
        if names and self.marker not in names:
            raise SnapshotError(f"{self.path} is a directory that is no snapshot: give the snapshot another name")

    def _remove_leftovers(self) -> None:
        import fcntl

        for name in os.listdir(self.beside):
            if not (name.startswith(".") and name.endswith(PARTIAL)):
                continue
            path = os.path.join(self.beside, name)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue  # not a temporary directory of ours, or gone
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            except BlockingIOError:
                pass  # its writer is alive
            finally:
                os.close(fd)

    def _make(self) -> tuple[str, int]:
        import fcntl

        for _ in range(_TRIES):
            directory = os.path.join(self.beside, f".{os.path.basename(self.path)}.{os.urandom(6).hex()}{PARTIAL}")
            os.mkdir(directory, 0o700)
            try:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another writer removed it as a leftover before it was locked
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return directory, fd
            os.close(fd)
        raise HostError(f"cannot make a directory in {self.beside}: it is removed again and again")

    def __enter__(self) -> Replacement:
        return self

    def commit(self) -> None:
        """Flush every file, make it read-only, then take the name."""
        for name in os.listdir(self.directory):
            fd = os.open(os.path.join(self.directory, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchmod(fd, 0o400)
                os.fsync(fd)
            finally:
                os.close(fd)
        os.fsync(self._lock)
        self._take_name()
        fd = os.open(self.beside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _take_name(self) -> None:
        import errno

        for _ in range(_TRIES):
            exchange = os.path.lexists(self.path)
            if exchange:
                self._refuse_others()
            rc = lib.vmm_rename(self.directory.encode(), self.path.encode(), int(exchange))
            if rc == -errno.EEXIST or rc == -errno.ENOENT:
                continue
            if rc == -errno.EINVAL:
                raise HostError(f"the file system of {self.path} cannot replace a directory at once: give another name")
            if rc < 0:
                raise OSError(-rc, os.strerror(-rc))
            return
        raise HostError(f"others write {self.path} again and again: give another name")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _remove(self.directory)  # the unfinished directory, or the replaced snapshot
        os.close(self._lock)


def remove(path: str) -> None:
    """Remove a snapshot. A process killed meanwhile leaves it complete, or as a leftover for the next writer."""
    import contextlib

    gone = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.urandom(6).hex()}{PARTIAL}")
    with contextlib.suppress(OSError):
        os.rename(path, gone)
        _remove(gone)


def _remove(directory: str) -> None:
    """Remove a directory of files, ignoring errors; the next writer tries again."""
    import contextlib

    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
