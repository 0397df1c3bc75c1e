"""An overlay file read as docs/disk-overlay.md has it, by nothing of the library's: a second opinion on the format."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

CLUSTER = 4096


def flattened(base: Path, *overlays: Path) -> bytes:
    """The disk that a base and overlays make, the lowest first."""
    below = base.read_bytes()
    for overlay in overlays:
        below = _over(below, overlay.read_bytes())
    return below


def _over(below: bytes, file: bytes) -> bytes:
    magic, version, cluster, size, bitmap_at, bitmap_size, data_at, base_size, _, check = struct.unpack_from(
        "<8sIIQQQQQII", file
    )
    assert (magic, version, cluster, base_size) == (b"PYVMMOVL", 1, CLUSTER, len(below))
    assert check == zlib.crc32(file[:60])
    bits = int.from_bytes(file[bitmap_at : bitmap_at + bitmap_size], "little")
    disk = bytearray(below.ljust(size, b"\0"))
    for n in range(-(-size // CLUSTER)):
        if bits >> n & 1:
            at, end = n * CLUSTER, min((n + 1) * CLUSTER, size)
            disk[at:end] = file[data_at + at : data_at + end]
    return bytes(disk)
