"""What an image is started with lies where the image is not, wherever it was linked."""

from __future__ import annotations

import struct

import pytest
from boot_images import LINUX_NOTE, MIB, Load, elf, multiboot_header, note
from boot_memory import FakeMemory
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import boot
from vmm.boot import places
from vmm.boot.claims import Claims
from vmm.errors import ImageError

SIZE = 4 * MIB
PVH_NOTE = note(b"Xen", 18, struct.pack("<I", MIB))
KINDS = {
    "elf64": lambda *loads: elf(*loads),
    "elf32": lambda *loads: elf(*loads, bits=32),
    "linux64": lambda *loads: elf(*loads, notes=LINUX_NOTE),
    "pvh": lambda *loads: elf(*loads, bits=32, notes=PVH_NOTE),
    "multiboot": lambda *loads: elf(*loads, bits=32),
}
PLACES = {
    "the GDT": (places.GDT, 0x100),
    "page tables": (places.PAGE_TABLES, 0x100),
    "start info": (places.START_INFO, 0x100),
    "tables of start info": (places.START_TABLES, 0x100),
    "the stack": (places.STACK_END, 0x100),
    "the command line": (places.CMDLINE, 0x100),
    "all of these": (places.GDT, places.CMDLINE + places.CMDLINE_ROOM - places.GDT),
    "memory below 640 KiB": (0, places.EBDA),
}


def started_with(entry: boot.Entry) -> list[tuple[int, int]]:
    """Ranges that must be nobody else's."""
    found = [(entry.gdt_base, entry.gdt_limit + 1)]
    if entry.mode == "long":
        found.append((entry.cr3, 6 * places.PAGE))
    info = entry.registers["rsi"] if entry.kind == "linux64" else entry.registers["rbx"]
    found.append((info, places.PAGE))
    if "rsp" in entry.registers:
        found.append((entry.registers["rsp"] - 0x10000, 0x10000))
    return found


def apart(ranges: list[tuple[int, int]]) -> bool:
    ends = 0
    for gpa, size in sorted(ranges):
        if gpa < ends:
            return False
        ends = gpa + size
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_an_image_may_lie_where_its_tables_usually_do(place: str, kind: str) -> None:
    gpa, size = PLACES[place]
    body = bytes(range(1, 256)) * (size // 255 + 1)
    image = KINDS[kind](Load(MIB, multiboot_header() + bytes(64)), Load(gpa, body[:size]))
    ram = FakeMemory(SIZE)
    entry = boot.load(ram, image=image, kind="elf" if kind.startswith("elf") else kind, cmdline="some words")
    assert ram.read(gpa, size) == body[:size]
    assert apart([*started_with(entry), (gpa, size), (MIB, 76)])


def test_the_command_line_is_found_where_it_was_put() -> None:
    ram = FakeMemory(SIZE)
    image = elf(Load(MIB, b"x"), Load(places.CMDLINE, b"mine"), bits=32, notes=PVH_NOTE)
    entry = boot.load(ram, image=image, cmdline="some words")
    (cmdline,) = struct.unpack("<Q", ram.read(entry.registers["rbx"] + 24, 8))
    assert ram.read(cmdline, 11) == b"some words\0" and ram.read(places.CMDLINE, 4) == b"mine"


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize("address", [0, places.GDT, places.PAGE_TABLES, places.STACK_END])
def test_a_flat_image_may_lie_there_too(address: int, mode: str) -> None:
    ram = FakeMemory(SIZE)
    entry = boot.load(ram, image=b"\xf4" * 0x200, kind="flat", load_address=address, flat_mode=mode)
    assert ram.read(address, 0x200) == b"\xf4" * 0x200
    info = [(entry.gdt_base, entry.gdt_limit + 1), (entry.registers["rsp"] - 0x10000, 0x10000), (address, 0x200)]
    assert apart([*info, (entry.cr3, 6 * places.PAGE)] if mode == "long" else info)


def test_an_image_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ImageError, match=r"GDT of 48 bytes .* does not fit"):
        boot.load(FakeMemory(SIZE), image=elf(Load(0, b"\xf4", memsz=SIZE), entry=16))


@settings(max_examples=examples(200), deadline=None)
@given(
    taken=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=6),
    wanted=st.sampled_from([places.GDT, places.PAGE_TABLES, places.CMDLINE]),
    size=st.integers(1, 0x20000),
)
def test_a_place_is_free_and_ram_or_there_is_none(taken: list[tuple[int, int]], wanted: int, size: int) -> None:
    claims, ranges = Claims(FakeMemory(2 * MIB), "image"), []
    for page, pages in taken:
        if claims.is_free(page << 12, pages << 12):
            claims.claim(page << 12, pages << 12, "the image")
            ranges.append((page << 12, pages << 12))
    try:
        gpa = claims.place(wanted, size, "a table")
    except ImageError:
        free = [n for n in range(512) if all(not at <= n << 12 < at + length for at, length in ranges)]
        usable = [n for n in free if 0 < n < places.EBDA >> 12 or n >= 256]
        need = -(-size // 4096)
        assert not any(all(n + i in usable for i in range(need)) for n in range(512))
        return
    assert apart([*ranges, (gpa, size)]) and gpa + size <= 2 * MIB
