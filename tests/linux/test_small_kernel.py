"""The small kernel boots to userspace, runs programs and powers off."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vmm.linux import initramfs
from vmm.machine import Machine

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(300)  # 15 s alone where kernel code is emulated, several times that on a busy host
BOOTS = False  # Linux on every kind of host: these run on one that emulates kernel code, too


@pytest.mark.parametrize("cpus", [1, 2])
def test_init_runs_programs_and_powers_off(small_kernel: SmallKernel, cpus: int) -> None:
    program = "grep -c ^processor /proc/cpuinfo; echo $((6*7)) | sed s/4/four-/; ls /dev/console; uname -r"
    initrd = initramfs.command(["sh", "-c", program])
    with Machine(kernel=small_kernel.bzimage, initrd=[initrd], memory="128M", cpus=cpus) as machine:
        outcome = machine.run(timeout=240)
        printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
    assert outcome.reason == "power-off", printed[-2000:]
    assert outcome.status == 0
    assert f"\n{cpus}\nfour-2\n/dev/console\n6.1." in printed
    for complaint in ("ACPI Error", "ACPI BIOS", "ACPI Warning", "Call Trace", "clocksource: timekeeping watchdog"):
        assert complaint not in printed


def test_a_program_s_exit_status_comes_out(small_kernel: SmallKernel) -> None:
    with Machine(
        kernel=small_kernel.vmlinux, initrd=[initramfs.command(["sh", "-c", "exit 3"])], memory="128M"
    ) as machine:
        outcome = machine.run(timeout=240)
    assert (outcome.reason, outcome.code) == ("debug-exit", 3), outcome.console


def test_a_panic_is_an_outcome_with_the_kernels_own_words(small_kernel: SmallKernel) -> None:
    with Machine(kernel=small_kernel.bzimage, memory="64M") as machine:  # no initrd: there is no /init to run
        outcome = machine.run(timeout=240)
        diagnosis = machine.diagnose()
    assert (outcome.reason, diagnosis.cause) == ("panic", "missing-init")
    assert "there is neither an initrd (--initrd FILE) nor root= on its command line" in diagnosis.evidence
    assert outcome.status == 10
    assert "No working init found" in outcome.sentence


def test_the_shell_on_a_piped_console_takes_commands_and_powers_off(small_kernel: SmallKernel) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "boot", "--kernel", str(small_kernel.bzimage), "--mem", "128M",
         "--initrd", str(initramfs.default()), "--append", "quiet", "--timeout", "240"],
        input=b"echo answer-$((40+2))\nexit\n", capture_output=True, timeout=280, check=False,
    )  # fmt: skip
    assert b"answer-42" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("words", "status"), [("sh -c reboot", 4), ("halt", 18)])
def test_the_shell_ends_the_machine_in_the_way_it_is_told(small_kernel: SmallKernel, words: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "boot", "--kernel", str(small_kernel.bzimage), "--mem", "128M",
         "--initrd", str(initramfs.default()), "--append", "quiet", "--timeout", "240"],
        input=f"{words}\n".encode(), capture_output=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == status, (done.stdout, done.stderr)
