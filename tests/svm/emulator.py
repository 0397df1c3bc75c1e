"""One run of a test host in an emulator: its console streamed, its results read from a disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING

from vmm.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RESULTS_SIZE = 64 << 20  # bytes of the disk that the results come back on


def require(program: str, packages: str) -> None:
    """Raise :class:`~vmm.errors.HostError` with the packages to install where ``program`` is missing."""
    if shutil.which(program) is None:
        raise HostError(f"{program} is missing, and the test host runs in it: apt-get install {packages}")


def start(argv: list[str], **more: object) -> subprocess.Popen[bytes]:
    """Start an emulator that ends with this process, however that ends."""
    # A parent that died before setpriv asked for the signal is no longer ours: look once it has been asked for.
    child = ["sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid()), *argv]
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *child], **more)  # type: ignore[call-overload,no-any-return]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the emulator, if it still runs, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()


def show(data: bytes) -> None:
    """Write what the host's console said to standard output, at once."""
    sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
    sys.stdout.buffer.flush()


class Results:
    """A raw disk on which the host leaves a tar archive of /results: the job's exit ``status``, and its files."""

    def __init__(self, folder: Path) -> None:
        self.disk = folder / "results.img"
        with open(self.disk, "wb") as file:
            file.truncate(RESULTS_SIZE)

    def status(self) -> int:
        """The job's exit status. Raises :class:`~vmm.errors.HostError` where there is none, with what is known."""
        with self._archive() as archive:
            names = archive.getnames()
            if "./failure" in names and (file := archive.extractfile("./failure")):
                raise HostError(file.read(1000).decode(errors="replace").strip())
            file = archive.extractfile("./status") if "./status" in names else None
            if file is None:
                raise HostError("the test host ended in the middle of its job: its console above shows why")
            return int(file.read(16))

    def unpack(self, folder: Path) -> None:
        """Unpack the job's files below ``folder``."""
        with self._archive() as archive:
            archive.extractall(folder, filter="data")

    @contextlib.contextmanager
    def _archive(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.disk) as archive:
                yield archive
        except tarfile.TarError as error:
            raise HostError("the test host ended without results: its console above shows why") from error
