"""PVH: an ELF file with a Xen note that gives its 32-bit entry point (Xen's docs/misc/pvh.pandoc)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import startinfo
from vmm.boot.entry import flat_mode
from vmm.errors import ImageError

if TYPE_CHECKING:
    from vmm.boot.elf import Elf
    from vmm.boot.entry import Entry
    from vmm.boot.request import Request

_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY


def entry_point(elf: Elf) -> int | None:
    """The physical address in the PHYS32_ENTRY note, or None without one. ImageError: an odd-sized note."""
    for name, kind, desc in elf.notes():
        if name == b"Xen" and kind == _PHYS32_ENTRY:
            if len(desc) not in (4, 8):
                raise ImageError(f"{elf.image.name}: PVH entry note of {len(desc)} bytes; 4 or 8 are meant")
            return int.from_bytes(desc, "little")
    return None


def load(request: Request, elf: Elf) -> Entry:
    """Load for a start in 32-bit protected mode, paging off, EBX = start info."""
    rip = entry_point(elf)
    if rip is None:
        raise ImageError(f"{elf.image.name}: no PVH entry note (Linux: CONFIG_PVH=y)")
    if not any(segment.paddr <= rip < min(segment.paddr + segment.memsz, 1 << 32) for segment in elf.segments):
        raise ImageError(f"{elf.image.name}: PVH entry point {rip:#x} is in no loadable segment below 4 GiB")
    elf.load(request.claims)
    entry = flat_mode(request.claims, "protected", "pvh", rip)
    entry.registers["rbx"] = startinfo.write(request)
    entry.symbols = elf.image.path
    request.notes.append(f"PVH: entered at {rip:#x}, segments at {elf.low:#x}..{elf.high:#x}")
    return entry
