"""struct hvm_start_info (the PVH boot ABI, Xen's public/arch-x86/hvm/start_info.h), version 1."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import initrd, places

if TYPE_CHECKING:
    from vmm.boot.request import Request

_MAGIC = 0x336EC578
_VERSION = 1


def write(request: Request) -> int:
    """Write start info, modules, memory map and command line; returns the start info's address.

    The image must be in place, so that modules keep clear of it.
    """
    claims = request.claims
    cmdline = request.put_cmdline(request.cmdline, places.CMDLINE_ROOM - 1)
    start, memmap = request.place_start_info("the start info")
    modules = initrd.place_modules(request)

    # Bounded by MODULES_MAX and the memory map's ENTRIES_MAX: 64 * 32 + 128 * 24 bytes, and the names after
    # them.
    tables = bytearray()
    names = bytearray()
    modlist = memmap + len(request.memory_map) * 24
    strings = modlist + len(modules) * 32
    for gpa, size, kind in request.memory_map:
        tables += struct.pack("<QQII", gpa, size, kind, 0)
    for gpa, size, name in modules:
        tables += struct.pack("<4Q", gpa, size, strings + len(names), 0)
        names += initrd.module_name(name)
    claims.memory.write(memmap, tables + names)
    info = struct.pack(
        "<4I4QII",
        _MAGIC,
        _VERSION,
        0,
        len(modules),
        modlist if modules else 0,
        cmdline,
        request.acpi_rsdp,
        memmap,
        len(request.memory_map),
        0,
    )
    claims.memory.write(start, info)
    return start
