"""Flat binaries, what is refused with what sentence, and the choice of the kind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from boot_images import LINUX_NOTE, MIB, Load, bzimage, elf, multiboot_header
from boot_memory import FakeMemory

from vmm import boot
from vmm.boot import bios
from vmm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from pathlib import Path

CODE = b"\xf4" * 512


def load(image: bytes = CODE, ram: FakeMemory | None = None, **how: object) -> boot.Entry:
    return boot.load(ram or FakeMemory(4 * MIB), image=image, name="flat.bin", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "at", "cs", "ip", "sp"),
    [
        (None, 0x7C00, 0, 0x7C00, 0x7C00),
        (0x1000, 0x1000, 0, 0x1000, 0x1000),
        (0x500, 0x500, 0, 0x500, 0xFFF0),
        (0x10000, 0x10000, 0x1000, 0, 0x7C00),
        (0xF0008, 0xF0008, 0xF000, 8, 0x7C00),
    ],
)
def test_real_mode_starts_at_the_address(address: int | None, at: int, cs: int, ip: int, sp: int) -> None:
    ram = FakeMemory(4 * MIB)
    entry = load(ram=ram, kind="flat", load_address=address)
    assert (entry.mode, entry.cs, entry.cs_base, entry.rip) == ("real", cs, cs * 16, ip)
    assert (entry.ds, entry.ss, entry.registers["rsp"], entry.gdt_limit) == (cs, 0, sp, 0)
    assert ram.read(at, 512) == CODE
    low = bios.DATA + bios.DATA_SIZE
    assert ram.read(low, at - low) == bytes(at - low), "nothing but the image is written, and what a BIOS leaves"


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_other_modes_start_at_1_mib_with_tables_and_a_stack(mode: str) -> None:
    ram = FakeMemory(4 * MIB)
    entry = load(ram=ram, kind="flat", flat_mode=mode)
    assert (entry.kind, entry.mode, entry.rip, entry.cs) == ("flat", mode, MIB, 0x10)
    assert (entry.cr3 != 0) == (mode == "long")
    assert 0 < entry.registers["rsp"] < MIB


def test_an_address_makes_an_unknown_image_flat() -> None:
    assert load(load_address=0x8000).kind == "flat"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"kind": "flat", "flat_mode": "virtual"}, "unknown mode 'virtual'"),
        ({"kind": "flat", "load_address": 0x100000}, "0x100000 cannot be reached in real mode"),
        ({"kind": "flat", "load_address": -1}, "cannot be reached"),
        ({"kind": "flat", "load_address": 1 << 32, "flat_mode": "long"}, "cannot be reached in long mode"),
        ({"kind": "flat", "load_address": 4 * MIB - 8, "flat_mode": "long"}, "give the guest at least 5M"),
        ({"kind": "flat", "initrds": [("i", b"x")]}, "takes no initrd"),
        ({"kind": "flat", "cmdline": "x"}, "takes no command line"),
        ({"kind": "zimage"}, "unknown image kind 'zimage'"),
        ({"unpack": "later"}, "unknown way of unpacking 'later'"),
        ({}, "neither bzImage, ELF nor multiboot; a flat binary needs a load address"),
        ({"kind": "bzimage"}, "not a bzImage"),
        ({"kind": "linux64"}, "not an ELF file"),
        ({"kind": "flat", "initrds": [("i", b"")]}, "i: the image is empty"),
    ],
)
def test_a_wrong_request_is_one_clear_sentence(how: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(**how)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (b"\x1f\x8b\x08", "gzip file; unpack it first"),
        (b"070701", "an initrd, not a kernel"),
        (b"QFI\xfb", "qcow2"),
        (b"!<arch>\n", "Debian package"),
        (bytes(56) + b"ARMd", "ARM64"),
    ],
)
def test_what_is_handed_over_by_mistake_is_named(head: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        load(head + bytes(100))


def test_an_elf_file_can_be_loaded_as_nothing_more() -> None:
    image = elf(Load(MIB, multiboot_header() + CODE), bits=32, entry=MIB + 12, notes=LINUX_NOTE)
    assert (load(image).kind, load(image, kind="elf").kind) == ("multiboot", "elf32")
    with pytest.raises(ImageError, match="32-bit Linux kernel"):
        load(elf(Load(MIB, CODE), bits=32), kind="linux64")


def test_identify_tells_what_load_would_take() -> None:
    assert boot.identify(bzimage()) == "bzimage"
    assert boot.identify(elf(Load(MIB, CODE), bits=32)) == "elf32"
    assert boot.identify(CODE) == "unknown"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing: no such file"):
        boot.Image.open(tmp_path / "missing")
    with pytest.raises(ImageError, match="not a regular file"):
        boot.Image.open(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ImageError, match="the file is empty"):
        boot.Image.open(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a regular file"):
        boot.Image.open(tmp_path / "pipe")
    with pytest.raises(ImageError, match="cannot be opened"):
        boot.Image.open("a\0b")
    with pytest.raises(ImageError, match="the image is empty"):
        boot.Image.of(b"", "nothing")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(CODE)
    with boot.Image.open(tmp_path / "image") as image:
        os.truncate(tmp_path / "image", 100)
        with pytest.raises(ImageError, match="shrank"):
            image.read(0, 512)


def test_the_holes_of_a_sparse_file_are_skipped_in_zeroed_memory(tmp_path: Path) -> None:
    with open(tmp_path / "image", "wb") as file:
        file.write(b"head")
        file.seek(1 << 20)
        file.write(b"tail")
        file.truncate(3 << 20)
    want = (tmp_path / "image").read_bytes()
    with boot.Image.open(tmp_path / "image") as image:
        for offset, size in ((0, 3 << 20), (2, 1 << 20), (5000, 100), ((1 << 20) + 2, 2), (2 << 20, 1 << 20)):
            plain, zeroed = bytearray(b"\xff") * size, bytearray(size)
            image.read_into(offset, memoryview(plain))
            image.read_into(offset, memoryview(zeroed), zeroed=True)
            assert plain == zeroed == want[offset : offset + size]
