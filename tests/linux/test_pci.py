"""Linux finds a device on PCI with its own driver, by messages and by the interrupt pin."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from vmm.linux import initramfs
from vmm.machine import Machine

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel
    from vmm.testing.linux import LinuxGuest

pytestmark = pytest.mark.timeout(300)  # 15 s alone where kernel code is emulated, several times that on a busy host

LOOK = """cat /sys/class/misc/hw_random/rng_current
readlink /sys/bus/virtio/devices/virtio0
dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c
grep virtio /proc/interrupts
grep -i 'pci\\|msi' /proc/iomem
"""

COMPLAINTS = (
    "No config space access function", "ACPI Error", "ACPI BIOS", "ACPI Warning", "can't claim", "not claimed",
    "no compatible bridge", "conflicts", "failed to assign", "no space for", "can't derive routing", "no GSI",
    "not using", "not reserved", "Call Trace", "nobody cared", "irq 17: ",
)  # fmt: skip


def check(machine: Machine, printed: str, log: str, interrupt: str) -> None:
    """That :data:`LOOK` printed what it should, and that the kernel had nothing to complain of."""
    assert "virtio_rng.0\n../../../devices/pci0000:00/0000:00:01.0/virtio0\n64\n" in printed
    assert re.search(interrupt, printed), printed
    assert "c1000000-c1007fff : virtio-pci-modern" in printed
    statistics = machine.virtio[0].queue_statistics()
    assert statistics[0]["doorbells"] > 0 and statistics[0]["interrupts"] > 0
    assert "Linux version" in log
    assert [complaint for complaint in COMPLAINTS if complaint in log] == []
    assert machine.messages == []


def test_linux_binds_its_driver_and_reads_random_numbers_by_messages(linux: LinuxGuest) -> None:
    printed = linux.run(LOOK, timeout=120).output
    assert linux.machine is not None
    check(
        linux.machine,
        printed,
        linux.run("dmesg", timeout=120).output,
        r"\d+: +[1-9]\d* +PCI-MSI \d+-edge +virtio0-input",
    )


def test_linux_binds_its_driver_and_reads_random_numbers_by_the_pin(small_kernel: SmallKernel) -> None:
    program = "mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev\n" + LOOK
    with Machine(
        kernel=small_kernel.bzimage, initrd=[initramfs.command(["sh", "-c", program])],
        memory="128M", virtio="pci", append="pci=nomsi",
    ) as machine:  # fmt: skip
        outcome = machine.run(timeout=240)
        printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
        assert outcome.reason == "power-off", printed[-2000:]
        check(machine, printed, printed, r"17: +[1-9]\d* +IO-APIC +17-fasteoi +virtio0")
