"""The page-table walk, against tables that were built to lead to known places."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.cpu.paging import MODES, Mode, PageFault, Paging, Translation
from vmm.errors import ConfigError, LinearMemoryError

PG, PE, WP = 1 << 31, 1, 1 << 16
PSE, PAE, LA57, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
LMA, NXE, AC = 1 << 10, 1 << 11, 1 << 18
P, W, U, PS, NX = 1, 2, 4, 0x80, 1 << 63
RAM = 1 << 16
LEVELS = ["PTE", "PDE", "PDPTE", "PML4E", "PML5E"]

REGISTERS: dict[str, dict[str, int]] = {
    "none": {"cr0": PE, "cr4": 0, "efer": 0},
    "32-bit": {"cr0": PE | PG | WP, "cr4": PSE, "efer": 0},
    "pae": {"cr0": PE | PG | WP, "cr4": PAE, "efer": NXE},
    "4-level": {"cr0": PE | PG | WP, "cr4": PAE, "efer": LMA | NXE},
    "5-level": {"cr0": PE | PG | WP, "cr4": PAE | LA57, "efer": LMA | NXE},
}
PAGED = [name for name in MODES if name != "none"]


class Tables:
    """Builds page tables from page 1 of a small RAM on, one mapping at a time."""

    def __init__(self, mode: str, **registers: int) -> None:
        self.mode: Mode = MODES[mode]
        self.ram = bytearray(RAM)
        self.root = self.free = 0x1000
        self.registers = {"cr3": self.root, "rflags": 2, **REGISTERS[mode], **registers}
        self.free += 0x1000

    def read(self, gpa: int, n: int) -> bytes:
        if gpa + n > len(self.ram):
            raise IndexError(gpa)
        return bytes(self.ram[gpa : gpa + n])

    def put(self, gpa: int, value: int) -> None:
        self.ram[gpa : gpa + self.mode.entry_size] = value.to_bytes(self.mode.entry_size, "little")

    def slot(self, table: int, linear: int, level: int) -> int:
        index = linear >> (12 + self.mode.index_bits * (level - 1)) & ((1 << self.mode.index_bits) - 1)
        return table + index * self.mode.entry_size

    def map(self, linear: int, gpa: int, rights: list[int], level: int = 1) -> dict[str, int]:
        """Lead ``linear`` to ``gpa`` by an entry of ``level``; ``rights`` of each level, innermost first. Answers
        where each level's entry lies."""
        table, places = self.root, {}
        for at in range(self.mode.levels, 0, -1):
            place = places[LEVELS[at - 1]] = self.slot(table, linear, at)
            flags = P | rights[at - 1] & (P if self.mode.name == "pae" and at == 3 else -1)
            if at == level:
                large = PS if at > 1 else 0
                self.put(place, gpa | flags | large if gpa < 1 << 32 or at == 1 or self.mode.entry_size == 8
                         else gpa & 0xFFC00000 | (gpa >> 32) << 13 | flags | large)  # fmt: skip
                return places
            self.put(place, self.free | flags)
            table, self.free = self.free, self.free + 0x1000
        return places

    def walk(self, linear: int, access: str | None = None, *, user: bool = False, **how: Any) -> Any:
        return Paging(self.registers, **how).walk(self.read, linear, access, user=user)


def linear_address(mode: Mode, bits: int) -> int:
    """``bits`` cut to an address of this mode, canonical."""
    width = {"4-level": 48, "5-level": 57}.get(mode.name, 32)
    bits &= (1 << width) - 1
    return bits | (1 << 64) - (1 << width) if width > 32 and bits >> (width - 1) else bits


def page_levels(mode: Mode) -> list[int]:
    return [1, 2, 3] if mode.levels > 3 else [1, 2]


@st.composite
def mappings(draw: st.DrawFn) -> tuple[str, int, int, int, list[int]]:
    name = draw(st.sampled_from(PAGED))
    mode = MODES[name]
    level = draw(st.sampled_from(page_levels(mode)))
    shift = 12 + mode.index_bits * (level - 1)
    linear = linear_address(mode, draw(st.integers(0, (1 << 64) - 1)))
    width = 40 if (name, level) == ("32-bit", 2) else 32 if name == "32-bit" else 52
    page = draw(st.integers(0, (1 << width - shift) - 1)) << shift
    allowed = [0, W, U, W | U] if name == "32-bit" else [a | nx for a in (0, W, U, W | U) for nx in (0, NX)]
    rights = draw(st.lists(st.sampled_from(allowed), min_size=mode.levels, max_size=mode.levels))
    return name, level, linear, page, rights


