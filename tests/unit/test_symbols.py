"""Symbols: of ELF files, of System.map, of kallsyms tables built here in each known order, whole and damaged."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

import pytest
from effort import bounded, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import ConfigError
from vmm.observe import kallsyms
from vmm.observe.budget import SECONDS, Budget
from vmm.observe.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = 0xFFFFFFFF81000000
ORDERS = ("before", "sequences", "after")


def pad(data: bytes | bytearray) -> bytes:
    return bytes(data) + bytes(-len(data) % 8)


def tables(symbols: list[tuple[int, str, str]], order: str, *, percpu: bool = True) -> bytes:
    """What scripts/kallsyms.c makes of symbols, with every character its own token and one for a long word."""
    tokens = [bytes([n]) if chr(n).isalnum() or n == ord("_") else b"%02x" % n for n in range(256)]
    tokens[0], tokens[1] = b"Tstart_", b"very_long_word_"
    table, index = b"", []
    for token in tokens:
        index.append(len(table))
        table += token + b"\0"
    names, markers = bytearray(), []
    for n, (_, kind, name) in enumerate(symbols):
        if n % 256 == 0:
            markers.append(len(names))
        packed = (kind + name).encode().replace(b"very_long_word_", b"\1")
        length = len(packed)
        names += (bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])) + packed
    if percpu:
        offsets = [address if address < BASE else BASE - 1 - address for address, _, _ in symbols]
    else:
        offsets = [address - BASE for address, _, _ in symbols]
    addresses = pad(struct.pack(f"<{len(offsets)}i", *offsets)) + struct.pack("<Q", BASE)
    count = struct.pack("<Q", len(symbols))
    marks = pad(struct.pack(f"<{len(markers)}I", *markers))
    sequences = pad(bytes(3 * len(symbols)))
    packed_tokens = pad(table) + pad(struct.pack("<256H", *index))
    if order == "after":
        return count + pad(names) + marks + packed_tokens + addresses + sequences
    return addresses + count + pad(names) + marks + (sequences if order == "sequences" else b"") + packed_tokens


def some(n: int, *, percpu: bool = True) -> list[tuple[int, str, str]]:
    fixed = [(0x40 * i, "A", f"per_cpu_{i}") for i in range(3)] if percpu else []
    return fixed + [(BASE + 0x10 * i, "tTdD"[i % 4], f"very_long_word_{i}" * (1 + i % 9)) for i in range(n)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("percpu", [True, False], ids=["percpu", "relative"])
@pytest.mark.parametrize("n", [100, 250, 256, 1500])
def test_kallsyms_are_found_in_every_order(order: str, percpu: bool, n: int) -> None:
    symbols = some(n, percpu=percpu)
    around = b"0\0" + b"1\0" * 4 + b"\xff" * 14  # looks like tokens for a moment
    found = kallsyms.parse(pad(around) + tables(symbols, order, percpu=percpu) + b"\x90" * 100)
    assert found is not None
    assert list(found) == symbols
    assert all(found.address(name) == address for address, _, name in symbols)
    assert found.address("very_long_word_") is found.address("nobody") is None


@given(st.integers(0, 2**32), st.sampled_from(ORDERS), st.binary(min_size=1, max_size=16))
@settings(max_examples=examples(60, fuzzing=100_000), deadline=None)
def test_damaged_kallsyms_are_none_or_whole_names(at: int, order: str, junk: bytes) -> None:
    image = bytearray(tables(some(300), order))
    at %= len(image)
    image[at : at + len(junk)] = junk
    found = kallsyms.parse(bytes(image))
    assert found is None or all(isinstance(name, str) for _, _, name in found)


# ---- tables that are made to cost ----


def bomb(count: int, length: int, token: int) -> bytes:
    """Tables of ``count`` names of ``length`` tokens of ``token`` bytes each: small, and large once unpacked."""
    offsets = pad(struct.pack(f"<{count}I", *range(count))) + struct.pack("<QQ", BASE, count)
    name = bytes([0x80 | length & 0x7F, length >> 7]) + b"\xff" * length
    marks = pad(struct.pack(f"<{(count + 255) // 256}I", *(n * len(name) for n in range(0, count, 256))))
    tokens = [bytes([n]) if chr(n).isdigit() else b"x" for n in range(255)] + [b"A" * token]
    index, table = [], b""
    for one in tokens:
        index.append(len(table))
        table += one + b"\0"
    return offsets + pad(name * count) + marks + pad(table) + pad(struct.pack("<256H", *index))


class Memory:
    """Guest memory of one region from 0, all of it in use."""

    def __init__(self, data: bytes) -> None:
        self.data, self.regions, self.copied = memoryview(data), [(0, len(data))], 0

    def view(self, gpa: int, size: int) -> memoryview:
        self.copied += size
        return self.data[gpa : gpa + size]

    def in_use(self, number: int, start: int = 0) -> list[tuple[int, int]]:
        return [(0, len(self.data))]

    def search(self, pattern: bytes, start: int, *, spend: Callable[[int], object]) -> int | None:
        found = re.compile(re.escape(pattern)).search(self.data, start)
        spend(found.end() - start if found else len(self.data) - start)
        return found.start() if found else None


def test_names_that_no_kernel_has_are_no_tables_and_take_no_memory() -> None:
    for count, length, token in ((100, 1000, 4000), (100, 500, 4000), (200_000, 4, 200)):
        tracemalloc.start()
        budget = Budget(kept=16 << 20)
        found = kallsyms.parse(bytes(4096) + bomb(count, length, token), budget)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 48 << 20
        assert found is None or (len(found) < count and budget.notes)


def test_memory_full_of_digits_is_not_copied_for_each_place_that_may_be_a_table() -> None:
    memory: Any = Memory(bytes(48 << 20) + b"".join(b"%d\0" % n for n in range(10)) * 500 + bytes(16 << 20))
    assert kallsyms.find(memory) is None
    assert memory.copied < 500 * (1 << 18)


def test_a_search_that_takes_too_long_says_so_and_gives_the_names_it_has() -> None:
    symbols = some(3000)
    spent = Budget(kept=100_000)
    found = kallsyms.parse(tables(symbols, "before"), spent)
    assert found is not None
    assert 0 < len(found) < len(symbols)
    assert list(found) == symbols[: len(found)]
    assert "the search for the kernel's symbols was ended" in spent.notes[0]
    late = Budget(seconds=0)
    assert kallsyms.parse(tables(symbols, "before"), late) is None
    assert "was ended: it takes too long" in late.notes[0]


def test_the_symbols_of_a_distribution_s_kernel_are_within_the_budget() -> None:
    symbols = [(BASE + 16 * n, "tTdD"[n % 4], f"subsystem_{n % 977}_does_thing_{n}") for n in range(150_000)]
    memory: Any = Memory(bytes(8 << 20) + tables(symbols, "sequences") + bytes(8 << 20))
    budget, begun = Budget(within=math.inf), time.thread_time()
    found = Symbols.of_kernel(memory, budget)
    assert time.thread_time() - begun < SECONDS / 4
    assert found is not None
    assert (len(found), budget.notes) == (len(symbols), [])
    for address, _, name in (symbols[0], symbols[77_777], symbols[-1]):
        assert found.name(address + 5) == f"{name}+0x5"
        assert found.address(name) == address
    assert found.address("does_thing_7") is None


def test_many_symbols_at_one_address_are_not_all_compared() -> None:
    symbols = Symbols([(BASE, 0, f"alias_{n}") for n in range(100_000)], "here")
    begun = time.process_time()
    assert all(symbols.find(BASE + 1) for _ in range(1000))
    assert time.process_time() - begun < 5


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([b"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\0", bytes(8), b"\xff" * 8, b"x\0" * 48]),
            st.builds(bomb, st.integers(100, 600), st.integers(1, 600), st.integers(1, 5000)),
            st.builds(lambda n, order: tables(some(n), order), st.integers(100, 400), st.sampled_from(ORDERS)),
        ),
        max_size=6,
    ),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), max_size=6),
)
@settings(max_examples=examples(100, fuzzing=100_000), deadline=None)
@pytest.mark.hypothesis
def test_any_memory_has_symbols_or_none_within_its_budget(parts: list[bytes], junk: list[tuple[int, bytes]]) -> None:
    image = bytearray(b"".join(pad(part) for part in parts))
    for at, data in junk:
        at %= len(image) + 1
        image[at : at + len(data)] = data
    budget = Budget(5.0, kept=1 << 20, within=math.inf)
    with bounded():
        found = kallsyms.parse(bytes(image), budget)
    assert not any("too long" in note for note in budget.notes)
    if found is not None:
        assert all(len(name) <= 512 for _, _, name in found)
        Symbols.of_kernel(Memory(bytes(image)), Budget(seconds=5.0, kept=1 << 20))  # type: ignore[arg-type]


def test_cut_off_kallsyms_are_none() -> None:
    image = tables(some(300), "before")
    assert kallsyms.parse(image[: len(image) // 2]) is None
    assert kallsyms.parse(image[-2000:]) is None
    assert kallsyms.parse(b"") is None


def test_a_name_is_its_symbol_and_how_far() -> None:
    symbols = Symbols([(0x1000, 0x20, "first"), (0x1000, 0, ".Llabel"), (0x1100, 0, "last")], "here")
    assert symbols.name(0x1000) == "first"
    assert symbols.name(0x101F) == "first+0x1f"
    assert symbols.name(0xFFF) is None
    assert symbols.name(0x1100 + 0x10) == "last+0x10"
    assert symbols.name(0x1100 + 0x1000) is None
    assert symbols.address("last") == 0x1100
    assert symbols.address("nobody") is None


def test_a_system_map_is_read_and_another_file_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "System.map"
    good.write_text("ffffffff81000000 T _text\nffffffff81000100 t start_it\n")
    assert Symbols.open(str(good)).name(BASE + 0x110) == "start_it+0x10"
    bad = tmp_path / "notes.txt"
    bad.write_text("nothing of the kind\n")
    with pytest.raises(ConfigError, match=r"neither an ELF file nor a System\.map"):
        Symbols.open(str(bad))
    with pytest.raises(ConfigError, match="cannot read symbols"):
        Symbols.open(str(tmp_path / "missing"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if which("gcc") is None:
        pytest.skip("there is no gcc")
    folder = tmp_path_factory.mktemp("program")
    (folder / "p.c").write_text(
        "int twice(int n)\n{\n    return 2 * n;\n}\nint main(void)\n{\n    return twice(1);\n}\n"
    )
    subprocess.run(
        ["gcc", "-g", "-O0", "-no-pie", "-Wl,--build-id=sha1", "-o", "p", "p.c"], cwd=folder, check=True, timeout=60
    )
    return folder / "p"


class Flat:
    """Linear memory that is one run of bytes."""

    def __init__(self, start: int, data: bytes) -> None:
        self.start, self.data = start, data

    def read(self, address: int, size: int) -> bytes:
        if not self.start <= address <= self.start + len(self.data) - size:
            raise IndexError(address)
        return self.data[address - self.start : address - self.start + size]


def test_lines_and_build_id_come_from_the_elf_file(program: Path) -> None:
    symbols = Symbols.open(str(program))
    twice = symbols.address("twice")
    assert twice is not None
    assert symbols.name(twice + 4) == "twice+0x4"
    where = symbols.line(twice + 4)
    assert where is not None and where[0].endswith("p.c") and where[1] in (2, 3)
    assert symbols.line(0x10) is None
    assert len(symbols.build_id) == 20


def test_another_kernels_symbols_are_told_by_their_build_id(program: Path) -> None:
    symbols = Symbols.open(str(program))
    assert symbols.notes is not None
    address, notes = symbols.notes
    assert symbols.mismatch(Flat(address, notes)) is None
    other = notes.replace(symbols.build_id, bytes(20))
    assert symbols.build_id.hex() in (symbols.mismatch(Flat(address, other)) or "")
    assert symbols.mismatch(Flat(0, b"")) is None


def test_a_file_that_has_no_symbols_is_refused_at_a_first_look(program: Path, tmp_path: Path) -> None:
    Symbols.check(str(program))
    other = tmp_path / "other"
    for content, why in (
        (b"", "has no symbols: give a vmlinux"),
        (b"not symbols\n", "neither an ELF file nor a System.map: 'not symbols'"),
        (program.read_bytes()[:100], "damaged ELF file"),
    ):
        other.write_bytes(content)
        with pytest.raises(ConfigError, match=why):
            Symbols.check(str(other))
    other.write_text("ffffffff81000000 T _text\n")
    Symbols.check(str(other))
    other.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        Symbols.check(str(other))
