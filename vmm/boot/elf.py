"""ELF executables: headers, loadable segments and notes, each field checked before it is used.

pyelftools reads ELF too and serves symbols elsewhere, but importing it alone takes longer than loading a
kernel, and it does not refuse what a loader must refuse.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import places
from vmm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.boot.claims import Claims
    from vmm.boot.image import Image

MAGIC = b"\x7fELF"

_ET_EXEC = 2
_ET_DYN = 3
_TYPES = {
    1: "a relocatable object; link it first",
    4: "a core dump, not a program",
}
_EM_386 = 3
_EM_X86_64 = 62
_PT_LOAD = 1
_PT_INTERP = 3
_PT_NOTE = 4

# A kernel has under ten; every walk over program headers ends here. (PN_XNUM, 0xffff, is above it too.)
SEGMENTS_MAX = 256
# Notes hold a build id and a few addresses; vmlinux has under 2 KiB of them.
NOTES_MAX = 64 << 10
# "Linux version" is in .rodata, which no kernel has further in than this.
SCAN_MAX = 256 << 20
_SCAN_STEP = 1 << 20


class Segment:
    """One program header: where ``filesz`` bytes at ``offset`` go, and how far zeros follow (``memsz``)."""

    __slots__ = ("align", "filesz", "memsz", "offset", "paddr", "vaddr")

    def __init__(self, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int, align: int) -> None:
        self.offset = offset
        self.vaddr = vaddr
        self.paddr = paddr
        self.filesz = filesz
        self.memsz = memsz
        self.align = align


class Elf:
    """A checked executable of 32 or 64 ``bits``; ``segments`` are the loadable ones, by ``paddr``."""

    __slots__ = ("bits", "entry", "image", "note_segments", "position_independent", "segments")

    def __init__(self, image: Image, bits: int, entry: int, position_independent: bool) -> None:
        self.image = image
        self.bits = bits
        self.entry = entry
        self.position_independent = position_independent
        self.segments: list[Segment] = []
        self.note_segments: list[Segment] = []

    @property
    def low(self) -> int:
        """Lowest physical address loaded."""
        return self.segments[0].paddr

    @property
    def high(self) -> int:
        """End of the highest segment in memory."""
        return self.segments[-1].paddr + self.segments[-1].memsz

    def physical_entry(self) -> int:
        """The entry point as a physical address. ImageError: it is in no segment.

        Linux and most loaders' guests give a physical address in e_entry; a higher-half kernel that gives the
        virtual one, as the ELF specification has it, is translated through the segment that holds it.
        """
        if self.entry == 0:
            raise ImageError(
                f"{self.image.name}: ELF file without an entry point; link it as a program, not as a shared library"
            )
        for segment in self.segments:
            if segment.paddr <= self.entry < segment.paddr + segment.memsz:
                return self.entry
        for segment in self.segments:
            if segment.vaddr <= self.entry < segment.vaddr + segment.memsz:
                return self.entry - segment.vaddr + segment.paddr
        raise ImageError(f"{self.image.name}: ELF entry point {self.entry:#x} is in no loadable segment")

    def load(self, claims: Claims, *, clear_bss: bool = True) -> None:
        """Copy every segment to its physical address. ImageError: not RAM, or on something already there.

        ``clear_bss=False`` leaves the zero-initialised rest as it is, which is what Linux's own unpacker
        does: the kernel clears its bss itself.
        """
        for number, segment in enumerate(self.segments):
            claims.claim(segment.paddr, segment.memsz, f"ELF segment {number}")
            claims.read(self.image, segment.offset, segment.paddr, segment.filesz)
            if clear_bss:
                claims.clear(segment.paddr + segment.filesz, segment.memsz - segment.filesz)

    def move(self, base: int) -> None:
        """Shift every address so that the lowest physical one is ``base``."""
        shift = base - self.low
        self.entry += shift if self.entry else 0  # none stays none
        for segment in self.segments:
            segment.paddr += shift
            segment.vaddr += shift

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Each note as (name without its NUL, type, descriptor); a malformed one ends its segment's walk."""
        for segment in self.note_segments:
            data = self.image.read(segment.offset, min(segment.filesz, NOTES_MAX))
            align = 8 if segment.align == 8 else 4
            at = 0
            while at + 12 <= len(data):
                name_size, desc_size, kind = struct.unpack_from("<3I", data, at)
                desc = _up(at + 12 + name_size, align)
                if desc + desc_size > len(data):
                    break
                yield data[at + 12 : at + 12 + name_size].rstrip(b"\0"), kind, data[desc : desc + desc_size]
                at = _up(desc + desc_size, align)

    def is_linux(self) -> bool:
        """Whether this is a Linux kernel: its notes say so or, in older ones, its banner does."""
        for name, kind, desc in self.notes():
            if name == b"Linux" or (name == b"Xen" and kind == _XEN_GUEST_OS and desc.startswith(b"linux")):
                return True
        return any(self._contains(segment, b"Linux version ") for segment in self.segments)

    def _contains(self, segment: Segment, needle: bytes) -> bool:
        end = segment.offset + min(segment.filesz, SCAN_MAX)
        for start in range(segment.offset, end, _SCAN_STEP):
            if needle in self.image.read(start, min(_SCAN_STEP + len(needle), end - start)):
                return True
        return False


