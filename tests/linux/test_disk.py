"""Linux on virtio-blk: a file system made on the host, written by the guest, read on the host again."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from overlay_reader import flattened

from vmm import Machine
from vmm.devices.virtio.blk import Blk
from vmm.linux import initramfs
from vmm.parts import Disk

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.linux.kernel import SmallKernel

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not shutil.which("mke2fs") or not shutil.which("debugfs"), reason="e2fsprogs is missing"),
]

# Where KVM emulates kernel code, every byte the guest's kernel copies is dear: the disks move it straight to its place.
PROGRAM = """
mkdir -p /a /b
mount -t ext4 /dev/vda /a && mount -t ext4 /dev/vdb /b || exit 1
echo serial: $(cat /sys/block/vda/serial) $(cat /sys/block/vda/queue/logical_block_size) $(cat /sys/block/vda/size)
echo cache: $(cat /sys/block/vda/queue/write_cache) readonly: $(cat /sys/block/vdc/ro)
dd if=/dev/vdc of=/a/written bs=1M count=16 iflag=direct oflag=direct 2>/dev/null
dd if=/a/written of=/b/copy bs=1M count=2 iflag=direct oflag=direct 2>/dev/null
rm /b/old
sync
echo 3 >/proc/sys/vm/drop_caches
echo sums: $(sha256sum </a/written) $(sha256sum </b/copy)
umount /a && umount /b
echo x 2>/dev/null >/dev/vdc && echo written
echo done
"""


def make_file_system(path: Path, folder: Path) -> None:
    """64 MiB of ext4 that hold ``folder``."""
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", str(folder), str(path), "64M"],
        check=True,
        timeout=60,
        capture_output=True,
    )


def sha256_of(image: Path, name: str, scratch: Path) -> str:
    """A file's hash, found without the help of a kernel; the file system must be clean."""
    checked = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
    subprocess.run(["debugfs", "-R", f"dump {name} {scratch}", str(image)], check=True, timeout=60, capture_output=True)
    return hashlib.sha256(scratch.read_bytes()).hexdigest()


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_ext4_on_a_raw_disk_and_on_an_overlay(small_kernel: SmallKernel, transport: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_bytes(b"old" * 100000)
    raw, base, top, locked = (tmp_path / name for name in ("raw.img", "base.img", "top.ovl", "locked.img"))
    make_file_system(raw, folder)
    make_file_system(base, folder)
    content = random.Random(3).randbytes(16 << 20)
    locked.write_bytes(content)
    before = base.read_bytes()
    disks = [
        Disk(str(raw), serial="root-disk", sector=4096 if transport == "mmio" else 512),
        Disk(str(base), overlay=str(top), queues=2, cache="none"),
        Disk(str(locked), readonly=True),
    ]
    initrd = initramfs.command(["sh", "-c", PROGRAM])
    with Machine(kernel=small_kernel.bzimage, initrd=[initrd], memory="256M", virtio=transport, disks=disks) as machine:
        outcome = machine.run(timeout=400)
        printed = machine.console.transcript.decode(errors="replace").replace("\r", "")
        assert outcome.reason == "power-off", printed[-3000:]
        statistics = [disk.statistics() for disk in machine.virtio[:3] if isinstance(disk, Blk)]
        assert machine.messages == []
    sector = 4096 if transport == "mmio" else 512
    assert f"serial: root-disk {sector} 131072\ncache: write back readonly: 1\n" in printed, printed[-3000:]
    assert "\ndone\n" in printed, printed[-3000:]
    assert "written" not in printed
    found = re.search(r"sums: (\w+) +- (\w+) +-", printed)
    assert found, printed[-3000:]
    assert found[1] == hashlib.sha256(content).hexdigest()
    assert found[2] == hashlib.sha256(content[: 2 << 20]).hexdigest()
    assert sha256_of(raw, "written", tmp_path / "dumped") == found[1]
    flat = tmp_path / "flat.img"
    flat.write_bytes(flattened(base, top))
    assert sha256_of(flat, "copy", tmp_path / "dumped") == found[2]
    assert base.read_bytes() == before
    for disk, mib in zip(statistics, (16, 2), strict=False):
        assert disk["bytes_written"] >= mib << 20 and disk["flushes"] > 0 and disk["errors"] == 0
    assert statistics[0]["bytes_read"] >= 16 << 20  # after the caches were dropped
    assert statistics[2]["writes"] == 0
