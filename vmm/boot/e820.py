"""The memory map of a guest: RAM, the legacy hole below 1 MiB, and reserved ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import places
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# ACPI 6.4, table 15.6 (address range types).
RAM = 1
RESERVED = 2
ACPI = 3
NVS = 4

# struct boot_params has room for this many (E820_MAX_ENTRIES_ZEROPAGE).
ENTRIES_MAX = 128


_LEGACY = (
    (places.EBDA, places.VIDEO - places.EBDA, RESERVED),
    (places.VIDEO, places.HIGH_RAM - places.VIDEO, RESERVED),
)


def memory_map(
    regions: Iterable[tuple[int, int]], reserved: Iterable[tuple[int, int, int]] = ()
) -> list[tuple[int, int, int]]:
    """The map as (address, size, type), ascending and free of overlaps.

    ``regions`` are RAM as (address, size); ``reserved`` are (address, size, type) and win over RAM and over the
    legacy hole (ACPI tables live in it), wherever they lie. ConfigError: two reserved ranges overlap, one is empty
    or wraps, or there are more than ENTRIES_MAX entries.
    """
    entries = sorted(reserved)
    end = 0
    for gpa, size, _ in entries:
        if size <= 0 or gpa < 0 or gpa + size > 1 << 64:
            raise ConfigError(f"reserved memory range {gpa:#x}+{size:#x} is empty or leaves the address space")
        if gpa < end:
            raise ConfigError(f"reserved memory range {gpa:#x}+{size:#x} overlaps the one before it")
        end = gpa + size
    for entry in (*_LEGACY, *((gpa, size, RAM) for gpa, size in regions)):
        entries = sorted(entries + list(_outside(entry, entries)))
    if len(entries) > ENTRIES_MAX:
        raise ConfigError(f"the memory map has {len(entries)} entries, more than the {ENTRIES_MAX} a zero page holds")
    return entries


def _outside(entry: tuple[int, int, int], others: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """The pieces of ``entry`` that none of ``others`` (ascending, apart) covers."""
    start, size, kind = entry
    end = start + size
    for gpa, length, _ in others:
        if start < min(gpa, end):
            yield start, min(gpa, end) - start, kind
        start = max(start, gpa + length)
    if start < end:
        yield start, end - start, kind
