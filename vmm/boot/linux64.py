"""A Linux ``vmlinux``: segments at their physical addresses, entered by the 64-bit boot protocol."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import zeropage
from vmm.errors import ImageError

if TYPE_CHECKING:
    from vmm.boot.elf import Elf
    from vmm.boot.entry import Entry
    from vmm.boot.request import Request

# A vmlinux carries no setup header: these are x86's COMMAND_LINE_SIZE (less the NUL), and the initrd_addr_max
# and kernel_alignment that every 64-bit bzImage of the last ten years has.
_CMDLINE_MAX = 2047
_INITRD_ADDR_MAX = 0x7FFFFFFF
_KERNEL_ALIGNMENT = 0x200000
_PROTOCOL = 0x020F
_XLF_KERNEL_64 = 0x1


def load(request: Request, elf: Elf) -> Entry:
    """Load a vmlinux. ImageError: 32-bit, or segments that do not fit."""
    if elf.bits != 64:
        raise ImageError(f"{elf.image.name}: a 32-bit Linux kernel; only 64-bit ones (x86-64) can be booted")
    elf.load(request.claims, clear_bss=False)
    entry = zeropage.enter_linux(
        request,
        kind="linux64",
        rip=elf.physical_entry(),
        header=_setup_header(elf),
        load_address=elf.low,
        cmdline_max=_CMDLINE_MAX,
        initrd_addr_max=_INITRD_ADDR_MAX,
    )
    entry.symbols = elf.image.path
    request.notes.append(f"vmlinux: {len(elf.segments)} segments at {elf.low:#x}..{elf.high:#x}")
    return entry


def _setup_header(elf: Elf) -> bytes:
    header = bytearray(0x26C - zeropage.HEADER)

    def put(layout: str, offset: int, value: int | bytes) -> None:
        struct.pack_into(layout, header, offset - zeropage.HEADER, value)

    put("<H", 0x1FE, 0xAA55)
    put("<4s", 0x202, b"HdrS")
    put("<H", 0x206, _PROTOCOL)
    put("<I", 0x22C, _INITRD_ADDR_MAX)
    put("<I", 0x230, _KERNEL_ALIGNMENT)
    put("<H", 0x236, _XLF_KERNEL_64)
    put("<I", 0x238, _CMDLINE_MAX)
    put("<Q", 0x258, elf.low)
    put("<I", 0x260, min(elf.high - elf.low, 0xFFFFFFFF))
    return bytes(header)
