"""A Linux guest with its devices moves while its shell is used: there and back, by pre-copy and post-copy."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from vmm import Machine, migrate
from vmm.devices.virtio.net import Net
from vmm.net.link import SocketLink
from vmm.testing.linux import LinuxGuest
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(600)

_LAY_DOWN = "seq 20000 > /tmp/file; md5sum /tmp/file"
_KEEP_BUSY = "(while echo tick; do sleep 0.1; done > /dev/vda) < /dev/null > /dev/null 2>&1 & echo $! > /tmp/busy"
_REST = "kill $(cat /tmp/busy); echo written > /dev/vda; sync; dmesg | grep -ci 'I/O error\\|stuck\\|blocked for'"


def moved(machine: Machine, address: str, there: dict[str, Any] | None = None, **how: bool) -> Machine:
    came: list[Machine] = []
    with migrate.Receiver(address, **(there or {})) as receiver:
        destination = threading.Thread(target=lambda: came.append(receiver.receive(60)))
        destination.start()
        machine.migrate(address, **how)
        destination.join()
    assert machine.wait().reason == "migrated"
    machine.close()
    return came[0]


@pytest.mark.parametrize(
    ("postcopy", "mirror"),
    [
        pytest.param(False, False, id="pre-copy"),
        pytest.param(False, True, id="pre-copy with its disk", marks=pytest.mark.slow),
        pytest.param(True, False, id="post-copy", marks=pytest.mark.slow),
    ],
)
def test_a_shell_goes_on_elsewhere(small_kernel: SmallKernel, tmp_path: Path, postcopy: bool, mirror: bool) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(8 << 20))
    guest = LinuxGuest(kernel=str(small_kernel.bzimage), memory="128M", disks=[str(disk)])
    try:
        before = guest.run(_LAY_DOWN, timeout=120).output
        assert guest.run(_KEEP_BUSY).status == 0
        for n in range(2):
            assert guest.machine is not None
            there: dict[str, Any] = {"disks": [str(disk)]}
            if mirror:
                disk = tmp_path / f"images{n}" / "disk0.img"
                disk.parent.mkdir()
                there = {"disks_in": disk.parent}
            guest.machine = moved(guest.machine, f"unix:{tmp_path}/{n}", there, postcopy=postcopy, mirror=mirror)
            assert guest.run("md5sum /tmp/file", timeout=120).output == before
        assert guest.run(_REST).output == "0\n"
        assert guest.boots == 1
    finally:
        guest.close()
    assert disk.read_bytes().startswith(b"written\n")


@pytest.mark.slow
def test_a_moved_guest_tells_its_new_neighbours_where_it_is(small_kernel: SmallKernel, tmp_path: Path) -> None:
    address, mac = bytes([10, 9, 8, 7]), bytes.fromhex("525400aabbcc")
    nets = [f"socket={tmp_path}/here,mac={mac.hex(':')}"]
    guest = LinuxGuest(kernel=str(small_kernel.bzimage), memory="128M", nets=nets)
    with Machine(memory="16M", virtio="mmio", rng=False) as neighbour:
        neighbour.add(Net(neighbour.native, 0, SocketLink(f"{tmp_path}/elsewhere")))
        driver = VirtioDriver.of(neighbour, neighbour.virtio[0])
        driver.start()
        heard = [driver.submit(0, room=[2000]) for _ in range(50)]
        driver.kick(0)
        try:
            assert guest.run("ip addr add 10.9.8.7/24 dev eth0 && ip link set eth0 up", timeout=120).status == 0
            assert guest.machine is not None
            there = {"nets": [f"socket={tmp_path}/elsewhere,mac={mac.hex(':')}"]}
            guest.machine = moved(guest.machine, f"unix:{tmp_path}/0", there)
            frames: list[bytes] = []
            # ARP (RFC 826) to everybody, of the guest's own address as sender and as target
            while not any(
                frame[:14] == b"\xff" * 6 + mac + b"\x08\x06" and frame[28:32] == frame[38:42] == address
                for frame in frames
            ):
                assert len(frames) < len(heard), frames
                frames += [answer.data[12 : answer.written] for answer in driver.wait(0, timeout=60).values()]
        finally:
            guest.close()
