"""PVH: the entry note and hvm_start_info."""

from __future__ import annotations

import struct

import pytest
from boot_images import LINUX_NOTE, MIB, Load, elf, note
from boot_memory import FakeMemory

from vmm import boot
from vmm.errors import ConfigError, ImageError

ENTRY = note(b"Xen", 18, struct.pack("<I", MIB + 8))


def text(ram: FakeMemory, gpa: int) -> bytes:
    return ram.read(gpa, 256).split(b"\0")[0]


@pytest.mark.parametrize("bits", [32, 64])
def test_a_pvh_file_starts_in_protected_mode_with_start_info_in_ebx(bits: int) -> None:
    ram = FakeMemory(16 * MIB)
    image = elf(Load(MIB, b"\xf4" * 32), bits=bits, notes=ENTRY, entry=0)
    assert boot.identify(image) == "pvh"
    entry = boot.load(
        ram, image=image, cmdline="quiet", initrds=[("/x/a.img", b"AAAA"), ("b", b"B" * 5000)], acpi_rsdp=0xE0000
    )
    assert (entry.kind, entry.mode, entry.rip) == ("pvh", "protected", MIB + 8)
    info = struct.unpack("<4I4QII", ram.read(entry.registers["rbx"], 56))
    magic, version, flags, count, modlist, cmdline, rsdp, memmap, entries, _ = info
    assert (magic, version, flags, count, rsdp) == (0x336EC578, 1, 0, 2, 0xE0000)
    assert text(ram, cmdline) == b"quiet"
    modules = [struct.unpack("<4Q", ram.read(modlist + 32 * n, 32)) for n in range(count)]
    assert [ram.read(gpa, size) for gpa, size, _, _ in modules] == [b"AAAA", b"B" * 5000]
    assert [text(ram, name) for _, _, name, _ in modules] == [b"/x/a.img", b"b"]
    assert all(gpa % 4096 == 0 for gpa, _, _, _ in modules)
    table = [struct.unpack("<QQII", ram.read(memmap + 24 * n, 24)) for n in range(entries)]
    assert table[0] == (0, 0x9FC00, 1, 0) and table[-1] == (MIB, 15 * MIB, 1, 0)


def test_a_linux_kernel_with_a_note_prefers_its_own_protocol_but_can_be_made_to() -> None:
    image = elf(Load(MIB, b"\xf4" * 32), notes=LINUX_NOTE + ENTRY)
    assert boot.load(FakeMemory(8 * MIB), image=image).kind == "linux64"
    assert boot.load(FakeMemory(8 * MIB), image=image, kind="pvh").rip == MIB + 8


@pytest.mark.parametrize(
    ("notes", "why"),
    [
        (b"", "no PVH entry note"),
        (note(b"Xen", 18, b"abc"), "entry note of 3 bytes"),
        (note(b"Xen", 18, struct.pack("<I", 0x5000)), "PVH entry point 0x5000 is in no loadable segment"),
        (note(b"Xen", 18, struct.pack("<Q", 1 << 40)), "PVH entry point 0x10000000000"),
    ],
)
def test_a_wrong_note_is_refused(notes: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        boot.load(FakeMemory(8 * MIB), image=elf(Load(MIB, b"\xf4" * 32), notes=notes), kind="pvh")


def test_more_modules_than_the_table_holds_are_refused() -> None:
    modules = [(str(n), b"x") for n in range(65)]
    image = elf(Load(MIB, b"\xf4" * 32), notes=ENTRY)
    with pytest.raises(ConfigError, match="65 boot modules; at most 64"):
        boot.load(FakeMemory(8 * MIB), image=image, initrds=modules)
    assert boot.load(FakeMemory(8 * MIB), image=image, initrds=[("n" * 9999, b"x")] * 64)