@settings(max_examples=examples(300))
@given(mappings())
def test_a_mapping_leads_where_it_was_made_to_with_the_rights_all_levels_leave(
    mapping: tuple[str, int, int, int, list[int]],
) -> None:
    name, level, linear, page, rights = mapping
    tables = Tables(name)
    places = tables.map(linear, page, rights, level)
    found = tables.walk(linear)
    assert isinstance(found, Translation), found
    offset = linear & ((1 << 12 + tables.mode.index_bits * (level - 1)) - 1)
    assert found.gpa == page | offset
    assert found.size == 1 << 12 + tables.mode.index_bits * (level - 1)
    assert [(entry.level, entry.gpa) for entry in found.entries] == list(places.items())
    deciding = rights[level - 1 : 2 if name == "pae" else None]
    assert found.writable == all(r & W for r in deciding)
    assert found.user == all(r & U for r in deciding)
    assert found.executable == (not any(r & NX for r in deciding))


@settings(max_examples=examples(300))
@given(mappings(), st.sampled_from(["read", "write", "fetch"]), st.booleans(), st.sampled_from([0, SMEP, SMAP]),
       st.booleans(), st.booleans())  # fmt: skip
def test_an_access_is_refused_exactly_where_the_rights_say_so(
    mapping: tuple[str, int, int, int, list[int]], access: str, user: bool, extra: int, ac: bool, wp: bool
) -> None:
    name, level, linear, page, rights = mapping
    tables = Tables(name)
    tables.registers["cr4"] |= extra
    tables.registers["rflags"] |= AC if ac else 0
    tables.registers["cr0"] &= -1 if wp else ~WP
    tables.map(linear, page, rights, level)
    where = tables.walk(linear)
    # SDM vol. 3, 4.6.1, as a table of who may do what
    smap = extra == SMAP and not ac
    may = {
        (True, "read"): where.user,
        (True, "write"): where.user and where.writable,
        (True, "fetch"): where.user and where.executable,
        (False, "read"): not (where.user and smap),
        (False, "write"): not (where.user and smap) and (where.writable or not wp),
        (False, "fetch"): where.executable and not (where.user and extra == SMEP),
    }[user, access]
    found = tables.walk(linear, access, user=user)
    assert isinstance(found, Translation) == may, found
    if isinstance(found, PageFault):
        flag = {"user": U, "write": W, "execute": NX}.get(found.kind)
        if flag:
            assert found.entry is not None
            assert bool(found.entry.value & flag) == (flag == NX)


@settings(max_examples=examples(200))
@given(mappings(), st.data())
def test_an_entry_that_is_not_present_is_named_with_its_place(
    mapping: tuple[str, int, int, int, list[int]], data: st.DataObject
) -> None:
    name, level, linear, page, rights = mapping
    tables = Tables(name)
    places = tables.map(linear, page, rights, level)
    broken = data.draw(st.sampled_from(list(places)))
    tables.put(places[broken], 0xABCDE000)
    found = tables.walk(linear)
    assert isinstance(found, PageFault)
    assert (found.kind, found.level) == ("not-present", broken)
    assert found.entry == (broken, places[broken], 0xABCDE000)
    assert f"the {broken} at {places[broken]:#x} is 0xabcde000: not present" in found.sentence


@pytest.mark.parametrize(
    ("name", "level", "bad", "how"),
    [
        ("4-level", "PML4E", PS, {}),
        ("5-level", "PML5E", PS, {}),
        ("5-level", "PML4E", PS, {}),
        ("4-level", "PDPTE", PS | 1 << 13, {}),
        ("4-level", "PDPTE", PS, {"gigabyte_pages": False}),
        ("4-level", "PDE", PS | 1 << 20, {}),
        ("4-level", "PTE", 1 << 46, {"physical_bits": 46}),
        ("4-level", "PDE", 1 << 51, {"physical_bits": 46}),
        ("pae", "PDPTE", W, {}),
        ("pae", "PDPTE", NX, {}),
        ("pae", "PDE", 1 << 52, {}),
        ("pae", "PTE", 1 << 62, {}),
        ("32-bit", "PDE", PS | 1 << 21, {}),
        ("32-bit", "PDE", PS | 1 << 17, {"physical_bits": 36}),
    ],
)
def test_a_reserved_bit_is_a_fault_that_names_entry_and_bit(
    name: str, level: str, bad: int, how: dict[str, Any]
) -> None:
    tables = Tables(name)
    places = tables.map(0x40201000, 0x5000, [W | U] * 5)
    tables.put(places[level], P | bad)
    found = tables.walk(0x40201000, **how)
    assert isinstance(found, PageFault)
    assert (found.kind, found.level) == ("reserved", level)
    assert f"reserved bits set: {(bad & ~PS or PS).bit_length() - 1}" in found.sentence


