"""Clones of a Linux guest: each answers, by a name, an address and random numbers of its own, on a disk of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm.parts import Disk, Net
from vmm.testing.linux import LinuxGuest

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(900)  # one boot; then commands in three guests at once

# No pipelines: each command is the guest's only process.
LOOK = """hostname; dd if=/dev/vda bs=16 count=1 2>/dev/null
head -c 16 /dev/urandom >/tmp/random; hexdump -e '"%x"' /tmp/random; echo"""
TAKEN = "dmesg >/tmp/log; grep 'machine fork' /tmp/log; cat /sys/class/net/eth0/address"
WRITE = "hostname >/tmp/name; dd if=/tmp/name of=/dev/vda bs=16 conv=sync 2>/dev/null; sync"
RESEEDED = "crng reseeded due to virtual machine fork"


def test_two_clones_of_a_guest_are_two_guests(small_kernel: SmallKernel, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"of the original\n".ljust(1 << 20, b"\0"))
    nets = [Net("user")] if shutil.which("passt") else []
    origin = LinuxGuest(kernel=str(small_kernel.bzimage), memory="128M", disks=Disk(image), nets=nets)
    guests = [origin]
    try:
        origin.run("hostname origin")
        guests += origin.clone(2)
        for guest in guests[1:]:
            log = guest.run(TAKEN, timeout=300).output
            assert log.count(RESEEDED) == 1
            assert guest.machine is not None
            assert not nets or guest.machine.virtio[1].config(0, 6).hex(":") in log, "the address it was given"
            wrote = guest.run(WRITE, timeout=300)
            assert wrote.status == 0
        looks = [guest.run(LOOK, timeout=300).output.replace("\0", "").splitlines() for guest in guests]
        assert [look[:2] for look in looks] == [
            ["origin", "of the original"], ["clone0", "clone0"], ["clone1", "clone1"]
        ]  # fmt: skip
        assert len({look[2] for look in looks}) == 3, "random numbers"
        assert RESEEDED not in origin.run("dmesg", timeout=300).output
        assert image.read_bytes().startswith(b"of the original")
        assert {guest.boots for guest in guests[1:]} == {0}
    finally:
        for guest in guests:
            guest.close()
