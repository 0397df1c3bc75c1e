"""Regions of guest memory: of a machine, and in a snapshot's ``memory`` file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vmm._ffi import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE: int = lib.VMM_PAGE
CHUNK: int = lib.VMM_CHUNK
REGIONS_MAX = 32  # of a machine (VMM_MAX_REGIONS)


class Ram(NamedTuple):
    """``size`` bytes of memory at guest-physical address ``gpa``, of a machine that is paused.

    ``view`` is the memory. ``fd`` (-1: none) is the file behind it from ``offset`` on: its holes are known to be zeros
    and not read, unless ``private`` memory (a private mapping, or anonymous) was touched since.
    """

    gpa: int
    size: int
    view: memoryview
    fd: int = -1
    offset: int = 0
    private: bool = False


class Region(NamedTuple):
    """A region in a ``memory`` file, ``offset`` bytes from its start.

    ``held`` is a bitmap of the pages that are in the file (bit n % 8 of byte n / 8), ``checksums`` the CRC-32C of each
    chunk's held pages, four bytes each, little-endian.
    """

    gpa: int
    size: int
    offset: int
    held: bytes
    checksums: bytes

    @property
    def pages_held(self) -> int:
        """Number of pages in the file."""
        return int.from_bytes(self.held, "little").bit_count()


def bitmap_size(size: int) -> int:
    """Return the bytes of a bitmap for ``size`` bytes of memory: whole words of 64 pages."""
    return -(-size // (64 * PAGE)) * 8


def checksums_size(size: int) -> int:
    """Return the bytes of the checksums for ``size`` bytes of memory."""
    return -(-size // CHUNK) * 4


def words(bitmap: bytes | bytearray) -> Any:
    """Return a bitmap as a C pointer, valid as long as ``bitmap`` lives."""
    return ffi.from_buffer("uint64_t[]", bitmap)


def pages_not_zero(ram: Ram) -> bytes:
    """Return the bitmap of the pages of ``ram`` that are not zero."""
    bitmap = bytearray(bitmap_size(ram.size))
    check(lib.vmm_pages_find(ffi.from_buffer(ram.view), ram.size, ram.fd, ram.offset, int(ram.private), words(bitmap)))
    return bytes(bitmap)


def pages_in(gpa: int, size: int, runs: Iterable[tuple[int, int]]) -> bytes:
    """Return the bitmap of the pages of the region ``gpa``, ``size`` that the ``runs`` ``(gpa, size)`` touch."""
    bitmap = bytearray(bitmap_size(size))
    for start, length in runs:
        first = max(start - gpa, 0) // PAGE
        end = -(-min(start + length - gpa, size) // PAGE)
        if first >= end:
            continue
        low, high = first // 8, (end - 1) // 8
        from_first, to_last = 0xFF << first % 8 & 0xFF, 0xFF >> 7 - (end - 1) % 8
        if low == high:
            bitmap[low] |= from_first & to_last
        else:
            bitmap[low] |= from_first
            bitmap[low + 1 : high] = b"\xff" * (high - low - 1)
            bitmap[high] |= to_last
    return bytes(bitmap)
