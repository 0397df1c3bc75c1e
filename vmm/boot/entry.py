"""How the first vCPU starts, and the tables it starts with: GDT and identity page tables."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import places

if TYPE_CHECKING:
    from vmm.boot.claims import Claims

# The selectors the Linux boot protocol names __BOOT_CS and __BOOT_DS; every mode with a GDT uses the same
# ones.
BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20

# Flat descriptors, all present, DPL 0, already accessed (Intel SDM vol. 3, 3.4.5).
_CODE64 = 0x00AF9B000000FFFF
_CODE32 = 0x00CF9B000000FFFF
_DATA = 0x00CF93000000FFFF
# A busy TSS of 0x68 bytes at 0: nothing is ever taken from it, VM entry only wants the type.
_TSS = 0x00008B0000000067

_PRESENT_WRITABLE = 0x3
_LARGE_PAGE = 0x80
_DIRECTORIES = 4  # one per GiB: the first 4 GiB
_PAGE_TABLES_SIZE = (2 + _DIRECTORIES) * places.PAGE


class Entry:
    """What the first vCPU must look like, and what was decided on the way.

    ``mode``: "real", "protected" (32-bit, flat, paging off) or "long" (paging on through ``cr3``).
    ``kind``: what was booted: "bzimage", "linux64", "pvh", "multiboot", "elf64", "elf32" or "flat".
    ``rip``: first instruction; an offset from ``cs_base`` in real mode, a linear address otherwise.
    ``registers``: general registers that are not zero, by 64-bit name ("rsi", "rbx" ...).
    ``cs``, ``ds``, ``ss``: selectors (``ds`` is also ES, FS and GS); ``tr``: the TSS's. In real mode a base
    is selector * 16 and there is no table: ``gdt_limit`` is 0. Otherwise bases are 0 and limits 4 GiB.
    ``cr3``, ``gdt_base``, ``gdt_limit``: tables already written to guest memory.
    ``symbols``: path of an ELF file with the guest's symbols, or None. ``notes``: decisions, for
    ``--verbose``.
    """

    __slots__ = (
        "cr3",
        "cs",
        "cs_base",
        "ds",
        "gdt_base",
        "gdt_limit",
        "kind",
        "mode",
        "notes",
        "registers",
        "rip",
        "ss",
        "symbols",
        "tr",
    )

    def __init__(self, mode: str, kind: str, rip: int) -> None:
        self.mode = mode
        self.kind = kind
        self.rip = rip
        self.registers: dict[str, int] = {}
        self.cs = self.ds = self.ss = self.tr = 0
        self.cs_base = 0
        self.cr3 = 0
        self.gdt_base = 0
        self.gdt_limit = 0
        self.symbols: str | None = None
        self.notes: list[str] = []

    def __repr__(self) -> str:
        return f"Entry({self.kind}, {self.mode} mode, rip={self.rip:#x})"


def real_mode(kind: str, cs: int, ip: int) -> Entry:
    """An Entry at cs:ip."""
    entry = Entry("real", kind, ip)
    entry.cs = entry.ds = cs
    entry.cs_base = cs << 4
    return entry


def flat_mode(claims: Claims, mode: str, kind: str, rip: int) -> Entry:
    """An Entry in "protected" or "long" mode; writes the GDT and, for long mode, the identity page tables."""
    entry = Entry(mode, kind, rip)
    gdt = struct.pack("<6Q", 0, 0, _CODE64 if mode == "long" else _CODE32, _DATA, _TSS, 0)
    entry.gdt_base = claims.place(places.GDT, len(gdt), "the GDT")
    claims.memory.write(entry.gdt_base, gdt)
    entry.gdt_limit = len(gdt) - 1
    entry.cs, entry.ds, entry.ss, entry.tr = BOOT_CS, BOOT_DS, BOOT_DS, BOOT_TSS
    if mode == "long":
        entry.cr3 = claims.place(places.PAGE_TABLES, _PAGE_TABLES_SIZE, "the page tables")
        claims.memory.write(entry.cr3, _identity_map(entry.cr3))
    return entry


def _identity_map(base: int) -> bytes:
    """PML4, PDPT and page directories of 2 MiB pages, to lie at ``base`` (1 GiB pages are not everywhere)."""
    pdpt = base + places.PAGE
    directories = pdpt + places.PAGE
    top = struct.pack("<Q", pdpt | _PRESENT_WRITABLE).ljust(places.PAGE, b"\0")
    middle = struct.pack(
        f"<{_DIRECTORIES}Q", *(directories + n * places.PAGE | _PRESENT_WRITABLE for n in range(_DIRECTORIES))
    ).ljust(places.PAGE, b"\0")
    pages = range(0, _DIRECTORIES * places.GIB, 2 * places.MIB)
    return top + middle + struct.pack(f"<{len(pages)}Q", *(page | _LARGE_PAGE | _PRESENT_WRITABLE for page in pages))