@pytest.mark.parametrize(
    ("name", "level", "bits", "how"),
    [
        ("4-level", "PTE", 1 << 62, {}),  # ignored outside PAE
        ("4-level", "PDPTE", PS | 1 << 12, {}),  # the PAT bit
        ("32-bit", "PDE", PS | 1 << 20, {}),  # PSE-36: address bit 39
        ("4-level", "PTE", PS, {}),  # the PAT bit
        ("pae", "PTE", NX, {}),
    ],
)
def test_a_bit_that_only_looks_reserved_is_none(name: str, level: str, bits: int, how: dict[str, Any]) -> None:
    tables = Tables(name)
    places = tables.map(0x40000000, 0x5000, [W | U] * 5)
    tables.put(places[level], P | bits)
    assert isinstance(tables.walk(0x40000000, **how), Translation)


def test_no_execute_is_a_reserved_bit_while_it_is_not_enabled() -> None:
    tables = Tables("4-level", efer=LMA)
    tables.map(0x1000, 0x5000, [NX, 0, 0, 0])
    assert tables.walk(0x1000).kind == "reserved"


def test_without_pse_a_directory_entry_never_maps_a_page() -> None:
    tables = Tables("32-bit", cr4=0)
    places = tables.map(0x400000, 0x9000, [W, W])
    tables.put(places["PDE"], int.from_bytes(tables.read(places["PDE"], 4), "little") | PS)
    assert tables.walk(0x400123).gpa == 0x9123


def test_a_table_outside_ram_is_named_with_the_entry_that_leads_there() -> None:
    tables = Tables("4-level")
    tables.put(0x1000, 0x7000000 | P)
    found = tables.walk(0x1000)
    assert (found.kind, found.level) == ("table", "PML4E")
    assert "the PDPTE should be at 0x7000000, which is not RAM" in found.sentence
    tables.registers["cr3"] = 0x7000000
    assert tables.walk(0x1000).entry is None


@pytest.mark.parametrize(
    ("name", "linear", "canonical"),
    [
        ("4-level", 0x7FFF_FFFF_FFFF, True),
        ("4-level", 0x8000_0000_0000, False),
        ("4-level", 0xFFFF_7FFF_FFFF_FFFF, False),
        ("4-level", 0xFFFF_8000_0000_0000, True),
        ("5-level", 0x8000_0000_0000, True),
        ("5-level", 1 << 56, False),
        ("5-level", 0xFF00_0000_0000_0000, True),
        ("5-level", 0xFE00_0000_0000_0000, False),
        ("32-bit", 0xFFFF_FFFF, True),
        ("pae", 1 << 32, False),
        ("none", 1 << 32, False),
    ],
)
def test_what_is_no_address_is_said_to_be_none(name: str, linear: int, canonical: bool) -> None:
    found = Tables(name).walk(linear)
    assert (isinstance(found, PageFault) and found.kind == "non-canonical") == (not canonical)


def test_without_paging_a_linear_address_is_the_physical_one() -> None:
    found = Tables("none").walk(0x12345, "write", user=True)
    assert (found.gpa, found.entries) == (0x12345, [])


class Ram:
    """The part of GuestMemory that memory by linear address uses."""

    def __init__(self, ram: bytearray) -> None:
        self.ram = memoryview(ram)

    def view(self, gpa: int, size: int) -> memoryview:
        from vmm.errors import GuestMemoryError

        if gpa + size > len(self.ram):
            raise GuestMemoryError(gpa, size)
        return self.ram[gpa : gpa + size]

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        self.view(gpa, len(data))[:] = data


def linear_memory(tables: Tables) -> Any:
    from vmm.cpu.paging import LinearMemory

    ram: Any = Ram(tables.ram)
    return LinearMemory(ram, lambda: Paging(tables.registers))


