"""Debian's stock cloud kernel, its drivers as modules of its own package: root on a disk, the network, both transports.

Minutes where KVM emulates guest kernel code, seconds elsewhere.
"""

from __future__ import annotations

import hashlib
import http.server
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from vmm import Machine
from vmm.config import MachineConfig
from vmm.errors import HostError
from vmm.linux import debian, initramfs, modules

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        not all(map(shutil.which, ("mke2fs", "debugfs", "passt"))), reason="e2fsprogs or passt is missing"
    ),
]

# In the initramfs: the root file system is the disk's from here on.
OUTSIDE = """
mount -t ext4 /dev/vda /root || exit 1
mount -t devtmpfs dev /root/dev; mount -t proc proc /root/proc; mount -t sysfs sys /root/sys
chroot /root /bin/sh /inside PORT; echo inside: $?
umount /root/sys /root/proc /root/dev; umount /root && echo unmounted
"""

INSIDE = """
for device in /sys/bus/virtio/drivers/*/virtio*; do echo "bound: $device"; done
yes "$(cat /proc/sys/kernel/random/uuid)" | head -c 16777216 >/data; sync
echo 3 >/proc/sys/vm/drop_caches
echo sum: $(sha256sum </data)
ip link set eth0 up
udhcpc -i eth0 -n -q -t 10 -s /lease && wget -q -O /fetched http://$(cat /router):$1/file
echo fetched: $(sha256sum </fetched)
"""

LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo $router >/router
"""


@pytest.fixture(scope="module")
def kernel() -> debian.StockKernel:
    try:
        return debian.stock_kernel("cloud")
    except HostError as error:
        pytest.skip(f"no stock kernel: {error}")


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_root_on_a_disk_and_a_file_through_the_network(
    kernel: debian.StockKernel, transport: str, tmp_path: Path
) -> None:
    root, image, served = tmp_path / "root", tmp_path / "root.img", tmp_path / "served"
    for folder in ("bin", "dev", "proc", "sys", "tmp"):
        (root / folder).mkdir(parents=True)
    shutil.copy(debian.busybox(), root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    (root / "inside").write_text(INSIDE)
    (root / "lease").write_text(LEASE)
    (root / "lease").chmod(0o755)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", root, image, "64M"], check=True, timeout=60)
    served.mkdir()
    data = b"from the host\n" * 5000
    (served / "file").write_bytes(data)
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(served))  # noqa: E731
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = MachineConfig(
            kernel=kernel.vmlinuz, memory="512M", virtio=transport, disks=str(image), nets="user", append="loglevel=6"
        )
        drivers = modules.entries(kernel.modules, modules.of_machine(config))
        program = OUTSIDE.replace("PORT", str(server.server_address[1]))
        initrd = str(initramfs.command(["sh", "-c", program], entries=drivers))
        with Machine(config, initrd=[initrd]) as machine:
            outcome = machine.run(timeout=5400)
            printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
            messages = list(machine.messages)
        server.shutdown()
    assert (outcome.reason, outcome.status) == ("power-off", 0), printed[-4000:]
    assert messages == []
    for driver in ("virtio_blk", "virtio_net", "virtio_rng"):
        assert f"bound: /sys/bus/virtio/drivers/{driver}/virtio" in printed, printed[-4000:]
    assert "\ninside: 0\nunmounted\n" in printed, printed[-4000:]
    assert f"fetched: {hashlib.sha256(data).hexdigest()} -" in printed, printed[-4000:]
    subprocess.run(["debugfs", "-R", f"dump /data {tmp_path}/data", image], check=True, timeout=60, capture_output=True)
    digest = hashlib.sha256((tmp_path / "data").read_bytes()).hexdigest()
    assert (tmp_path / "data").stat().st_size == 16 << 20
    assert f"sum: {digest} -" in printed, printed[-4000:]
    # Without a PCI host a kernel that has PCI built in says "PCI: Fatal: No config space access function found".
    pci = ("PCI: Fatal", "not using MMCONFIG") if transport == "pci" else ()
    for complaint in ("ACPI Error", "ACPI BIOS", "Call Trace", *pci):
        assert complaint not in printed
