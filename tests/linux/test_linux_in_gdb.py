"""The stub with the real gdb on the small Linux kernel, by the symbols of its vmlinux."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from vmm.linux import initramfs
from vmm.machine import Machine
from vmm.observe.gdb import GdbServer

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(400)  # 20 s alone where kernel code is emulated


@pytest.mark.stops("breakpoint", "hardware")
def test_break_backtrace_and_on_to_power_off(small_kernel: SmallKernel) -> None:
    program = shutil.which("gdb")
    if program is None:
        pytest.skip("gdb is not installed")
    commands = (
        "hbreak start_kernel", "continue", "backtrace 3", "delete",
        "break kernel_init", "continue", "backtrace", "info threads", "set print elements 0",
        "x/s *(char**)&saved_command_line", "delete",
        "break kernel_power_off", "continue", "backtrace 4", "delete", "detach",
    )  # fmt: skip
    with (
        Machine(
            kernel=small_kernel.vmlinux, initrd=[initramfs.command(["true"])], memory="128M", append="told=gdb"
        ) as machine,
        GdbServer(machine, "127.0.0.1:0", wait=True) as server,
    ):
        machine.start()
        line = [program, "-nx", "-batch", "-ex", "set pagination off", "-ex", f"target remote {server.address}"]
        for command in commands:
            line += ["-ex", command]
        done = subprocess.run([*line, str(small_kernel.vmlinux)], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=300, check=False)  # fmt: skip
        said = done.stdout + done.stderr
        outcome = machine.wait(timeout=60)
    assert "Breakpoint 1, 0x" in said and "in start_kernel ()" in said, said
    assert "in secondary_startup_64" in said or "in x86_64_start_kernel" in said
    assert "in kernel_init ()" in said
    assert "in ret_from_fork" in said
    assert "* 1    Thread 1 (vCPU 0)" in said
    assert "told=gdb" in said
    assert "in kernel_power_off ()" in said
    assert outcome.reason == "power-off", said
