"""Recorded events: their names, the file that keeps them, whole and damaged, and the instruction behind an access."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from effort import bounded, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import ConfigError
from vmm.observe.disassembly import accessing
from vmm.observe.recording import (
    DOORBELL,
    EVENT_BYTES,
    HLT,
    INTERNAL_ERROR,
    INTERRUPT,
    IO,
    MMIO,
    NO_QUEUE,
    RDMSR,
    REASONS,
    REQUESTS,
    SHUTDOWN,
    WRMSR,
    Code,
    Recording,
    TracedDevice,
    event_type,
)
from vmm.observe.symbols import Symbols

if TYPE_CHECKING:
    from pathlib import Path

UART, DISK = 1, 2


def recording(*events: dict[str, Any]) -> Recording:
    """A recording of these events, each the fields that are not 0."""
    made = Recording()
    made.devices = {UART: TracedDevice("uart", {0: "RBR/THR", 5: "LSR"}), DISK: TracedDevice("virtio-blk0", {})}
    made._kept = np.zeros(len(events), event_type())
    for n, fields in enumerate(events):
        for name, value in {"count": 1, "claimed": True, "register": -1, **fields}.items():
            made._kept[name][n] = value
    return made


def test_an_event_is_a_cache_line() -> None:
    assert event_type().itemsize == EVENT_BYTES


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reason": IO, "device": UART, "register": 0, "size": 1, "write": True, "value": 0x48},
         "uart THR <- 0x48 'H'"),
        ({"reason": IO, "device": UART, "register": 0, "size": 1, "value": 0xA}, "uart RBR -> 0xa"),
        ({"reason": IO, "device": UART, "register": 5, "size": 1, "value": 0x60}, "uart LSR -> 0x60 '`'"),
        ({"reason": IO, "device": UART, "register": 7, "size": 2, "value": 0x60}, "uart +0x7 -> 0x60"),
        ({"reason": IO, "device": UART, "register": 0, "size": 1, "write": True, "value": 0x48, "count": 9},
         "uart THR <- 0x48 'H' x9"),
        ({"reason": MMIO, "address": 0xD0000000, "size": 4, "value": 0xFFFFFFFF, "claimed": False},
         "(unclaimed) 0xd0000000 -> 0xffffffff"),
        ({"reason": MMIO, "address": 0xD0000000, "size": 4, "device": 9}, "device 9 0xd0000000 -> 0x0"),
        ({"reason": DOORBELL, "device": DISK, "address": 3}, "virtio-blk0 QueueNotify 3"),
        ({"reason": REQUESTS, "device": DISK, "address": 0, "value": 1}, "virtio-blk0 served 1 request of queue 0"),
        ({"reason": REQUESTS, "device": DISK, "address": 0, "value": 4}, "virtio-blk0 served 4 requests of queue 0"),
        ({"reason": INTERRUPT, "device": DISK, "address": 1}, "virtio-blk0 interrupt queue 1"),
        ({"reason": INTERRUPT, "device": DISK, "address": NO_QUEUE}, "virtio-blk0 interrupt configuration"),
        ({"reason": WRMSR, "address": 0xC0000082, "size": 8, "write": True, "value": 0x1000},
         "MSR 0xc0000082 <- 0x1000"),
        ({"reason": RDMSR, "address": 0x10, "size": 8, "value": 7}, "MSR 0x10 -> 0x7"),
        ({"reason": INTERNAL_ERROR, "address": 1}, "completed by pyvmm"),
        ({"reason": INTERNAL_ERROR, "address": 1, "claimed": False}, "emulation failed, suberror 1"),
        ({"reason": HLT}, "halted"),
        ({"reason": SHUTDOWN}, "triple fault"),
        ({"reason": 10}, ""),
    ],
)  # fmt: skip
def test_an_event_in_words(fields: dict[str, Any], words: str) -> None:
    made = recording(fields)
    assert made.describe(made.events[0]) == words


def test_a_line_has_time_thread_duration_symbol_and_instruction() -> None:
    made = recording({"time": 1_500_000, "duration": 2500, "rip": 0x1010, "reason": IO, "device": UART, "register": 0,
                      "size": 1, "write": True, "value": 0x48})  # fmt: skip
    made.use_symbols(Symbols([(0x1000, 0x20, "print")], "test"))
    made.code[0x1010] = Code(0x1010, b"\xee", b"\xc3", 64)
    assert made.line(made.events[0]).split() == [
        "0.001500", "vcpu0", "io", "uart", "THR", "<-", "0x48", "'H'", "2.5", "us", "0x1010", "<print+0x10>",
        "out", "dx,", "al",
    ]  # fmt: skip


def test_what_is_missing_is_said() -> None:
    made = recording()
    assert made.missing == ""
    made.lost, made.dropped = 5, 7
    assert "5 events were lost" in made.missing and "7 older events were dropped" in made.missing


# ---- the instruction behind an access ----


@pytest.mark.parametrize(
    ("before", "at", "space", "size", "write", "text"),
    [
        ("", "ec", "port", 1, False, "in al, dx"),
        ("b041", "ee", "port", 1, True, "out dx, al"),  # RIP still at it
        ("b041ee", "c3", "port", 1, True, "out dx, al"),  # RIP behind it
        ("b01066ef", "ee", "port", 2, True, "out dx, ax"),  # the one that follows is of another size
        ("90e6f4", "90", "port", 1, True, "out 0xf4, al"),
        ("f36e", "90", "port", 1, True, "rep outsb dx, byte ptr [rsi]"),
        ("8907", "90", "memory", 4, True, "mov dword ptr [rdi], eax"),
        ("488907", "8b07", "memory", 8, True, "mov qword ptr [rdi], rax"),
        ("", "8b07", "memory", 4, False, "mov eax, dword ptr [rdi]"),
        ("9090", "c3", "memory", 4, True, "ret"),  # none of them wrote: then what is there
        ("", "", "memory", 4, True, ""),
        ("", "f4", "", 0, False, "hlt"),
    ],
)
def test_the_instruction_that_made_an_access_is_found(
    before: str, at: str, space: str, size: int, write: bool, text: str
) -> None:
    assert accessing(bytes.fromhex(before), bytes.fromhex(at), 0x1000, 64, space, size, write=write) == text


@given(
    before=st.binary(max_size=15),
    at=st.binary(max_size=15),
    bits=st.sampled_from((16, 32, 64)),
    space=st.sampled_from(("port", "memory", "")),
    size=st.sampled_from((1, 2, 4, 8)),
    write=st.booleans(),
)
@settings(max_examples=examples(200), deadline=None)
def test_any_bytes_of_code_have_some_answer(
    before: bytes, at: bytes, bits: int, space: str, size: int, write: bool
) -> None:
    assert isinstance(accessing(before, at, 0x1000, bits, space, size, write=write), str)


# ---- the file ----

words64 = st.integers(0, 2**64 - 1)
some_events = st.fixed_dictionaries(
    {
        "time": st.integers(0, 2**62),
        "rip": st.sampled_from((0, 0x1000, 0x1010, 2**64 - 1)),
        "address": words64,
        "value": words64,
        "duration": st.integers(0, 2**40),
        "register": st.integers(-1, 8),
        "device": st.integers(0, 3),
        "count": st.integers(1, 9),
        "vcpu": st.integers(-1, 3),
        "reason": st.one_of(st.sampled_from(sorted(REASONS)), st.integers(0, 99)),
        "size": st.sampled_from((0, 1, 2, 4, 8)),
        "write": st.booleans(),
        "claimed": st.booleans(),
    }
)


def named(events: list[dict[str, Any]]) -> Recording:
    made = recording(*events)
    made.code[0x1000] = Code(0x1000, b"\xee\x66\xef", b"\x8b\x07\x89\x07", 64)
    made.use_symbols(Symbols([(0x1000, 0x20, "print")], "test", build_id=b"\1\2"))
    made.lost, made.dropped, made.vcpus, made.note, made.began = 1, 2, 3, "kernel", 1e9
    return made


@given(st.lists(some_events, max_size=20))
@settings(max_examples=examples(60), deadline=None)
def test_a_saved_recording_comes_back_with_every_name(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]]
) -> None:
    path = str(tmp_path_factory.mktemp("trace") / "t")
    made = named(events)
    made.save(path)
    loaded = Recording.load(path)
    assert (loaded.events == made.events).all() and len(loaded) == len(events)
    assert [loaded.line(event) for event in loaded.events] == [made.line(event) for event in made.events]
    assert [made.line(event) for event in made.plain(made.events)] == [made.line(event) for event in made.events]
    for name in ("lost", "dropped", "vcpus", "note", "began", "missing"):
        assert getattr(loaded, name) == getattr(made, name)
    loaded.save(path)  # what was loaded can be saved again
    again = Recording.load(path)
    assert [again.line(event) for event in again.events] == [made.line(event) for event in made.events]


SAMPLE = [{"reason": IO, "device": UART, "register": 0, "size": 1, "write": True, "value": 0x48, "rip": 0x1000}] * 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("trace") / "whole"
    named(SAMPLE).save(str(path))
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "damaged"


@given(data=st.data())
@settings(max_examples=examples(300, fuzzing=100_000), deadline=None)
def test_a_damaged_file_is_read_as_something_or_refused_in_one_sentence(
    place: Path, whole: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    header = 16 + int.from_bytes(whole[12:16], "little")
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, min(len(damaged), header + 64) - 1))] = data.draw(st.integers(0, 255))
    place.write_bytes(damaged)
    with bounded():
        try:
            loaded = Recording.load(str(place))
        except ConfigError as error:
            assert str(place) in str(error) and "\n" not in str(error)
        else:
            assert all(loaded.line(event).isprintable() for event in loaded.events)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (b"", "does not begin as one"),
        (b"\x7fELF" + bytes(60), "does not begin as one"),
        (b"pyvmmtrc" + (2).to_bytes(4, "little") + bytes(52), "its version is 2, this pyvmm reads 1"),
        (b"pyvmmtrc" + (1).to_bytes(4, "little") + b"\xff\xff\xff\xff" + bytes(48), "a header of 4294967295 bytes"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_reason(tmp_path: Path, start: bytes, why: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(start)
    with pytest.raises(ConfigError, match=why):
        Recording.load(str(path))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing: No such file"):
        Recording.load(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="choose another file"):
        named(SAMPLE).save(str(tmp_path))
