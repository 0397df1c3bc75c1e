"""Debian's stock kernels, untouched: minutes where KVM emulates guest kernel code, seconds elsewhere."""

from __future__ import annotations

import pytest

from vmm.errors import HostError
from vmm.linux import debian, initramfs
from vmm.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize(("flavour", "memory"), [("cloud", "512M"), ("generic", "1G")])
def test_a_stock_kernel_runs_programs_and_powers_off(flavour: str, memory: str, cpus: int) -> None:
    try:
        kernel = debian.stock_kernel(flavour)
    except HostError as error:
        pytest.skip(f"no stock kernel: {error}")
    initrd = initramfs.command(["sh", "-c", "uname -v; grep -c ^processor /proc/cpuinfo; echo reached userspace"])
    with Machine(kernel=kernel.vmlinuz, initrd=[initrd], memory=memory, cpus=cpus) as machine:
        outcome = machine.run(timeout=3000)
        printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
    assert f"\n{cpus}\nreached userspace" in printed, printed[-2000:]
    assert (outcome.reason, outcome.status) == ("power-off", 0), printed[-2000:]
    for complaint in ("ACPI Error", "Call Trace", "clocksource: timekeeping watchdog", "soft lockup", "stall"):
        assert complaint not in printed
