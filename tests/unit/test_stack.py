"""Stack walks over stacks and tables built here: frame pointers, both kinds of ORC, guesses, and nonsense."""

from __future__ import annotations

import struct

import pytest
from effort import bounded, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.observe import stack
from vmm.observe.budget import Budget
from vmm.observe.symbols import Symbols

TEXT, STACK, TABLES = 0xFFFFFFFF81000000, 0xFFFFC90000010000, 0xFFFFFFFF82000000
INNER, MIDDLE, OUTER = TEXT + 0x100, TEXT + 0x200, TEXT + 0x300
CALL = b"\xe8\0\0\0\0"


class Linear:
    """Linear memory of a few runs of bytes."""

    def __init__(self) -> None:
        self.runs = {TEXT: bytearray(b"\x90" * 0x1000), STACK: bytearray(0x4000), TABLES: bytearray(0x1000)}

    def read(self, address: int, size: int) -> bytes:
        for start, run in self.runs.items():
            if start <= address <= start + len(run) - size:
                return bytes(run[address - start : address - start + size])
        raise IndexError(address)

    def write(self, address: int, data: bytes) -> None:
        for start, run in self.runs.items():
            if start <= address < start + len(run):
                run[address - start : address - start + len(data)] = data

    def words(self, address: int, *words: int) -> None:
        self.write(address, struct.pack(f"<{len(words)}Q", *words))


@pytest.fixture
def memory() -> Linear:
    memory = Linear()
    for function in (INNER, MIDDLE, OUTER):
        memory.write(function + 0x20 - 5, CALL)
    return memory


def names(frames: list[stack.Frame]) -> list[tuple[str, str]]:
    return [(frame.name, frame.how) for frame in frames]


FUNCTIONS = [(INNER, 0x80, "inner"), (MIDDLE, 0x80, "middle"), (OUTER, 0x80, "outer")]


def test_frame_pointers_lead_from_call_to_call(memory: Linear) -> None:
    memory.words(STACK + 0x100, STACK + 0x180, MIDDLE + 0x20)
    memory.words(STACK + 0x180, 0, OUTER + 0x20)
    frames = stack.walk(
        {"rip": INNER + 8, "rsp": STACK + 0x80, "rbp": STACK + 0x100}, memory, Symbols(FUNCTIONS, "here")
    )
    assert names(frames) == [
        ("inner+0x8", "rip"), ("middle+0x20", "frame pointer"), ("outer+0x20", "frame pointer"),
    ]  # fmt: skip


def test_without_a_better_way_what_follows_a_call_is_guessed(memory: Linear) -> None:
    memory.words(STACK + 0x90, MIDDLE + 0x20, MIDDLE + 0x30, 7, OUTER + 0x20, TEXT + 0x700)
    frames = stack.walk({"rip": INNER, "rsp": STACK + 0x80, "rbp": 5}, memory, Symbols(FUNCTIONS, "here"))
    assert names(frames) == [("inner", "rip"), ("middle+0x20", "guess"), ("outer+0x20", "guess")]
    assert str(frames[1]) == f"{MIDDLE + 0x20:#x} ? middle+0x20"


def orc(memory: Linear, entries: list[tuple[int, int, int, int, int]], *, new: bool) -> Symbols:
    """Tables of (ip, sp offset, sp register, bp register, type); the type as old kernels number it, 3: the end."""
    count = 64
    full = [(TEXT, 8, 5, 0, 0)] * (count - len(entries)) + entries  # most of a kernel's are of calls
    for n, (ip, offset, sp, bp, kind) in enumerate(full):
        memory.write(TABLES + 4 * n, struct.pack("<i", ip - (TABLES + 4 * n)))
        bits = (2, 3, 4, 1)[kind] if new else (0, 1, 2, 4)[kind]
        memory.write(TABLES + 0x400 + 6 * n, struct.pack("<hhBB", offset, -16, sp | bp << 4, bits))
    tables = [(TABLES, 0, "__start_orc_unwind_ip"), (TABLES + 4 * count, 0, "__stop_orc_unwind_ip"),
              (TABLES + 0x400, 0, "__start_orc_unwind")]  # fmt: skip
    return Symbols(FUNCTIONS + tables, "here")


