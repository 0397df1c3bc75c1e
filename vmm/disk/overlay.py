"""Overlay files: what a disk's guest wrote over a base that is only read. The format is in docs/disk-overlay.md.

The header is written and checked here and the bitmap and data in C (``native/disk/overlay.c``). The base is the one
the user names, always: its path stands in no file, and no file is an overlay because of its content. A guest writes
whatever it likes into a raw image; were an image that begins like an overlay opened as one, with a base of its own
naming, the guest could have the monitor open any file of the host.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from vmm.disk.image import Image, read_page, refuse_formats
from vmm.errors import ConfigError

MAGIC = b"PYVMMOVL"
VERSION = 1
CLUSTER = 4096
_HEADER = "<8sIIQQQQQI"  # magic, version, cluster; then Layout; its CRC-32 follows
_HEADER_SIZE = 60
_DATA_ALIGNMENT = 1 << 20
_GROWTH = 16  # the bitmap, a hole at first, has room for a disk this many times as large
_SAMPLE = 65536  # bytes at either end of a base by which it is known


class Layout(NamedTuple):
    """What a header says: sizes and positions in bytes, and the CRC-32 by which the base is known again."""

    size: int
    bitmap_at: int
    bitmap_size: int
    data_at: int
    base_size: int
    base_check: int

    @property
    def size_max(self) -> int:
        """The largest disk that the bitmap has room for."""
        return self.bitmap_size * 8 * CLUSTER


class Overlay:
    """An overlay and its base, both open and locked. ``fd`` and ``base`` are the files, ``layout`` says where what is.

    The file is made if there is none, or an empty one. Raises :class:`~vmm.errors.ConfigError`.
    """

    def __init__(self, path: str, base_path: str, *, direct: bool = False) -> None:
        self.path = path
        self.base = Image(base_path, readonly=True)
        try:
            refuse_formats(self.base)
            if not self.base.size:
                raise ConfigError(f"disk {base_path} is empty: an overlay needs a base with a size")
            self.image = Image(path, readonly=False, create=True)
        except BaseException:
            self.base.close()
            raise
        try:
            if self.image.block_device:
                raise ConfigError(f"overlay {path} is a block device: give a file")
            if not self.image.size:
                _write(self.image.fd, _new_layout(self.base))
            self.layout = _read(self.image, self.base)
            _make_whole(self.image.fd, self.layout)
            if direct:
                self.image.close()
                self.image = Image(path, readonly=False, direct=True)
        except BaseException:
            self.close()
            raise

    def grow(self, size: int) -> None:
        """Record another size: before the guest may write there. Raises :class:`~vmm.errors.ConfigError`."""
        if size < self.layout.size:
            raise ConfigError(f"overlay {self.path} cannot shrink: it holds {self.layout.size} bytes")
        if size > self.layout.size_max:
            raise ConfigError(f"overlay {self.path} has room for {self.layout.size_max} bytes: make a new one")
        self.layout = self.layout._replace(size=size)
        _write(self.image.fd, self.layout)

    def close(self) -> None:
        """Close both files."""
        self.image.close()
        self.base.close()


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _new_layout(base: Image) -> Layout:
    bitmap_size = _up(-(-base.size * _GROWTH // (8 * CLUSTER)), CLUSTER)
    return Layout(
        size=base.size,
        bitmap_at=CLUSTER,
        bitmap_size=bitmap_size,
        data_at=_up(CLUSTER + bitmap_size, _DATA_ALIGNMENT),
        base_size=base.size,
        base_check=_check_of(base),
    )


def _check_of(base: Image) -> int:
    """CRC-32 of both ends: boot code, partition table and superblocks, which change when a base is written."""
    import zlib

    return zlib.crc32(
        os.pread(base.fd, _SAMPLE, max(base.size - _SAMPLE, 0)), zlib.crc32(os.pread(base.fd, _SAMPLE, 0))
    )


def _write(fd: int, layout: Layout) -> None:
    """Header, length, and all of it stable. The header lies in one sector: a power cut leaves the old or the new."""
    import mmap
    import struct
    import zlib

    header = struct.pack(_HEADER, MAGIC, VERSION, CLUSTER, *layout)
    with mmap.mmap(-1, CLUSTER) as page:  # aligned, for O_DIRECT
        page[: len(header) + 4] = header + struct.pack("<I", zlib.crc32(header))
        os.pwrite(fd, page, 0)
    _make_whole(fd, layout)
    os.fsync(fd)


def _make_whole(fd: int, layout: Layout) -> None:
    """As long as its disk, whose end a power cut may have taken with the length; what is missing reads as zeros."""
    length = layout.data_at + _up(layout.size, CLUSTER)
    if os.fstat(fd).st_size < length:
        os.ftruncate(fd, length)


def parse(head: bytes) -> Layout:
    """The layout in the first bytes of a file. Raises ``ValueError`` saying what is wrong with it."""
    import struct
    import zlib

    if head[: len(MAGIC)] != MAGIC:
        raise ValueError("is not an overlay")
    if len(head) < _HEADER_SIZE + 4 or zlib.crc32(head[:_HEADER_SIZE]) != int.from_bytes(head[60:64], "little"):
        raise ValueError("has a damaged header")
    _, version, cluster, *numbers = struct.unpack(_HEADER, head[:_HEADER_SIZE])
    if (version, cluster) != (VERSION, CLUSTER):
        raise ValueError(f"is of version {version} with clusters of {cluster}")
    layout = Layout(*numbers)
    positions = (layout.bitmap_at, layout.bitmap_size, layout.data_at)
    if (
        any(n % CLUSTER or not 0 < n < 1 << 62 for n in positions)
        or layout.bitmap_at + layout.bitmap_size > layout.data_at
        or not 0 < layout.size <= layout.size_max
        or layout.size < layout.base_size
    ):
        raise ValueError("has a header that contradicts itself")
    return layout


def _read(image: Image, base: Image) -> Layout:
    try:
        layout = parse(read_page(image.fd, 0))
    except ValueError as error:
        raise ConfigError(f"overlay {image.path} {error}: give another path, or remove the file") from None
    if (layout.base_size, layout.base_check) != (base.size, _check_of(base)):
        raise ConfigError(
            f"overlay {image.path} was made over another disk than {base.path}, or that was written since: "
            "give the base it was made over, or remove the overlay to begin anew"
        )
    return layout
