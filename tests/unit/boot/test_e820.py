"""The memory map: RAM less the legacy hole and what is reserved."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.boot.e820 import ENTRIES_MAX, memory_map
from vmm.errors import ConfigError

MIB = 1 << 20
LEGACY = [(0x9FC00, 0x400, 2), (0xA0000, 0x60000, 2)]


def test_ram_is_cut_at_the_legacy_hole() -> None:
    assert memory_map([(0, 16 * MIB), (1 << 32, MIB)]) == [
        (0, 0x9FC00, 1),
        *LEGACY,
        (MIB, 15 * MIB, 1),
        (1 << 32, MIB, 1),
    ]
    assert memory_map([(0, 0x80000)]) == [(0, 0x80000, 1), *LEGACY]


def test_reserved_ranges_win_over_ram_and_split_the_bios_area() -> None:
    assert memory_map([(0, 4 * MIB)], [(0xE0000, 0x1000, 3), (3 * MIB, MIB, 4), (0xE0000000, MIB, 2)]) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xA0000, 0x40000, 2),
        (0xE0000, 0x1000, 3),
        (0xE1000, 0x1F000, 2),
        (MIB, 2 * MIB, 1),
        (3 * MIB, MIB, 4),
        (0xE0000000, MIB, 2),
    ]


@pytest.mark.parametrize(
    "reserved",
    [
        [(MIB, 0, 2)],
        [(MIB, -1, 2)],
        [((1 << 64) - 1, 2, 2)],
        [(2 * MIB, 0x2000, 3), (2 * MIB + 0x1000, 0x2000, 3)],
    ],
    ids=["empty", "negative", "wraps", "overlap"],
)
def test_reserved_ranges_that_cannot_be_are_refused(reserved: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ConfigError, match=r"overlap|empty"):
        memory_map([(0, 16 * MIB)], reserved)


def test_more_entries_than_a_zero_page_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=str(ENTRIES_MAX)):
        memory_map([(0, 16 * MIB)], [(MIB + 0x2000 * n, 0x1000, 2) for n in range(100)])


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 16), st.sampled_from([2, 3, 4])), max_size=6))
def test_every_byte_of_ram_is_told_once(pages: list[tuple[int, int, int]]) -> None:
    reserved = [(0x80000 + page * 0x4000, size * 0x4000, kind) for page, size, kind in pages]
    try:
        told = memory_map([(0, 2 * MIB)], reserved)
    except ConfigError:
        return
    assert told == sorted(told)
    assert all(one + size <= two for (one, size, _), (two, _, _) in pairwise(told))
    for address in range(0, 2 * MIB, 0x4000):
        kinds = {kind for gpa, size, kind in told if gpa <= address < gpa + size}
        assert len(kinds) == 1
        covering = {kind for gpa, size, kind in reserved if gpa <= address < gpa + size}
        assert kinds == (covering or ({2} if 0xA0000 <= address < MIB else {1}))