_XEN_GUEST_OS = 6


def parse(image: Image) -> Elf:
    """Read and check the headers. ImageError: not an x86 executable, or any field that cannot be true."""
    name = image.name
    ident = image.head(16)
    if len(ident) < 16 or ident[:4] != MAGIC:
        raise ImageError(f"{name}: not an ELF file")
    if ident[4] not in (1, 2) or ident[5] != 1:
        raise ImageError(
            f"{name}: ELF class {ident[4]:#x}, data encoding {ident[5]:#x}: only little-endian 32 and 64-bit files run"
        )
    wide = ident[4] == 2
    header = struct.unpack("<HHIQQQIHHH" if wide else "<HHIIIIIHHH", image.read(16, 42 if wide else 30))
    kind, machine, _, entry, phoff, _, _, _, phentsize, phnum = header
    if machine not in ((_EM_X86_64,) if wide else (_EM_386,)):
        raise ImageError(f"{name}: ELF machine {machine:#x} is not x86 (x86-64 is 0x3e, 386 is 0x3)")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise ImageError(f"{name}: ELF type {kind:#x}: {_TYPES.get(kind, 'not an executable')}")
    if phentsize != (56 if wide else 32):
        raise ImageError(f"{name}: ELF program headers of {phentsize:#x} bytes; the file is damaged")
    if not 1 <= phnum <= SEGMENTS_MAX:
        raise ImageError(f"{name}: {phnum} ELF program headers; 1 to {SEGMENTS_MAX} can be loaded")
    elf = Elf(image, 64 if wide else 32, entry, kind == _ET_DYN)
    table = image.read(phoff, phnum * phentsize)
    limit = 1 << elf.bits
    for fields in struct.iter_unpack("<IIQQQQQQ" if wide else "<8I", table):
        if wide:
            ptype, _, offset, vaddr, paddr, filesz, memsz, align = fields
        else:
            ptype, offset, vaddr, paddr, filesz, memsz, _, align = fields
        if ptype == _PT_INTERP:
            raise ImageError(f"{name}: a program for an operating system (it names its dynamic linker), not a kernel")
        if ptype not in (_PT_LOAD, _PT_NOTE):
            continue
        if offset + filesz > image.size:
            raise ImageError(
                f"{name}: truncated: an ELF segment is {filesz:#x} bytes at offset {offset:#x}, "
                f"but the file has {image.size:#x}; fetch or build it again"
            )
        segment = Segment(offset, vaddr, paddr, filesz, memsz, align)
        if ptype == _PT_NOTE:
            elf.note_segments.append(segment)
            continue
        if filesz > memsz:
            raise ImageError(f"{name}: ELF segment at {paddr:#x} has more file ({filesz:#x}) than memory ({memsz:#x})")
        if paddr + memsz > limit or vaddr + memsz > limit:
            raise ImageError(f"{name}: ELF segment at {paddr:#x}+{memsz:#x} wraps around the address space")
        if memsz:
            elf.segments.append(segment)
    if not elf.segments:
        raise ImageError(f"{name}: ELF file without a loadable segment; link it as an executable")
    elf.segments.sort(key=lambda segment: segment.paddr)
    for before, after in zip(elf.segments, elf.segments[1:], strict=False):
        if before.paddr + before.memsz > after.paddr:
            raise ImageError(
                f"{name}: ELF segments at {before.paddr:#x}+{before.memsz:#x} and {after.paddr:#x} overlap; "
                "check the linker script's physical addresses"
            )
    if elf.position_independent and elf.low < places.HIGH_RAM:
        elf.move(places.ET_DYN_BASE)
    return elf


def _up(value: int, align: int) -> int:
    return (value + align - 1) & -align
