"""ELF files: what loads, where, and every lie a header can tell."""

from __future__ import annotations

import struct

import pytest
from boot_images import MIB, Load, elf, note
from boot_memory import FakeMemory

from vmm import boot
from vmm.boot.elf import parse
from vmm.errors import ImageError


def load(image: bytes, ram: FakeMemory | None = None, **how: object) -> boot.Entry:
    return boot.load(ram or FakeMemory(8 * MIB), image=image, name="prog", **how)  # type: ignore[arg-type]


def test_an_elf64_starts_in_long_mode_with_a_stack_and_start_info() -> None:
    ram = FakeMemory(8 * MIB)
    entry = load(elf(Load(MIB, b"\xf4" * 16), entry=MIB + 4), ram, cmdline="a b", initrds=[("mod", b"M")])
    assert (entry.kind, entry.mode, entry.rip, entry.cr3 != 0) == ("elf64", "long", MIB + 4, True)
    assert ram.read(MIB, 16) == b"\xf4" * 16
    assert entry.registers["rsp"] % 16 == 0
    assert struct.unpack("<I", ram.read(entry.registers["rbx"], 4)) == (0x336EC578,)


def test_an_elf32_starts_in_protected_mode() -> None:
    ram = FakeMemory(8 * MIB)
    entry = load(elf(Load(MIB, b"\xf4" * 16), bits=32), ram)
    assert (entry.kind, entry.mode, entry.rip, entry.cr3) == ("elf32", "protected", MIB, 0)
    (code,) = struct.unpack("<Q", ram.read(entry.gdt_base + entry.cs, 8))
    assert code >> 53 & 3 == 0b10, "D set, L clear: 32-bit code"


@pytest.mark.parametrize("fresh", [False, True])
def test_bss_is_cleared_unless_memory_is_known_to_be_zero(fresh: bool) -> None:
    ram = FakeMemory(8 * MIB)
    ram.write(MIB, b"\xff" * 64)
    load(elf(Load(MIB, b"code", memsz=32)), ram, fresh=fresh)
    assert ram.read(MIB, 33) == b"code" + (b"\xff" * 28 if fresh else bytes(28)) + b"\xff"


def test_a_position_independent_file_linked_at_0_is_moved_whole() -> None:
    ram = FakeMemory(8 * MIB)
    entry = load(elf(Load(0, b"abcd"), Load(0x1000, b"efgh"), entry=2, kind=3), ram)
    assert entry.rip == 2 * MIB + 2
    assert ram.read(2 * MIB, 4) == b"abcd" and ram.read(2 * MIB + 0x1000, 4) == b"efgh"


def test_ram_above_4_gib_can_be_loaded_but_not_entered() -> None:
    ram = FakeMemory(8 * MIB, 4 * MIB)
    high = 4096 * MIB
    load(elf(Load(MIB, b"x"), Load(high, b"far away")), ram)
    assert ram.read(high, 8) == b"far away"
    with pytest.raises(ImageError, match="above 4 GiB"):
        load(elf(Load(high, b"far away"), entry=high), ram)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (elf(Load(MIB, b"x"), machine=183), "ELF machine 0xb7 is not x86"),
        (elf(Load(MIB, b"x"), kind=1), "relocatable object; link it first"),
        (elf(Load(MIB, b"x"), kind=4), "core dump"),
        (elf(Load(MIB, b"x"), phentsize=40), "program headers of 0x28 bytes"),
        (elf(Load(MIB, b"x"), entry=0), "without an entry point"),
        (elf(Load(0, b"x"), entry=0, kind=3), "without an entry point"),
        (elf(Load(MIB, b"/lib/ld.so", kind=3), Load(MIB, b"x")), "names its dynamic linker"),
        (elf(Load(MIB, b"x"), phnum=0), "0 ELF program headers"),
        (elf(Load(MIB, b"x"), phnum=0xFFFF), "65535 ELF program headers"),
        (elf(Load(MIB, b"x"), phnum=100), "truncated or lying"),
        (elf(Load(MIB, b"x", kind=6)), "without a loadable segment"),
        (elf(Load(MIB, b"x" * 16, memsz=8)), r"more file \(0x10\) than memory \(0x8\)"),
        (elf(Load(MIB, b"x", filesz=0x10000, memsz=0x10000)), "truncated: an ELF segment is 0x10000 bytes"),
        (elf(Load(MIB, b"x", offset=1 << 60)), "truncated: an ELF segment"),
        (elf(Load((1 << 64) - 16, b"x", memsz=32)), "wraps around"),
        (elf(Load(MIB, b"x", vaddr=(1 << 64) - 1, memsz=32)), "wraps around"),
        (elf(Load((1 << 32) - 16, b"x", memsz=32), bits=32), "wraps around"),
        (elf(Load(MIB, b"x" * 32), Load(MIB + 31, b"y")), "segments at 0x100000.0x20 and 0x10001f overlap"),
        (elf(Load(MIB, b"x", memsz=8 * MIB)), "RAM ends at 0x800000; give the guest at least 9M"),
        (elf(Load(0xC0000000, b"x"), entry=0xC0000000), "is not RAM"),
        (elf(Load(MIB, b"x"), entry=5), "entry point 0x5 is in no loadable segment"),
        (elf(Load(MIB, b"x"))[:40], "truncated"),
        (elf(Load(MIB, b"x"))[:5], "not an ELF file"),
        (b"\x7fELF\x02\x02" + bytes(60), "data encoding 0x2"),
        (b"\x7fELF\x07\x01" + bytes(60), "ELF class 0x7"),
    ],
)
def test_a_file_that_lies_is_refused_with_the_datum(image: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        load(image)


def test_notes_are_walked_and_a_malformed_one_ends_the_walk() -> None:
    notes = note(b"GNU", 3, b"12345") + note(b"Xen", 6, b"linux\0")
    program = parse(boot.Image.of(elf(Load(MIB, b"x"), notes=notes), "prog"))
    assert list(program.notes()) == [(b"GNU", 3, b"12345"), (b"Xen", 6, b"linux\0")]
    cut = parse(boot.Image.of(elf(Load(MIB, b"x"), notes=notes + struct.pack("<3I", 4, 0xFFFFFFF0, 1)), "prog"))
    assert len(list(cut.notes())) == 2


def test_nothing_is_loaded_on_reserved_memory() -> None:
    with pytest.raises(ImageError, match="overlaps reserved memory at 0x100000"):
        load(elf(Load(MIB, b"x")), e820=[(MIB, 0x1000, 3)])
