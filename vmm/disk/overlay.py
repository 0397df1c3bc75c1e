"""Overlay files: what a disk's guest wrote over a base that is only read. The format is in docs/disk-overlay.md.

The header is written and checked here and the bitmap and data in C (``native/disk/overlay.c``). The base is the one
the user names, always: its path stands in no file, and no file is an overlay because of its content. A guest writes
whatever it likes into a raw image; were an image that begins like an overlay opened as one, with a base of its own
naming, the guest could have the monitor open any file of the host.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from vmm.disk.image import OVERLAY_MAGIC, Image, read_page, refuse_formats, whole_sectors
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class Layer(NamedTuple):
    """An open file of a disk, and what its header says; ``None``: it has none, and is the disk's bytes as they are."""

    image: Image
    layout: Layout | None

    @property
    def size(self) -> int:
        """Bytes of the disk that ends here."""
        return self.layout.size if self.layout else self.image.size

    def check(self) -> int:
        """CRC-32 of the file's both ends, which change when it is written: of a disk, boot code, partition table and
        superblocks; of an overlay, its header, the beginning of its bitmap, and the end of its data."""
        import zlib

        fd, size = self.image.fd, self.image.size
        return zlib.crc32(os.pread(fd, _SAMPLE, max(size - _SAMPLE, 0)), zlib.crc32(os.pread(fd, _SAMPLE, 0)))

    def native(self) -> tuple[int, int, int, int, int]:
        """As ``vmm_disk_layer`` has it."""
        at = self.layout
        return (self.image.fd, self.size, at.bitmap_at, at.bitmap_size, at.data_at) if at else (
            self.image.fd, self.size, 0, 0, 0,
        )  # fmt: skip


class Overlay:
    """An overlay and all that lies under it, open and locked. ``layers``: it, then what is only read, the base last.

    ``path``: made if there is none, or an empty one; ``None``: a file without a name, which goes with the disk.
    ``between``: overlay files over ``base_path``, the lowest first, only read. Raises
    :class:`~vmm.errors.ConfigError`. A new one has whole sectors of ``sector`` bytes, whatever its base has.
    """

    def __init__(
        self,
        path: str | None,
        base_path: str,
        *,
        between: Sequence[str] = (),
        direct: bool = False,
        sector: int = 512,
    ) -> None:
        self.layers: list[Layer] = []
        self._sector = sector
        try:
            self._stack(base_path, between)
            self._open(path, direct)
        except BaseException:
            self.close()
            raise

    @property
    def image(self) -> Image:
        """The file that is written."""
        return self.layers[0].image

    @property
    def layout(self) -> Layout:
        """What its header says."""
        layout = self.layers[0].layout
        assert layout is not None
        return layout

    def _stack(self, base_path: str, between: Sequence[str]) -> None:
        """What is only read."""
        base = Image(base_path, readonly=True)
        self.layers.append(Layer(base, None))
        refuse_formats(base)
        if not base.size:
            raise ConfigError(f"disk {base_path} is empty: an overlay needs a base with a size")
        for path in between:
            below = self.layers[0]
            self.layers.insert(0, Layer(Image(path, readonly=True, kind="overlay"), None))
            layout = _read(self.image, below)
            if self.image.size < _length(layout):
                raise ConfigError(f"overlay {path} was cut short: it needs {_length(layout)} bytes, give a whole copy")
            self.layers[0] = Layer(self.image, layout)

    def _open(self, path: str | None, direct: bool) -> None:
        """What is written."""
        below = self.layers[0]
        image = Image.temporary() if path is None else Image(path, readonly=False, create=True, kind="overlay")
        self.layers.insert(0, Layer(image, None))
        if image.block_device:
            raise ConfigError(f"overlay {path} is a block device: give a file")
        if not image.size:
            _write(image.fd, _new_layout(below, self._sector), stable=path is not None)
        layout = _read(image, below)
        try:
            _make_whole(image.fd, layout)
        except OSError as error:
            raise ConfigError(
                f"overlay {path} cannot be made as long as its disk of {layout.size} bytes ({error.strerror}): "
                "give another path, or remove the file"
            ) from error
        if direct and path is not None:
            image.close()
            image = Image(path, readonly=False, direct=True, kind="overlay")
        self.layers[0] = Layer(image, layout)

    def grow(self, size: int) -> None:
        """Record another size: before the guest may write there. Raises :class:`~vmm.errors.ConfigError`."""
        if size < self.layout.size:
            raise ConfigError(f"overlay {self.image.path} cannot shrink: it holds {self.layout.size} bytes")
        if size > self.layout.size_max:
            raise ConfigError(f"overlay {self.image.path} has room for {self.layout.size_max} bytes: make a new one")
        self.layers[0] = Layer(self.image, self.layout._replace(size=size))
        _write(self.image.fd, self.layout)

    def close(self) -> None:
        """Close all files."""
        for layer in self.layers:
            layer.image.close()


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _length(layout: Layout) -> int:
    """Bytes of the file."""
    return layout.data_at + _up(layout.size, CLUSTER)


def _new_layout(base: Layer, sector: int) -> Layout:
    bitmap_size = _up(-(-base.size * _GROWTH // (8 * CLUSTER)), CLUSTER)
    return Layout(
        size=whole_sectors(base.size, sector),
        bitmap_at=CLUSTER,
        bitmap_size=bitmap_size,
        data_at=_up(CLUSTER + bitmap_size, _DATA_ALIGNMENT),
        base_size=base.size,
        base_check=base.check(),
    )


def _write(fd: int, layout: Layout, *, stable: bool = True) -> None:
    """Header, length, and all of it stable. The header lies in one sector: a power cut leaves the old or the new."""
    import mmap
    import struct
    import zlib

    header = struct.pack(_HEADER, OVERLAY_MAGIC, VERSION, CLUSTER, *layout)
    with mmap.mmap(-1, CLUSTER) as page:  # aligned, for O_DIRECT
        page[: len(header) + 4] = header + struct.pack("<I", zlib.crc32(header))
        os.pwrite(fd, page, 0)
    _make_whole(fd, layout)
    if stable:
        os.fsync(fd)


def _make_whole(fd: int, layout: Layout) -> None:
    """As long as its disk, whose end a power cut may have taken with the length; what is missing reads as zeros."""
    if os.fstat(fd).st_size < _length(layout):
        os.ftruncate(fd, _length(layout))


def parse(head: bytes) -> Layout:
    """The layout in the first bytes of a file. Raises ``ValueError`` saying what is wrong with it."""
    import struct
    import zlib

    if head[: len(OVERLAY_MAGIC)] != OVERLAY_MAGIC:
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
        or _length(layout) >= 1 << 62
    ):
        raise ValueError("has a header that contradicts itself")
    return layout


def _read(image: Image, base: Layer) -> Layout:
    try:
        layout = parse(read_page(image.fd, 0))
    except ValueError as error:
        raise ConfigError(f"overlay {image.path} {error}: give another path, or remove the file") from None
    if (layout.base_size, layout.base_check) != (base.size, base.check()):
        raise ConfigError(
            f"overlay {image.path} was made over another disk than {base.image.path}, or that was written since: "
            "give the base it was made over, or remove the overlay to discard its changes"
        )
    return layout
