"""What a BIOS would have left in low memory."""

from __future__ import annotations

import struct

import pytest
from boot_images import LINUX_NOTE, MIB, Load, elf, multiboot_header
from boot_memory import FakeMemory

from vmm import boot


def word(ram: FakeMemory, gpa: int) -> int:
    return int(struct.unpack("<H", ram.read(gpa, 2))[0])


@pytest.mark.parametrize(
    "how",
    [
        {"image": elf(Load(MIB, b"x" * 16))},
        {"image": elf(Load(MIB, b"x" * 16), notes=LINUX_NOTE)},
        {"image": elf(Load(MIB, multiboot_header() + bytes(64)), bits=32)},
        {"image": b"\xf4", "kind": "flat"},
    ],
)
def test_the_bios_data_area_says_where_base_memory_ends(how: dict[str, object]) -> None:
    ram = FakeMemory(2 * MIB)
    boot.load(ram, **how)  # type: ignore[arg-type]
    assert (word(ram, 0x40E) << 4, word(ram, 0x413) << 10) == (0x9FC00, 0x9FC00)
    assert word(ram, 0x400) == 0x3F8


@pytest.mark.parametrize(("address", "size"), [(0, 0x401), (0x4FF, 1), (0x400, 0x100)])
def test_an_image_that_lies_there_is_left_alone(address: int, size: int) -> None:
    ram = FakeMemory(2 * MIB)
    boot.load(ram, image=b"\xf4" * size, kind="flat", load_address=address, flat_mode="protected")
    assert ram.read(address, size) == b"\xf4" * size
    assert word(ram, 0x413) in (0, 0xF4F4)
