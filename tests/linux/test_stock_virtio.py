"""Debian's stock cloud kernel, its drivers as modules of its own package: root on a disk, the network, both transports.

Minutes where KVM emulates guest kernel code, seconds elsewhere.
"""

from __future__ import annotations

import hashlib
import http.server
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from vmm import Machine
from vmm.config import MachineConfig
from vmm.console import Console
from vmm.devices.virtio.balloon import Balloon
from vmm.devices.virtio.console import VirtioConsole
from vmm.devices.virtio.fs import find_server
from vmm.errors import HostError
from vmm.linux import debian, initramfs, modules

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


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_root_on_a_disk_and_a_file_through_the_network(
    cloud_kernel: debian.StockKernel, transport: str, tmp_path: Path
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
            kernel=cloud_kernel.vmlinuz,
            memory="512M",
            virtio=transport,
            disks=str(image),
            nets="user",
            append="loglevel=6",
        )
        drivers = modules.entries(cloud_kernel.modules, modules.of_machine(config))
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


MIB = 1 << 20
STREAM = bytes(range(256)) * 1024

# One line for each device that works; the balloon is looked at from outside.
EVERY_DEVICE = """
for device in /sys/bus/virtio/drivers/*/virtio*; do echo "bound: $device"; done
echo disk: $(dd if=/dev/vda bs=512 count=1 2>/dev/null | sha256sum)
dd if=/dev/vda of=/dev/vda bs=512 count=1 seek=2 conv=fsync 2>/dev/null
ip link set eth0 up; cat /sys/class/net/eth0/carrier
head -c 8 /dev/hwrng | wc -c
mkdir /share; mount -t virtiofs host /share && cat /share/hello && echo from the guest >/share/written
umount /share
read -r line </dev/hvc0; echo "console: $line"; echo "heard $line" >/dev/hvc0
vsock-echo connect 77
read -r line </dev/hvc0
"""


def _send(end: socket.socket) -> None:
    end.sendall(STREAM)
    end.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_every_device_is_bound_and_works(cloud_kernel: debian.StockKernel, transport: str, tmp_path: Path) -> None:
    try:
        find_server()
    except HostError as error:
        pytest.skip(str(error))
    program = tmp_path / "vsock-echo"
    source = Path(__file__).with_name("vsock-echo.c")
    subprocess.run(["gcc", "-static", "-Os", "-Wall", "-o", program, source], check=True, timeout=120)
    image, shared = tmp_path / "disk.img", tmp_path / "shared"
    image.write_bytes(bytes(range(256)) * 2 + bytes(MIB - 512))
    shared.mkdir()
    (shared / "hello").write_text("from the host\n")
    config = MachineConfig(
        kernel=cloud_kernel.vmlinuz, memory="512M", virtio=transport, disks=str(image), nets="user", balloon=True,
        shares=f"{shared}:host", vsock=f"{tmp_path}/v,cid=5", append="loglevel=6",
    )  # fmt: skip
    drivers = modules.entries(cloud_kernel.modules, [*modules.of_machine(config), "virtio_console"])
    entries = [*drivers, initramfs.file("bin/vsock-echo", program)]
    console = Console()
    try:
        initrd = str(initramfs.command(["sh", "-c", EVERY_DEVICE], entries=entries))
        with Machine(config, initrd=[initrd]) as machine, socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(3000)
            listener.bind(f"{tmp_path}/v_77")
            listener.listen()
            machine.add(VirtioConsole(machine.native, 0, console))
            (balloon,) = (device for device in machine.virtio if isinstance(device, Balloon))
            balloon.target = 64 * MIB
            machine.start()
            console.send("typed\n")
            console.expect(rb"heard typed\r?\n", 3000)
            end = listener.accept()[0]
            end.settimeout(300)
            with end:
                writer = threading.Thread(target=_send, args=(end,))
                writer.start()
                got = bytearray()
                while part := end.recv(1 << 16):
                    got += part
                writer.join()
            assert bytes(got) == STREAM
            machine.console.expect(f"echoed {len(STREAM)}", 300)
            while balloon.actual < 64 * MIB:  # pages are given as the driver finds them
                assert machine.outcome is None
            console.send("over\n")
            outcome = machine.wait(timeout=600)
            printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
            assert machine.messages == []
    finally:
        console.destroy()
    assert (outcome.reason, outcome.status) == ("power-off", 0), printed[-4000:]
    for driver in ("virtio_blk", "virtio_net", "virtio_rng", "virtiofs", "virtio_balloon", "virtio_console",
                   "vmw_vsock_virtio_transport"):  # fmt: skip
        assert f"bound: /sys/bus/virtio/drivers/{driver}/virtio" in printed, printed[-4000:]
    first = hashlib.sha256(image.read_bytes()[:512]).hexdigest()
    assert f"disk: {first} -\n1\n8\nfrom the host\nconsole: typed\n" in printed, printed[-4000:]
    assert image.read_bytes()[1024:1536] == bytes(range(256)) * 2
    assert (shared / "written").read_text() == "from the guest\n"
