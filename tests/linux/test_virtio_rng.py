"""Linux finds virtio devices on both transports, written in C and in Python, and its drivers use them."""

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
dmesg | grep -E 'virtio|PCI: Fatal|BAR .*: (failed|no space)' | grep -v 'Command line'
"""


@pytest.mark.parametrize(
    ("transport", "append", "interrupts"),
    [("pci", "", "PCI-MSI"), ("pci", "pci=nomsi", "IO-APIC"), ("mmio", "", "IO-APIC")],
    ids=["pci", "pci-without-msi", "mmio"],
)
def test_the_rng_driver_binds_and_reads(
    small_kernel: SmallKernel, transport: str, append: str, interrupts: str
) -> None:
    initrd = initramfs.command(["sh", "-c", PROGRAM])
    in_python = transport == "mmio"
    with Machine(
        kernel=small_kernel.bzimage, initrd=[initrd], memory="128M", append=append, virtio=transport, rng=not in_python
    ) as machine:
        if in_python:
            machine.add(RngModel())
        outcome = machine.run(timeout=240)
        printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
        assert outcome.reason == "power-off", printed[-2000:]
        assert "current: virtio_rng.0\nbytes: 100000\n" in printed, printed[-2000:]
        assert interrupts in next(line for line in printed.splitlines() if "virtio0" in line and ":" in line)
        assert "PCI: Fatal" not in printed
        queue = machine.virtio[0].queue_statistics()[0]
        assert queue["bytes_in"] >= 100000
        assert machine.messages == []
