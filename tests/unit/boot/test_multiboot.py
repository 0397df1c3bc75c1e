"""Multiboot 1: both ways to say what goes where, the information, and headers that lie."""

from __future__ import annotations

import struct

import pytest
from boot_images import MIB, Load, elf, multiboot_header
from boot_memory import FakeMemory

from vmm import boot
from vmm.errors import ImageError

BODY = b"\xf4" * 64


def text(ram: FakeMemory, gpa: int) -> bytes:
    return ram.read(gpa, 256).split(b"\0")[0]


def kludge(
    header: int | None = None, load: int = MIB, load_end: int = 0, bss_end: int = 0, entry: int = MIB + 48
) -> bytes:
    """16 bytes of something, the header, and a body; loaded from the header on unless told otherwise."""
    header = load if header is None else header
    return bytes(16) + multiboot_header(0x10003, header, load, load_end, bss_end, entry) + BODY


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_file_with_a_header_is_multiboot(bits: int) -> None:
    ram = FakeMemory(16 * MIB)
    image = elf(Load(MIB, multiboot_header() + BODY), bits=bits, entry=MIB + 12)
    assert boot.identify(image) == "multiboot"
    entry = boot.load(ram, image=image)
    assert (entry.kind, entry.mode, entry.rip) == ("multiboot", "protected", MIB + 12)
    assert entry.registers["rax"] == 0x2BADB002
    assert ram.read(MIB + 12, 64) == BODY


def test_the_information_tells_memory_command_line_and_modules() -> None:
    ram = FakeMemory(16 * MIB)
    image = elf(Load(MIB, multiboot_header() + BODY), bits=32, entry=MIB + 12)
    modules = [("one", b"1" * 5000), ("two", b"22")]
    entry = boot.load(ram, image=image, name="/boot/kern", cmdline="a=b", initrds=modules)
    info = ram.read(entry.registers["rbx"], 116)
    flags, lower, upper = struct.unpack_from("<3I", info)
    cmdline, mods, mods_addr = struct.unpack_from("<3I", info, 16)
    mmap_length, mmap = struct.unpack_from("<2I", info, 44)
    (loader,) = struct.unpack_from("<I", info, 64)
    assert flags == 0b1001001101
    assert (lower, upper) == (639, 15 * 1024)
    assert text(ram, cmdline) == b"kern a=b"
    assert text(ram, loader) == b"pyvmm"
    found = [struct.unpack("<4I", ram.read(mods_addr + 16 * n, 16)) for n in range(mods)]
    assert [ram.read(start, end - start) for start, end, _, _ in found] == [b"1" * 5000, b"22"]
    assert [text(ram, name) for _, _, name, _ in found] == [b"one", b"two"]
    assert all(start % 4096 == 0 for start, _, _, _ in found)
    seen = []
    while mmap_length:
        size, base, length, kind = struct.unpack("<IQQI", ram.read(mmap, 24))
        seen.append((base, length, kind))
        mmap, mmap_length = mmap + size + 4, mmap_length - size - 4
    assert seen == [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xA0000, 0x60000, 2), (MIB, 15 * MIB, 1)]


def test_a_kludge_header_loads_the_rest_of_the_file() -> None:
    ram = FakeMemory(8 * MIB)
    entry = boot.load(ram, image=kludge())
    assert (entry.kind, entry.rip) == ("multiboot", MIB + 48)
    assert ram.read(MIB, 32 + len(BODY)) == kludge()[16:]


def test_a_kludge_header_in_the_middle_loads_what_precedes_it_and_clears_bss() -> None:
    ram = FakeMemory(8 * MIB)
    ram.write(MIB, b"\xff" * 256)
    boot.load(ram, image=kludge(header=MIB + 16, load_end=MIB + 60, bss_end=MIB + 100))
    assert ram.read(MIB, 60) == kludge(header=MIB + 16, load_end=MIB + 60, bss_end=MIB + 100)[:60]
    assert ram.read(MIB + 60, 41) == bytes(40) + b"\xff"


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (kludge(header=MIB - 4), "do not fit a header at file offset 0x10"),
        (kludge(header=MIB + 20), "do not fit a header at file offset 0x10"),
        (kludge(load_end=MIB - 1), "do not ascend"),
        (kludge(load_end=MIB + 60, bss_end=MIB + 59), "do not ascend"),
        (kludge(entry=MIB - 1), "do not ascend"),
        (kludge(entry=8 * MIB), "do not ascend"),
        (kludge(load_end=MIB + 4096), "truncated: the multiboot header wants 0x1000 bytes"),
        (kludge(bss_end=64 * MIB), "give the guest at least 64M"),
        (elf(Load(MIB, multiboot_header(7) + BODY), bits=32), r"demands features 0x4 \(a video mode\)"),
        (elf(Load(MIB, multiboot_header(0x8003) + BODY), bits=32), "demands features 0x8000"),
        (multiboot_header() + BODY, "not an ELF file"),
        (elf(Load(MIB, multiboot_header(3, checksum=1) + BODY), bits=32), "no multiboot header"),
        (elf(Load(MIB, b"\0" + multiboot_header() + BODY), bits=32), "no multiboot header"),
        (elf(Load(MIB, bytes(8192) + multiboot_header() + BODY), bits=32), "no multiboot header"),
    ],
)
def test_a_header_that_lies_is_refused(image: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        boot.load(FakeMemory(8 * MIB), image=image, kind="multiboot")


def test_a_multiboot_2_image_is_named() -> None:
    header = struct.pack("<4I", 0xE85250D6, 0, 24, -(0xE85250D6 + 24) & 0xFFFFFFFF)
    with pytest.raises(ImageError, match="Multiboot 2"):
        boot.load(FakeMemory(8 * MIB), image=header + BODY)