@pytest.mark.parametrize("new", [False, True], ids=["until-6.3", "since-6.4"])
def test_orc_tables_describe_every_instruction(memory: Linear, new: bool) -> None:
    entries = [(INNER, 0x18, 5, 0, 0), (MIDDLE, 0x28, 5, 1, 0), (OUTER, 0, 0, 0, 3)]
    symbols = orc(memory, entries, new=new)
    memory.words(STACK + 0x80 + 0x10, MIDDLE + 0x20)
    memory.words(STACK + 0x98 + 0x20, OUTER + 0x20)
    memory.words(STACK + 0x98 + 0x18, 0x1234)  # the saved RBP, 16 bytes below the caller's stack
    frames = stack.walk({"rip": INNER + 8, "rsp": STACK + 0x80, "rbp": 0}, memory, symbols)
    assert names(frames) == [("inner+0x8", "rip"), ("middle+0x20", "orc"), ("outer+0x20", "orc")]


@pytest.mark.parametrize("kind", [1, 2], ids=["pt_regs", "iret-frame"])
def test_orc_goes_through_an_interrupt_to_another_stack(memory: Linear, kind: int) -> None:
    symbols = orc(memory, [(INNER, 8, 5, 0, kind), (MIDDLE, 0, 0, 0, 3)], new=False)
    at = STACK + 0x3000 + 8 + (128 if kind == 1 else 0)
    memory.words(at, MIDDLE + 0x11, 0x10, 0x246, STACK + 0x100, 0x18)
    frames = stack.walk({"rip": INNER + 8, "rsp": STACK + 0x3000, "rbp": 0}, memory, symbols)
    assert names(frames) == [("inner+0x8", "rip"), ("middle+0x11", "orc")]


def test_a_stack_that_leads_to_itself_ends(memory: Linear) -> None:
    symbols = orc(memory, [(INNER, 0, 9, 0, 0), (MIDDLE, 0, 0, 0, 3)], new=False)
    memory.words(STACK + 0x80, STACK + 0x80)  # indirect: the stack pointer is where it was
    memory.words(STACK + 0x78, INNER + 0x20)
    frames = stack.walk({"rip": INNER, "rsp": STACK + 0x80, "rbp": 0}, memory, symbols)
    assert len(frames) == stack.FRAMES_MAX


@pytest.mark.parametrize(
    "code", ["e8 11223344", "ff d0", "ff 10", "ff 50 08", "ff 90 00010000", "ff 14 24", "ff 54 24 08", "ff 15 00000000"]
)
def test_every_form_of_call_is_known(memory: Linear, code: str) -> None:
    data = bytes.fromhex(code)
    memory.write(TEXT + 0x500 - len(data), data)
    assert stack.follows_call(memory, TEXT + 0x500)
    memory.write(TEXT + 0x500 - len(data), b"\x90" * len(data))
    assert not stack.follows_call(memory, TEXT + 0x500)


@given(st.binary(min_size=0x200, max_size=0x200), st.binary(min_size=0x580, max_size=0x580), st.integers(0, 2**64 - 1))
@settings(max_examples=examples(100, fuzzing=100_000), deadline=None)
def test_nonsense_ends(stacked: bytes, tables: bytes, rbp: int) -> None:
    memory = Linear()
    symbols = orc(memory, [(INNER, 8, 5, 0, 0), (MIDDLE, 8, 5, 0, 0)], new=False)
    memory.write(STACK, stacked)
    memory.write(TABLES, tables)
    with bounded():
        frames = stack.walk({"rip": INNER, "rsp": STACK, "rbp": rbp}, memory, symbols)
    assert 1 <= len(frames) <= stack.FRAMES_MAX


def test_a_walk_whose_budget_is_spent_gives_the_frames_it_has(memory: Linear) -> None:
    for n in range(20):  # frame pointers that lead from call to call
        memory.words(STACK + 0x100 + 16 * n, STACK + 0x110 + 16 * n, MIDDLE + 0x20)
    budget = Budget(looked=200)
    start = {"rip": INNER + 8, "rsp": STACK + 0x80, "rbp": STACK + 0x100}
    frames = stack.walk(start, memory, Symbols(FUNCTIONS, "here"), budget)
    assert 1 < len(frames) < 20
    assert "the walk of the stack was ended" in budget.notes[0]
