"""The door of vmm.boot: say what an image is, and load it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import elf
from vmm.boot.image import Image
from vmm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.boot.claims import GuestRam
    from vmm.boot.entry import Entry
    from vmm.boot.image import BytesLike
    from vmm.boot.request import Request

KINDS = ("auto", "bzimage", "linux64", "pvh", "multiboot", "elf", "flat")
UNPACK = ("auto", "host", "guest")

# What people hand over by mistake, by its first bytes.
_LOOK_ALIKES = (
    (b"\x1f\x8b", "a gzip file; unpack it first (gunzip)"),
    (b"\xfd7zXZ\0", "an xz file; unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first (unzstd)"),
    (b"070701", "a cpio archive: an initrd, not a kernel"),
    (b"QFI\xfb", "a qcow2 disk image, not a kernel"),
    (b"!<arch>", "an archive or Debian package; take the kernel out of it first"),
    (b"#!", "a script, not a kernel"),
)


def identify(image: Image | BytesLike, name: str = "image") -> str:
    """What ``image`` is: an `Entry.kind` other than "flat", or "unknown". ImageError: an ELF file that lies.

    A Linux vmlinux is "linux64" even where it has a PVH note; then PVH, multiboot, and ELF for what it is.
    """
    source = image if isinstance(image, Image) else Image.of(image, name)
    head = source.head(0x290)
    if head.startswith(elf.MAGIC):
        return _identify_elf(elf.parse(source))
    from vmm.boot import bzimage, multiboot

    if bzimage.is_bzimage(head):
        return "bzimage"
    return "multiboot" if multiboot.find_header(source) else "unknown"


def _identify_elf(program: elf.Elf) -> str:
    if program.bits == 64 and program.is_linux():
        return "linux64"
    from vmm.boot import pvh

    if pvh.entry_point(program) is not None:
        return "pvh"
    from vmm.boot import multiboot

    if multiboot.find_header(program.image):
        return "multiboot"
    return f"elf{program.bits}"


def command_line_room(image: Image, kind: str) -> int:
    """Bytes of a command line that the image takes; what :func:`load` refuses is longer."""
    from vmm.boot import places

    room = places.CMDLINE_ROOM - 1
    if kind != "bzimage":
        return room
    from vmm.boot.bzimage import SetupHeader

    return min(SetupHeader(image).cmdline_size, room)


def load(
    memory: GuestRam,
    *,
    image: Image | BytesLike,
    name: str = "image",
    kind: str = "auto",
    cmdline: str = "",
    initrds: Sequence[Image | tuple[str, BytesLike]] = (),
    acpi_rsdp: int = 0,
    load_address: int | None = None,
    flat_mode: str = "real",
    unpack: str = "auto",
    e820: Sequence[tuple[int, int, int]] = (),
    fresh: bool = False,
) -> Entry:
    """Put an image into guest memory and return how the first vCPU starts.

    ``image`` is an `Image` (best for files: nothing is copied or hashed that need not be) or a buffer called
    ``name``; ``initrds`` likewise. ``kind`` is one of KINDS; "auto" takes an image of no known kind as flat
    when a ``load_address`` is given. ``e820`` lists (address, size, type) the guest must not take for RAM;
    where they lie in RAM, nothing is loaded on them. ``acpi_rsdp`` is handed on to Linux and PVH guests.
    ``unpack`` (bzImage): on the "host", in the "guest", or "auto". ``fresh`` promises that the memory is all
    zeros, as it is when it was just made: zeros are then not written, and take neither time nor host memory.

    ImageError: the image or an initrd cannot be used, or the guest's memory is too small for it. ConfigError:
    the request is wrong: an unknown kind, a command line too long for the kernel.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown image kind {kind!r}; choose one of {', '.join(KINDS)}")
    if unpack not in UNPACK:
        raise ConfigError(f"unknown way of unpacking {unpack!r}; choose one of {', '.join(UNPACK)}")
    from vmm.boot import bios
    from vmm.boot.request import Request

    source = image if isinstance(image, Image) else Image.of(image, name)
    files = [item if isinstance(item, Image) else Image.of(item[1], item[0]) for item in initrds]
    request = Request(memory, source, cmdline, files, acpi_rsdp, e820, fresh)
    entry = _load_kind(request, kind, load_address, flat_mode, unpack)
    bios.leave(request.claims, real_mode=entry.mode == "real")
    entry.notes = request.notes
    return entry


def _load_kind(request: Request, kind: str, load_address: int | None, flat_mode: str, unpack: str) -> Entry:
    # Each kind is imported when it is met: most starts need one of them.
    image = request.image
    if kind == "auto" and image.head(4) != elf.MAGIC:
        kind = identify(image)
        if kind == "unknown" and load_address is None:
            raise _not_a_kernel(image)
    if kind == "bzimage":
        from vmm.boot import bzimage

        return bzimage.load(request, unpack)
    if kind in ("flat", "unknown"):
        from vmm.boot import baremetal

        return baremetal.load_flat(request, load_address, flat_mode)
    if kind == "multiboot":
        from vmm.boot import multiboot

        return multiboot.load(request)
    return _load_elf(request, kind, elf.parse(image))


def _load_elf(request: Request, kind: str, program: elf.Elf) -> Entry:
    if kind == "auto":
        kind = _identify_elf(program)
    if kind == "linux64":
        from vmm.boot import linux64

        return linux64.load(request, program)
    if kind == "pvh":
        from vmm.boot import pvh

        return pvh.load(request, program)
    if kind == "multiboot":
        from vmm.boot import multiboot

        return multiboot.load(request)
    from vmm.boot import baremetal

    return baremetal.load_elf(request, program)


def _not_a_kernel(image: Image) -> ImageError:
    from vmm.boot import multiboot

    head = image.head(64)
    what = next((what for magic, what in _LOOK_ALIKES if head.startswith(magic)), "")
    if head[56:60] == b"ARMd":
        what = "a Linux kernel for ARM64; x86-64 is needed"
    elif not what and multiboot.is_multiboot2(image):
        what = "a Multiboot 2 kernel; only Multiboot 1 is supported"
    return ImageError(
        f"{image.name}: {what or 'not a kernel: neither bzImage, ELF nor multiboot'}"
        + ("" if what else "; a flat binary needs a load address")
    )
