"""Linux finds devices on virtio-mmio through ACPI, and its driver uses one that is written in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm import Machine
from vmm.devices.virtio.rng_model import RngModel
from vmm.linux import initramfs

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(300)

PROGRAM = """
echo current: $(cat /sys/class/misc/hw_random/rng_current)
echo bytes: $(head -c 100000 /dev/hwrng | wc -c)
grep virtio /proc/interrupts
"""


def test_the_rng_driver_binds_to_a_python_device_on_mmio(small_kernel: SmallKernel) -> None:
    initrd = initramfs.command(["sh", "-c", PROGRAM])
    with Machine(kernel=small_kernel.bzimage, initrd=[initrd], memory="128M", virtio="mmio", rng=False) as machine:
        machine.add(RngModel())
        outcome = machine.run(timeout=240)
        printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
        assert outcome.reason == "power-off", printed[-2000:]
        assert "current: virtio_rng.0\nbytes: 100000\n" in printed, printed[-2000:]
        assert "IO-APIC" in next(line for line in printed.splitlines() if "virtio0" in line and ":" in line)
        assert machine.virtio[0].queue_statistics()[0]["bytes_in"] >= 100000
        assert machine.messages == []
