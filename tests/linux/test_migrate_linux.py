"""A Linux guest with its devices moves while its shell is used: there and back, by pre-copy and post-copy."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from vmm import migrate
from vmm.testing.linux import LinuxGuest

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.linux.kernel import SmallKernel
    from vmm.machine import Machine

pytestmark = pytest.mark.timeout(600)

_LAY_DOWN = "seq 20000 > /tmp/file; md5sum /tmp/file"
_KEEP_BUSY = "(while echo tick; do sleep 0.1; done > /dev/vda) < /dev/null > /dev/null 2>&1 & echo $! > /tmp/busy"
_REST = "kill $(cat /tmp/busy); echo written > /dev/vda; sync; dmesg | grep -ci 'I/O error\\|stuck\\|blocked for'"


def moved(machine: Machine, address: str, **how: bool) -> Machine:
    came: list[Machine] = []
    with migrate.Receiver(address) as receiver:
        there = threading.Thread(target=lambda: came.append(receiver.receive(60)))
        there.start()
        machine.migrate(address, **how)
        there.join()
    assert machine.wait().reason == "migrated"
    machine.close()
    return came[0]


@pytest.mark.parametrize(
    "postcopy",
    [pytest.param(False, id="pre-copy"), pytest.param(True, id="post-copy", marks=pytest.mark.slow)],
)
def test_a_shell_goes_on_elsewhere(small_kernel: SmallKernel, tmp_path: Path, postcopy: bool) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(8 << 20))
    guest = LinuxGuest(kernel=str(small_kernel.bzimage), memory="128M", disks=[str(disk)])
    try:
        before = guest.run(_LAY_DOWN, timeout=120).output
        assert guest.run(_KEEP_BUSY).status == 0
        for n in range(2):
            assert guest.machine is not None
            guest.machine = moved(guest.machine, f"unix:{tmp_path}/{n}", postcopy=postcopy)
            assert guest.run("md5sum /tmp/file", timeout=120).output == before
        assert guest.run(_REST).output == "0\n"
        assert guest.boots == 1
    finally:
        guest.close()
    assert disk.read_bytes().startswith(b"written\n")
