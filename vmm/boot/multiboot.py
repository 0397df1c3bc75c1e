"""Multiboot 1 (Multiboot Specification 0.6.96): ELF files and a.out-kludge headers.

Section numbers are the specification's: 3.1 the header in the image, 3.2 the machine state, 3.3 the
information.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import e820, elf, initrd, places
from vmm.boot.entry import flat_mode
from vmm.errors import ImageError

if TYPE_CHECKING:
    from vmm.boot.entry import Entry
    from vmm.boot.image import Image
    from vmm.boot.request import Request

_HEADER_MAGIC = 0x1BADB002
_LOADER_MAGIC = 0x2BADB002
_MAGIC2 = struct.pack("<I", 0xE85250D6)
# 3.1: the header lies completely within the first 8192 bytes, 32-bit aligned.
SEARCH = 8192

# 3.1.2. Bits 0..15 are demands: one that is not known must be refused.
_ALIGN_MODULES = 1 << 0
_WANT_MEMORY = 1 << 1
_WANT_VIDEO = 1 << 2
_DEMANDS = 0xFFFF
_AOUT_KLUDGE = 1 << 16

# 3.3, flags of the information.
_INFO_MEMORY = 1 << 0
_INFO_CMDLINE = 1 << 2
_INFO_MODULES = 1 << 3
_INFO_MMAP = 1 << 6
_INFO_LOADER = 1 << 9
_INFO_SIZE = 116

_LOADER_NAME = b"pyvmm\0"


class Header:
    """The multiboot header at ``offset`` of the image; the five addresses count when flag bit 16 is set."""

    __slots__ = ("bss_end_addr", "entry_addr", "flags", "header_addr", "load_addr", "load_end_addr", "offset")

    def __init__(self, offset: int, flags: int, addresses: tuple[int, ...]) -> None:
        self.offset = offset
        self.flags = flags
        self.header_addr, self.load_addr, self.load_end_addr, self.bss_end_addr, self.entry_addr = addresses


def find_header(image: Image) -> Header | None:
    """The first header with a right checksum, or None."""
    data = image.head(SEARCH)
    magic = struct.pack("<I", _HEADER_MAGIC)
    at = data.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(data):
            flags, checksum = struct.unpack_from("<II", data, at + 4)
            if (_HEADER_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
                addresses = data[at + 12 : at + 32].ljust(20, b"\0")
                return Header(at, flags, struct.unpack("<5I", addresses))
        at = data.find(magic, at + 1)
    return None


def is_multiboot2(image: Image) -> bool:
    """Whether the image has a Multiboot 2 header instead (which is not supported)."""
    data = image.head(32768)
    at = data.find(_MAGIC2)
    while at >= 0:
        if at % 8 == 0 and at + 16 <= len(data) and sum(struct.unpack_from("<4I", data, at)) & 0xFFFFFFFF == 0:
            return True
        at = data.find(_MAGIC2, at + 1)
    return False


def load(request: Request) -> Entry:
    """Load for a start in 32-bit protected mode, paging off, EAX = 0x2BADB002, EBX = information (3.2)."""
    image = request.image
    header = find_header(image)
    if header is None:
        raise ImageError(
            f"{image.name}: no multiboot header with a right checksum in the first {SEARCH} bytes"
            + ("; it has a Multiboot 2 header, which is not supported" if is_multiboot2(image) else "")
        )
    unknown = header.flags & _DEMANDS & ~(_ALIGN_MODULES | _WANT_MEMORY)
    if unknown:
        video = " (a video mode)" if unknown & _WANT_VIDEO else ""
        raise ImageError(
            f"{image.name}: the multiboot header demands features {unknown:#x}{video} that are not offered; "
            "clear these flags in the header"
        )
    if header.flags & _AOUT_KLUDGE:
        rip = _load_kludge(request, header)
    else:
        program = elf.parse(image)
        rip = program.physical_entry()
        program.load(request.claims)
    if rip >= places.FOUR_GIB:
        raise ImageError(
            f"{image.name}: entry point {rip:#x} is above 4 GiB, out of reach of 32-bit mode; link it lower"
        )
    entry = flat_mode(request.claims, "protected", "multiboot", rip)
    entry.registers["rax"] = _LOADER_MAGIC
    entry.registers["rbx"] = _write_information(request)
    entry.symbols = image.path if image.head(4) == elf.MAGIC else None
    request.notes.append(f"multiboot: header at {header.offset:#x}, flags {header.flags:#x}, entered at {rip:#x}")
    return entry


def _load_kludge(request: Request, header: Header) -> int:
    """3.1.3: the header says what goes where, counted from its own place in the file. Returns the entry."""
    image, claims = request.image, request.claims
    before = header.header_addr - header.load_addr
    if not 0 <= before <= header.offset:
        raise ImageError(
            f"{image.name}: multiboot header_addr {header.header_addr:#x} and load_addr "
            f"{header.load_addr:#x} do not fit a header at file offset {header.offset:#x}"
        )
    start = header.offset - before
    # A load_end_addr of zero means the rest of the file, a bss_end_addr of zero no bss.
    end = header.load_end_addr or header.load_addr + image.size - start
    bss_end = header.bss_end_addr or end
    if not header.load_addr < end <= bss_end or not header.load_addr <= header.entry_addr < bss_end:
        raise ImageError(
            f"{image.name}: multiboot addresses do not ascend: load {header.load_addr:#x}, load end "
            f"{end:#x}, bss end {bss_end:#x}, entry {header.entry_addr:#x}"
        )
    if end - header.load_addr > image.size - start:
        raise ImageError(
            f"{image.name}: truncated: the multiboot header wants {end - header.load_addr:#x} bytes from "
            f"offset {start:#x}, the file has {image.size:#x}; fetch or build it again"
        )
    claims.claim(header.load_addr, bss_end - header.load_addr, "the multiboot image")
    claims.read(image, start, header.load_addr, end - header.load_addr)
    claims.clear(end, bss_end - end)
    return header.entry_addr


def _write_information(request: Request) -> int:
    claims = request.claims
    # As QEMU and GRUB legacy have it, the image's name is the first word.
    name = request.image.name.rsplit("/", 1)[-1].encode("utf-8", "surrogateescape").replace(b"\0", b"?")
    cmdline = request.put_cmdline((name + b" " + request.cmdline).rstrip(), places.CMDLINE_ROOM - 1)
    start, mmap = request.place_start_info("the multiboot information")
    modules = initrd.place_modules(request)

    # Bounded by ENTRIES_MAX and MODULES_MAX: 128 * 24 + 64 * 16 bytes, and the names after them.
    mods = mmap + len(request.memory_map) * 24
    strings = mods + len(modules) * 16
    tables = bytearray()
    names = bytearray(_LOADER_NAME)
    for gpa, size, kind in request.memory_map:
        # The size field does not count itself.
        tables += struct.pack("<IQQI", 20, gpa, size, kind)
    for gpa, size, module in modules:
        tables += struct.pack("<4I", gpa, gpa + size, strings + len(names), 0)
        names += initrd.module_name(module)
    claims.memory.write(mmap, tables + names)

    upper = next((size for gpa, size, kind in request.memory_map if gpa == places.HIGH_RAM and kind == e820.RAM), 0)
    lower = min(places.EBDA, claims.low_end)
    info = bytearray(_INFO_SIZE)
    flags = _INFO_MEMORY | _INFO_CMDLINE | _INFO_MODULES | _INFO_MMAP | _INFO_LOADER
    struct.pack_into("<III", info, 0, flags, lower >> 10, upper >> 10)
    struct.pack_into("<III", info, 16, cmdline, len(modules), mods if modules else 0)
    struct.pack_into("<II", info, 44, len(request.memory_map) * 24, mmap)
    struct.pack_into("<I", info, 64, strings)
    claims.memory.write(start, info)
    return start
