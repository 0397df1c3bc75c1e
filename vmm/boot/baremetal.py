"""Programs of one's own: ELF without a boot protocol, and flat binaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import places, startinfo
from vmm.boot.entry import flat_mode, real_mode
from vmm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from vmm.boot.elf import Elf
    from vmm.boot.entry import Entry
    from vmm.boot.request import Request

FLAT_MODES = ("real", "protected", "long")
# 0xffff:0xf is the highest first instruction that real mode can name.
_REAL_MAX = 0x100000


def load_elf(request: Request, elf: Elf) -> Entry:
    """An ELF64 starts in long mode, an ELF32 in protected mode, at its entry point, with a stack of 64 KiB.

    RBX holds the address of an hvm_start_info as for PVH: memory map, command line and modules for images that use
    them.
    """
    rip = elf.physical_entry()
    elf.load(request.claims)
    mode, kind = ("long", "elf64") if elf.bits == 64 else ("protected", "elf32")
    if rip >= places.FOUR_GIB:
        raise ImageError(
            f"{elf.image.name}: entry point {rip:#x} is above 4 GiB, where nothing is mapped; link it lower"
        )
    entry = flat_mode(request.claims, mode, kind, rip)
    entry.registers["rbx"] = startinfo.write(request)
    _give_stack(request, entry)
    entry.symbols = elf.image.path
    request.notes.append(f"{kind}: entered at {rip:#x} in {mode} mode, segments at {elf.low:#x}..{elf.high:#x}")
    return entry


def load_flat(request: Request, address: int | None, mode: str) -> Entry:
    """The file's bytes at ``address``, which is also where it starts.

    Without an address: 0x7c00 in real mode, 1 MiB otherwise. Real mode: 0:address below 64 KiB, else
    (address/16):n, DS = CS, and SS:SP just below the image (0:0x7c00 when it is loaded from 64 KiB up), DL =
    0x80 as a BIOS would. ConfigError: an unknown mode, initrds, or a real-mode address above 1 MiB.
    ImageError: it does not fit.
    """
    if mode not in FLAT_MODES:
        raise ConfigError(f"unknown mode {mode!r} for a flat binary; choose one of {', '.join(FLAT_MODES)}")
    if request.initrds:
        raise ConfigError("a flat binary takes no initrd; use an ELF, PVH or multiboot image for modules")
    if request.cmdline:
        raise ConfigError("a flat binary takes no command line; use an ELF, PVH or multiboot image for one")
    claims, image = request.claims, request.image
    if address is None:
        address = places.FLAT_REAL if mode == "real" else places.FLAT_HIGH
    if address < 0 or address >= (_REAL_MAX if mode == "real" else places.FOUR_GIB):
        raise ConfigError(f"load address {address:#x} cannot be reached in {mode} mode; choose a lower one")
    claims.claim(address, image.size, "the flat image")
    claims.read(image, 0, address, image.size)
    request.notes.append(f"flat binary: {image.size} bytes at {address:#x}, entered there in {mode} mode")
    if mode != "real":
        entry = flat_mode(claims, mode, "flat", address)
        _give_stack(request, entry)
        return entry
    entry = real_mode("flat", *((0, address) if address < 0x10000 else (address >> 4, address & 0xF)))
    entry.registers["rsp"] = address & ~0xF if places.PAGE <= address < 0x10000 else places.FLAT_REAL
    if address < places.PAGE:
        entry.registers["rsp"] = 0xFFF0
    entry.registers["rdx"] = 0x80
    return entry


def _give_stack(request: Request, entry: Entry) -> None:
    size = places.STACK_TOP - places.STACK_END
    entry.registers["rsp"] = request.claims.place(places.STACK_END, size, "the stack") + size
