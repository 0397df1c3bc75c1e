"""The memory map a guest is told: RAM, the legacy hole below 1 MiB, and what others reserved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import layout
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

# ACPI 6.4, table 15.6 (address range types).
RAM = 1
RESERVED = 2
ACPI = 3
NVS = 4

# struct boot_params has room for this many (E820_MAX_ENTRIES_ZEROPAGE).
ENTRIES_MAX = 128


def memory_map(
    regions: Iterable[tuple[int, int]], reserved: Iterable[tuple[int, int, int]] = ()
) -> list[tuple[int, int, int]]:
    """The map as (address, size, type), ascending and free of overlaps.

    ``regions`` are RAM as (address, size); ``reserved`` are (address, size, type) and win over RAM, wherever
    they lie. ConfigError: two reserved ranges overlap, one is empty or wraps, or there are more than
    ENTRIES_MAX entries.
    """
    holes = sorted(
        [
            (layout.EBDA, layout.VIDEO - layout.EBDA, RESERVED),
            (layout.VIDEO, layout.HIGH_RAM - layout.VIDEO, RESERVED),
            *reserved,
        ],
        key=lambda hole: (hole[0], -hole[1]),
    )
    merged: list[tuple[int, int, int]] = []
    for gpa, size, kind in holes:
        if size <= 0 or gpa < 0 or gpa + size > 1 << 64:
            raise ConfigError(
                f"reserved memory range {gpa:#x}+{size:#x} is empty or leaves the address space"
            )
        if merged and gpa < merged[-1][0] + merged[-1][1]:
            last, last_size, last_kind = merged[-1]
            # ACPI tables live inside the BIOS area: a reserved range that holds another one is split around
            # it.
            if last_kind != RESERVED or gpa + size > last + last_size:
                raise ConfigError(f"reserved memory ranges at {last:#x} and {gpa:#x} overlap")
            merged[-1:] = [
                entry
                for entry in (
                    (last, gpa - last, RESERVED),
                    (gpa, size, kind),
                    (gpa + size, last + last_size - gpa - size, RESERVED),
                )
                if entry[1]
            ]
        else:
            merged.append((gpa, size, kind))
    entries = list(merged)
    for start, size in regions:
        end = start + size
        for gpa, hole, _ in merged:
            if gpa + hole <= start or gpa >= end:
                continue
            if gpa > start:
                entries.append((start, gpa - start, RAM))
            start = min(gpa + hole, end)
        if start < end:
            entries.append((start, end - start, RAM))
    if len(entries) > ENTRIES_MAX:
        raise ConfigError(
            f"the memory map has {len(entries)} entries, more than the {ENTRIES_MAX} a zero page holds"
        )
    return sorted(entries)
