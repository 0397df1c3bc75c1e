"""Modules of a stock kernel in an initramfs: what they need comes before them, what is built in does not come."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from vmm.config import MachineConfig
from vmm.errors import HostError
from vmm.linux import modules


def module(needs: str) -> bytes:
    return b"\x7fELF...license=GPL\0depends=" + needs.encode() + b"\0retpoline=Y\0name=x\0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kernel/net").mkdir(parents=True)
    (tmp_path / "kernel/top.ko").write_bytes(module("left,right-side"))
    (tmp_path / "kernel/left.ko").write_bytes(module("base,inside"))
    (tmp_path / "kernel/net/right-side.ko.xz").write_bytes(lzma.compress(module("base")))
    (tmp_path / "kernel/net/base.ko").write_bytes(module(""))
    (tmp_path / "modules.builtin").write_text("kernel/fs/inside.ko\nkernel/fs/other-thing.ko\n")
    return tmp_path


def test_what_a_module_needs_is_loaded_before_it(folder: Path) -> None:
    entries = modules.entries(folder, ["top", "base", "other-thing"])
    names = ["lib/load/00-base.ko", "lib/load/01-left.ko", "lib/load/02-right_side.ko", "lib/load/03-top.ko"]
    assert [entry.name for entry in entries] == names
    assert entries[2].content == module("base")  # unpacked: busybox' insmod knows no xz


def test_a_module_that_is_nowhere_is_named(folder: Path) -> None:
    with pytest.raises(HostError, match="no module absent"):
        modules.entries(folder, ["absent"])


def test_a_machine_s_devices_name_their_drivers() -> None:
    assert modules.of_machine(MachineConfig(rng=False)) == ["virtio_pci"]
    config = MachineConfig(
        virtio="mmio", disks="d", nets="user", shares="a:b", vsock="v", balloon=True, console_device="virtio"
    )
    assert modules.of_machine(config) == [
        "virtio_mmio", "virtio_blk", "virtio_net", "virtiofs", "vmw_vsock_virtio_transport", "virtio_balloon",
        "virtio_console", "virtio_rng",
    ]  # fmt: skip
