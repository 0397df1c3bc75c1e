"""QEMU as the SVM host's processor: one run of it, its console streamed, its results read from a disk."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tarfile
import time
from typing import TYPE_CHECKING

from vmm.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.svm.root import Root

PROGRAM = "qemu-system-x86_64"
_RESULTS_SIZE = 64 << 20


class Guest:
    """One run of the SVM host. ``silence``: seconds without a byte of output after which it counts as hung."""

    def __init__(self, root: Root, project: Path, folder: Path, *, silence: float, interactive: bool = False) -> None:
        if shutil.which(PROGRAM) is None:
            raise HostError(
                f"{PROGRAM} is missing, and it is the SVM host's processor: apt-get install qemu-system-x86"
            )
        self._root = root
        self._project = project
        self._results = folder / "results.tar"
        self._silence = silence
        self._interactive = interactive
        with open(self._results, "wb") as file:
            file.truncate(_RESULTS_SIZE)

    def _command(self) -> list[str]:
        append = "console=ttyS0 mitigations=off panic=-1 loglevel=4 nowatchdog rdinit=/init"
        # However this process ends, QEMU ends with it.
        argv = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "--",
            PROGRAM,
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "4096",
            "-no-reboot",
        ]
        argv += ["-display", "none", "-nodefaults", "-monitor", "none"]
        argv += ["-kernel", str(self._root.kernel), "-initrd", str(self._root.initramfs), "-append", append]
        argv += ["-serial", "mon:stdio" if self._interactive else "stdio"]
        for image, more in ((self._root.image, ",snapshot=on"), (self._project, ""), (self._results, "")):
            argv += ["-drive", f"file={str(image).replace(',', ',,')},if=virtio,format=raw,cache=unsafe{more}"]
        return argv

    def run(self) -> int:
        """Boot, show the console as it comes, and return the job's exit status.

        The results are unpacked by :meth:`results`. Raises :class:`~vmm.errors.HostError` when QEMU dies, when nothing
        was printed for too long, and when it ended without results. QEMU has ended in every case.
        """
        pipe = None if self._interactive else subprocess.PIPE
        environment = {**os.environ, "TMPDIR": str(self._results.parent)}
        with subprocess.Popen(
            self._command(), stdin=None if self._interactive else subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            env=environment,
        ) as process:  # fmt: skip
            try:
                if not self._interactive:
                    self._stream(process)
                process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            complaint = b"" if process.stderr is None else process.stderr.read()
        if process.returncode != 0:
            said = complaint.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise HostError(f"{PROGRAM} ended with status {process.returncode}: {said[-1]}")
        return 0 if self._interactive else self._status()

    def _stream(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        last = time.monotonic()
        while True:
            ready, _, _ = select.select([process.stdout], [], [], 5)
            if ready:
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    return
                last = time.monotonic()
                sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
                sys.stdout.buffer.flush()
            elif time.monotonic() - last > self._silence:
                raise HostError(f"the SVM host printed nothing for {self._silence:.0f} s: it was ended")

    def _status(self) -> int:
        try:
            with tarfile.open(self._results) as archive:
                file = archive.extractfile("./status")
                return int(file.read()) if file else 1
        except (tarfile.TarError, KeyError, ValueError) as error:
            raise HostError("the SVM host ended without results: its console above shows why") from error

    def results(self, folder: Path) -> None:
        """Unpack what the job left in /results below ``folder``."""
        with tarfile.open(self._results) as archive:
            archive.extractall(folder, filter="data")