def test_memory_across_pages_that_lie_apart_is_one() -> None:
    tables = Tables("4-level")
    first = tables.map(0x1000, 0xB000, [0] * 4)["PTE"]  # read-only: a debugger may write it all the same
    tables.put(first + 8, 0xA000 | P)
    tables.put(first + 16, 0xC000 | P)
    memory = linear_memory(tables)
    text = bytes(range(256)) * 17
    memory.write(0x1FF0, text)
    assert memory.read(0x1FF0, len(text)) == text
    assert bytes(tables.ram[0xBFF0:0xC000] + tables.ram[0xA000:0xB000] + tables.ram[0xC000:0xC0F0]) == text


def test_memory_that_ends_in_a_hole_names_its_first_address_and_writes_nothing() -> None:
    tables = Tables("4-level")
    places = tables.map(0x1000, 0xA000, [W] * 4)
    memory = linear_memory(tables)
    with pytest.raises(LinearMemoryError, match=r"0x2000: the PTE at .* not present") as caught:
        memory.write(0x1F00, bytes(0x200))
    assert caught.value.linear == 0x2000
    memory.write(0x1F00, b"\xff" * 0x100)
    with pytest.raises(LinearMemoryError):
        memory.write(0x1F00, bytes(0x200))
    assert memory.read(0x1F00, 0x100) == b"\xff" * 0x100
    assert memory.readable(0x1F00, 0x200) == 0x100
    tables.put(places["PTE"] + 8, 0x4000000 | P)
    with pytest.raises(LinearMemoryError, match="mapped to 0x4000000, which is not RAM"):
        memory.read(0x2000, 1)


def test_the_last_page_of_the_address_space_is_followed_by_the_first() -> None:
    tables = Tables("32-bit")
    tables.map(0xFFFFF000, 0xA000, [0, 0])
    tables.map(0, 0xB000, [0, 0])
    tables.ram[0xAFFF], tables.ram[0xB000] = b"ab"
    assert linear_memory(tables).read(0xFFFFFFFF, 2) == b"ab"


def test_a_view_is_of_memory_itself_where_pages_lie_one_behind_the_other() -> None:
    tables = Tables("4-level")
    first = tables.map(0x1000, 0xA000, [W] * 4)["PTE"]
    tables.put(first + 8, 0xB000 | P)
    tables.put(first + 16, 0x9000 | P)
    memory = linear_memory(tables)
    memory.array(0x1FF8, 16, "<u8")[:] = 1, 2
    assert memory.read(0x1FF8, 16) == (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert bytes(memory.view(0x3000, 0)) == b""
    with pytest.raises(LinearMemoryError, match=r"0x3000: its page, 0x9000, is not behind") as caught:
        memory.view(0x2FF8, 16)
    assert caught.value.linear == 0x3000
    with pytest.raises(LinearMemoryError, match="0x4000: the PTE"):
        memory.view(0x3FF8, 16)


@pytest.mark.parametrize("name", PAGED)
def test_a_search_finds_what_lies_across_pages_and_passes_over_holes(name: str) -> None:
    tables = Tables(name)
    high = (1 << (32 if name in ("32-bit", "pae") else 64)) - 0x2000
    tables.map(0x5000, 0xC000, [W] * MODES[name].levels)
    first = tables.map(high, 0xA000, [W] * MODES[name].levels)["PTE"]
    tables.put(first + MODES[name].entry_size, 0x9000 | P)
    memory, everything = linear_memory(tables), (0, 1 << 64)
    memory.write(high + 0xFFC, b"a needle")
    assert memory.search(b"a needle", *everything) == high + 0xFFC
    assert memory.search(b"a needle", 0, high + 0x1003) is None
    assert memory.search(b"a needle", high + 0xFFD, 1 << 64) is None
    memory.write(0x5FFC, b"a ne")  # no page behind it: the rest is not there
    assert memory.search(b"a needle", *everything) == high + 0xFFC
    memory.write(0x5010, b"a needle")
    assert memory.search(b"a needle", *everything) == 0x5010
    with pytest.raises(ConfigError, match="give a range"):
        memory.search(b"x", 2, 1)


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(0, 1 << 64), st.sampled_from(PAGED))
def test_a_search_comes_to_an_end_whatever_the_tables_are(seed: int, name: str) -> None:
    tables, random = Tables(name), Random(seed)
    for at in range(0x1000, 0x4000, 8):
        entry = random.choice([0, random.getrandbits(64), random.getrandbits(14) | P, 0x1000 | P | W])
        tables.ram[at : at + 8] = entry.to_bytes(8, "little")
    at = linear_memory(tables).search(b"\xf0\x0f", 0, 1 << 20)
    assert at is None or 0 <= at < 1 << 20
