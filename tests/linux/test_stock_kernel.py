"""Debian's stock kernels, untouched: minutes where KVM emulates guest kernel code, seconds elsewhere."""

from __future__ import annotations

import pytest

from vmm.errors import HostError
from vmm.linux import debian, initramfs
from vmm.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_cloud_kernel_runs_programs_and_powers_off() -> None:
    try:
        kernel = debian.stock_kernel("cloud")
    except HostError as error:
        pytest.skip(f"no stock kernel: {error}")
    initrd = initramfs.command(["sh", "-c", "uname -v; echo reached userspace"])
    with Machine(kernel=kernel.vmlinuz, initrd=[initrd], memory="512M") as machine:
        outcome = machine.run(timeout=3000)
        printed = machine.console.transcript.decode(errors="replace")
    assert "reached userspace" in printed, printed[-2000:]
    assert (outcome.reason, outcome.status) == ("power-off", 0), printed[-2000:]
    assert "ACPI Error" not in printed
