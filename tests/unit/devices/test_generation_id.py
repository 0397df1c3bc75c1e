"""The generation ID: where it lies, and when the guest hears of another one."""

from __future__ import annotations

import pytest

from vmm.devices.generation_id import GenerationId
from vmm.testing.fakes import FakeLine

AT = 0x1000


class Page:
    def __init__(self) -> None:
        self.content = bytearray(b"\xaa" * 0x3000)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.content[gpa : gpa + size])

    def write(self, gpa: int, data: bytes) -> None:
        self.content[gpa : gpa + len(data)] = data


def made() -> tuple[GenerationId, Page, FakeLine]:
    page, line = Page(), FakeLine()
    device = GenerationId(page, AT, 7)
    device.line = line
    return device, page, line


def test_the_first_id_is_placed_without_a_word() -> None:
    device, page, line = made()
    assert page.content == b"\xaa" * 0x3000, "nothing is written before the machine boots"
    device.place()
    assert line.levels == []
    assert page.content[:AT] == b"\xaa" * AT and page.content[AT + 16 :] == b"\xaa" * (0x2000 - 16)
    assert device.value == page.content[AT : AT + 16] != b"\xaa" * 16


def test_a_renewed_id_is_in_place_when_the_edge_comes() -> None:
    device, _, line = made()
    seen: list[bytes] = []
    line.raise_ = lambda: seen.append(device.value)  # type: ignore[method-assign]
    device.renew(b"0123456789abcdef")
    assert seen == [b"0123456789abcdef"]
    device.renew()
    assert len(seen) == 2 and seen[1] not in (seen[0], bytes(16))


def test_no_two_are_the_same() -> None:
    device, _, _ = made()
    values = set()
    for _ in range(100):
        device.renew()
        values.add(device.value)
    assert len(values) == 100


@pytest.mark.parametrize("size", [0, 15, 17])
def test_an_id_has_16_bytes(size: int) -> None:
    device, page, line = made()
    with pytest.raises(ValueError, match="16 bytes"):
        device.renew(bytes(size))
    assert page.content == b"\xaa" * 0x3000 and line.levels == []
