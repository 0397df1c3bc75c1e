"""The text screen at 0xb8000: shown where guest memory holds text there, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.observe import screen


class Memory:
    """RAM from 0, its end at ``size``."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.regions = [(0, size)]
        self.data = bytearray(size)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.data[gpa : gpa + size])

    def put(self, row: int, column: int, text: bytes, attribute: int = 7) -> None:
        at = screen.ADDRESS + 2 * (80 * row + column)
        self.data[at : at + 2 * len(text)] = b"".join(bytes([c, attribute]) for c in text)


def rows(memory: Any) -> list[str] | None:
    return screen.rows(memory)


def test_rows_are_shown_down_to_the_last_that_is_written() -> None:
    memory = Memory()
    memory.put(0, 0, b"Hello from the kernel")
    memory.put(2, 76, b"wall", 0x1F)
    assert rows(memory) == ["Hello from the kernel", "", " " * 76 + "wall"]
    assert screen.section(rows(memory))[:2] == ["text screen at 0xb8000:", "  Hello from the kernel"]


def test_frames_are_code_page_437_and_control_characters_are_no_controls() -> None:
    memory = Memory()
    memory.put(0, 0, b"\xc9\xcd\xcd\xbb ::error::x \x1b[2J")
    found = rows(memory)
    assert found == [r"╔══╗ \x3a:error::x \x1b[2J"]


@pytest.mark.parametrize(
    "fill",
    [
        lambda memory: None,
        lambda memory: memory.put(0, 0, b"abc"),
        lambda memory: memory.put(0, 0, b"black on black is not seen", 0),
        lambda memory: memory.data.__setitem__(slice(0xB8000, 0xB8FA0), bytes(n * 167 % 251 for n in range(4000))),
        lambda memory: memory.data.__setitem__(slice(0xB8000, 0xB8FA0), b"plain text, not cells" * 190 + b"1234567890"),
    ],
    ids=["nothing", "too little", "invisible", "noise", "text without attributes"],
)
def test_other_memory_is_no_screen(fill: Any) -> None:
    memory = Memory()
    fill(memory)
    assert rows(memory) is None
    assert screen.section(None) == ["text screen at 0xb8000: guest memory holds no text there"]


def test_a_machine_whose_memory_ends_before_has_none() -> None:
    assert rows(Memory(0xB8000)) is None
