"""QEMU's TCG as the processor of the SVM host."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import TYPE_CHECKING

from tests.svm import emulator
from vmm.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.svm.root import Root

PROGRAM = "qemu-system-x86_64"

# QEMU's vCPUs have one TSC, but Linux distrusts that of AMD processors which do not call it invariant, and TCG cannot.
# SVM_TSC=untrusted leaves it so: KVM has no master clock then, and a vCPU's TSC stands still while it does not run.
_TSC = {"trusted": "tsc=reliable", "untrusted": ""}


def require() -> None:
    """Raise :class:`~vmm.errors.HostError` where QEMU is missing."""
    emulator.require(PROGRAM, "qemu-system-x86")


# Not all that TCG has: it does not intercept XSETBV (7.2), so that KVM takes a guest's XCR0 for what it was before and
# puts that back at the next entry. Without XSAVE no guest uses it.
_CPU = "max,-xsave,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq,-pku"


def _command(root: Root, project: Path, results: Path, serial: str) -> list[str]:
    append = "console=ttyS0 mitigations=off no_timer_check panic=-1 loglevel=3 nowatchdog rdinit=/init disks=/dev/vd "
    append += _TSC[os.environ.get("SVM_TSC", "trusted")]
    argv = [PROGRAM, "-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", "2", "-m", "4096", "-no-reboot"]
    argv += ["-display", "none", "-nodefaults", "-monitor", "none", "-serial", serial]
    argv += ["-kernel", str(root.kernel), "-initrd", str(root.initramfs), "-append", append]
    for image, more in ((root.image, ",snapshot=on"), (project, ""), (results, "")):
        argv += ["-drive", f"file={str(image).replace(',', ',,')},if=virtio,format=raw,cache=unsafe{more}"]
    return argv


def run(root: Root, project: Path, results: emulator.Results, *, silence: float) -> None:
    """Boot the host and show its console until it powers off.

    ``silence``: seconds without a byte of output after which it counts as hung. Raises
    :class:`~vmm.errors.HostError` then, and when QEMU fails. QEMU has ended in every case.
    """
    # QEMU keeps what is written to the root disk in a temporary file.
    environment = {**os.environ, "TMPDIR": str(results.disk.parent)}
    process = emulator.start(
        _command(root, project, results.disk, "stdio"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        last = time.monotonic()
        while True:
            ready, _, _ = select.select([process.stdout], [], [], 5)
            if ready:
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                last = time.monotonic()
                emulator.show(data)
            elif time.monotonic() - last > silence:
                raise HostError(f"the SVM host printed nothing for {silence:.0f} s: it was ended")
        complaint = process.stderr.read()  # bounded: QEMU has closed its output, and ends
        process.wait()
    finally:
        emulator.end(process)
    if process.returncode != 0:
        said = complaint.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise HostError(f"{PROGRAM} ended with status {process.returncode}: {said[-1]}")


def run_on_terminal(root: Root, project: Path, results: emulator.Results) -> None:
    """Boot the host with its console on this terminal (``Ctrl-A x`` ends QEMU)."""
    process = emulator.start(_command(root, project, results.disk, "mon:stdio"))
    try:
        process.wait()
    finally:
        emulator.end(process)
