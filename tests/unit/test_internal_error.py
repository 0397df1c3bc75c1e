"""KVM's internal errors in words, with every number that came."""

from __future__ import annotations

import pytest

from vmm.cpu.internal_error import sentence


@pytest.mark.parametrize(
    ("suberror", "data", "words"),
    [
        (
            2,
            (0x80000B0E, 0x80000B0D, 4),
            "another was delivered (vectoring 0x80000b0e, interruption 0x80000b0d, error code 0x4)",
        ),
        (
            3,
            (0x80000B0E, 0x31, 0, 0xFEE00000),
            "(vectoring 0x80000b0e, exit reason 0x31, exit qualification 0x0, 0xfee00000)",
        ),
        (4, (0x400, 1), "that KVM does not know (exit reason 0x400, host CPU 0x1)"),
        (4, (), "that KVM does not know; the host's kernel log"),
        (9, (1, 2), "internal error 9 (0x1, 0x2)"),
        (0, (), "internal error 0; "),
    ],
)
def test_an_internal_error_is_told_with_its_numbers(suberror: int, data: tuple[int, ...], words: str) -> None:
    assert words in sentence(suberror, data)
