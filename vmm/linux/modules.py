"""Kernel modules of a stock kernel for an initramfs: those named, with what they depend on, in loading order.

A package's modules come without ``modules.dep``: each says itself what it needs, in its ``.modinfo`` section.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import HostError
from vmm.linux import initramfs

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vmm.config import MachineConfig

FOLDER = "lib/load"
"""Where the initramfs's first process loads every ``*.ko`` from, in the order of their names."""

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


def _index(modules: Path) -> dict[str, Path]:
    found = {}
    for path in modules.rglob("*.ko*"):
        for suffix in _SUFFIXES:
            if path.name.endswith(suffix):
                found[path.name.removesuffix(suffix).replace("-", "_")] = path
    return found


def _built_in(modules: Path) -> set[str]:
    try:
        text = (modules / "modules.builtin").read_text()
    except OSError:
        return set()
    return {line.rsplit("/", 1)[-1].removesuffix(".ko").replace("-", "_") for line in text.split()}


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.endswith(".xz"):
        import lzma

        return lzma.decompress(data)
    if path.name.endswith(".gz"):
        import gzip

        return gzip.decompress(data)
    if path.name.endswith(".zst"):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def depends(module: bytes) -> list[str]:
    """The modules that one needs, by its ``.modinfo`` (``depends=a,b`` between NULs)."""
    at = module.find(b"\0depends=")
    if at < 0:
        return []
    value = module[at + len(b"\0depends=") : module.index(b"\0", at + 1)].decode(errors="replace")
    return [name.replace("-", "_") for name in value.split(",") if name]


def entries(modules: Path, names: Iterable[str]) -> list[initramfs.Entry]:
    """``names`` and all they depend on, as files of an initramfs whose first process loads them in order.

    ``modules`` is lib/modules/VERSION. What is built into the kernel needs no file. Raises
    :class:`~vmm.errors.HostError` for a module that is neither.
    """
    index, built_in = _index(modules), _built_in(modules)
    order: dict[str, bytes] = {}

    def want(name: str) -> None:
        if name in order or name in built_in:
            return
        if name not in index:
            raise HostError(f"{modules} has no module {name}: the kernel's package is not the one that was expected")
        content = _content(index[name])
        for needed in depends(content):
            want(needed)
        order[name] = content

    for name in names:
        want(name.replace("-", "_"))
    return [initramfs.file(f"{FOLDER}/{n:02}-{name}.ko", data, 0o644) for n, (name, data) in enumerate(order.items())]


def of_machine(config: MachineConfig) -> list[str]:
    """The drivers a Linux needs for the virtio devices of a machine."""
    wanted = ["virtio_pci" if config.virtio == "pci" else "virtio_mmio"]
    wanted += ["virtio_blk"] if config.disks else []
    wanted += ["virtio_net"] if config.nets else []
    wanted += ["virtiofs"] if config.shares else []
    wanted += ["vmw_vsock_virtio_transport"] if config.vsock else []
    wanted += ["virtio_balloon"] if config.balloon else []
    wanted += ["virtio_console"] if config.console_device == "virtio" else []
    wanted += ["virtio_rng"] if config.rng else []
    return wanted
