"""struct boot_params, the "zero page" (Linux Documentation/arch/x86: zero-page.rst, boot.rst)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import initrd, places
from vmm.boot.entry import flat_mode

if TYPE_CHECKING:
    from vmm.boot.entry import Entry
    from vmm.boot.request import Request

HEADER = 0x1F1  # struct setup_header; where it lies in the image is where it lies in the zero page
HEADER_END = 0x290  # edd_mbr_sig_buffer follows

_ACPI_RSDP = 0x070
_E820_ENTRIES = 0x1E8
_VID_MODE = 0x1FA
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_CODE32_START = 0x214
_RAMDISK = 0x218
_CMD_LINE_PTR = 0x228
_HARDWARE_SUBARCH = 0x23C
_SETUP_DATA = 0x250
_E820_TABLE = 0x2D0

_LOADER_UNDEFINED = 0xFF
_LOADED_HIGH = 0x01
_KASLR = 0x02
_VIDEO_NORMAL = 0xFFFF


def enter_linux(
    request: Request,
    *,
    kind: str,
    rip: int,
    header: bytes,
    load_address: int,
    cmdline_max: int,
    initrd_addr_max: int,
) -> Entry:
    """Write command line, initrd and zero page, and return the Entry of the 64-bit boot protocol at ``rip``.

    ``header`` is the image's setup header from offset 0x1f1 on. The kernel must be in place (its memory
    claimed), so that the initrd keeps clear of it.
    """
    entry = flat_mode(request.claims, "long", kind, rip)
    cmdline = request.put_cmdline(request.cmdline, cmdline_max)
    zero_page = request.claims.place(places.START_INFO, places.PAGE, "the zero page")
    ramdisk, ramdisk_size = initrd.place_concatenated(request, initrd_addr_max)

    page = bytearray(places.PAGE)
    page[HEADER : HEADER + len(header)] = header
    struct.pack_into("<Q", page, _ACPI_RSDP, request.acpi_rsdp)
    struct.pack_into("<H", page, _VID_MODE, _VIDEO_NORMAL)
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    page[_LOADFLAGS] = page[_LOADFLAGS] & ~_KASLR | _LOADED_HIGH
    struct.pack_into("<I", page, _CODE32_START, load_address)
    struct.pack_into("<II", page, _RAMDISK, ramdisk, ramdisk_size)
    struct.pack_into("<I", page, _CMD_LINE_PTR, cmdline)
    struct.pack_into("<IQ", page, _HARDWARE_SUBARCH, 0, 0)
    struct.pack_into("<Q", page, _SETUP_DATA, 0)
    page[_E820_ENTRIES] = len(request.memory_map)
    for index, (gpa, size, e820_type) in enumerate(request.memory_map):
        struct.pack_into("<QQI", page, _E820_TABLE + index * 20, gpa, size, e820_type)
    request.claims.memory.write(zero_page, page)

    entry.registers["rsi"] = zero_page
    return entry
