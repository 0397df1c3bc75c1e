"""Things that take long to make, made once: a directory appears whole or not at all, and one process makes it.

An item is made in a temporary directory beside its place, synced, and renamed into it. Makers of the same item
wait for each other on a lock file (flock: the kernel releases it when its process ends, so a killed maker blocks
no other). The next maker removes the remains of a killed one: it holds the lock, so no other maker is active.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vmm.cache_root import cache_root
from vmm.errors import HostError

# Told of every step of something long: what is being done, how much of it is done, and of how much (bytes or
# files; None: not known). `total` may be an estimate, but `done` never exceeds it.
Progress = Callable[[str, int, "int | None"], None]


def quiet(stage: str, done: int, total: int | None) -> None:
    """The progress report of a caller that wants none."""


def root() -> Path:
    """Return the cache's root as a Path; it need not exist yet."""
    return Path(cache_root())


def made(place: Path, make: Callable[[Path], None], progress: Progress = quiet) -> Path:
    """``place``, which ``make(temporary directory)`` has filled, now or earlier.

    Raises what ``make`` raises, leaving nothing behind, and HostError when the cache cannot be written.
    """
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(place.with_name(place.name + ".lock"), progress):
            if place.is_dir():
                return place
            _sweep(place)
            temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
            temporary.mkdir(mode=0o700)
            try:
                make(temporary)
                _sync_tree(temporary)
                temporary.rename(place)
            except BaseException:
                _remove_tree(temporary)
                raise
            _sync(place.parent)
    except OSError as error:
        raise HostError(
            f"{place.parent}: {error.strerror or error}: set PYVMM_CACHE to a directory that can be written "
            "and has a few GB free",
            error.errno or 0,
        ) from error
    return place


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    import fcntl

    # The file stays: one unlinked between another's open and flock would let two in.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that makes {path.stem}", 0, None)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sweep(place: Path) -> None:
    for left in place.parent.glob(f"{place.name}.*.tmp"):
        _remove_tree(left)


def _remove_tree(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _sync_tree(top: Path) -> None:
    for directory, _, names in os.walk(top):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                _sync(path)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
