"""pyvmm run: the command's output and status come out, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm.devices.virtio.fs import SERVERS

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(400)  # two boots of 15 s where kernel code is emulated, several times that when busy


def pyvmm_run(kernel: SmallKernel, *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vmm", "run", "--kernel", str(kernel.bzimage), "--mem", "128M", *words]
    return subprocess.run(command, capture_output=True, timeout=390, check=False)


def test_a_command_s_output_and_status_are_the_process_s_own(small_kernel: SmallKernel, tmp_path: Path) -> None:
    program = "printf 'one\\r\\ntwo'; echo three >&2; exit 5"
    expected = b"one\r\ntwothree\n"
    options = ["--timeout", "300"]
    if shutil.which("passt"):  # the network is up before the command begins
        program = f"ip route >/routes; read -r _ _ router _ </routes; echo $router; {program}"
        expected = b"10.0.2.2\n" + expected
        options += ["--net", "user"]
    if any(Path(server).exists() for server in SERVERS):
        (tmp_path / "script").write_text(program)
        options += ["--share", f"{tmp_path}:work,ro"]
        program = ". /mnt/work/script"
    done = pyvmm_run(small_kernel, *options, "--", "sh", "-c", program)
    assert (done.stdout, done.stderr, done.returncode) == (expected, b"", 5)


def test_a_command_that_does_not_end_meets_the_time_limit(small_kernel: SmallKernel) -> None:
    done = pyvmm_run(small_kernel, "--timeout", "1", "--", "sleep", "1000")
    assert (done.stdout, done.returncode) == (b"", 124)
    first = done.stderr.splitlines()[0]  # what the guest was doing then comes after it
    assert first.startswith(b"pyvmm: ") and b"the time limit passed" in first
