"""The symbols a stripped Linux kernel carries in its own memory: the tables of ``kernel/kallsyms.c``.

Nothing says where they are. The tokens that names are packed with are 256 strings, and digits stand for themselves
in every kernel: ten of them in a row are searched for in guest memory, the table around them is checked against its
index, and from there the others are found, each by what it must look like. Three orders are known, as
``scripts/kallsyms.c`` wrote them, one after the other; the second is in late 6.1 kernels, the third since 6.4::

    offsets, relative_base, num_syms, names, markers, token_table, token_index
    offsets, relative_base, num_syms, names, markers, seqs_of_names, token_table, token_index
    num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names

The guest may have written all of it: every walk is bounded, and tables that do not fit together are none.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm.memory import GuestMemory

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_TOKENS = 256
_MARKED = 256  # symbols between two markers
_SYMBOLS_MIN, _SYMBOLS_MAX = 100, 1 << 20  # a distribution's kernel has some 200,000
_BEFORE, _AFTER = 32 << 20, 16 << 20  # how far the tables may reach to each side of the tokens
_KERNEL_HALF = 1 << 63


class _NotTables(Exception):
    """What was found is something else."""


def find(memory: GuestMemory) -> list[tuple[int, str, str]] | None:
    """Every symbol in the kernel's tables as ``(address, type letter, name)``, by address; ``None``: no tables."""
    start = 0
    while (at := memory.search(_DIGITS, start)) is not None:
        start = at + 1
        for gpa, size in memory.regions:
            if gpa <= at < gpa + size:
                low, high = max(gpa, at - _BEFORE), min(gpa + size, at + _AFTER)
                low += -low % 8
                try:
                    return _Tables(bytes(memory.view(low, high - low)), at - low).symbols()
                except (_NotTables, struct.error, IndexError):
                    break
    return None


def parse(image: bytes) -> list[tuple[int, str, str]] | None:
    """The same from the bytes of an unpacked kernel; tables are found at multiples of 8."""
    at = -1
    while (at := image.find(_DIGITS, at + 1)) >= 0:
        low = max(0, at - _BEFORE)
        low += -low % 8
        try:
            return _Tables(image[low : at + _AFTER], at - low).symbols()
        except (_NotTables, struct.error, IndexError):
            continue
    return None


def _aligned(at: int) -> int:
    return at + -at % 8


class _Tables:
    """The tables in ``data``, whose tokens of digits are at ``digits``."""

    def __init__(self, data: bytes, digits: int) -> None:
        self.data = data
        table = self._table_start(digits)
        self.tokens, end = self._read_tokens(table)
        self.index_end = self._check_index(table, _aligned(end))
        self.count, self.names = self._find_names(table)
        self.count_at = self.names - 8

    def _table_start(self, digits: int) -> int:
        at = digits
        for _ in range(ord("0")):
            at = self.data.rfind(b"\0", 0, at - 1) + 1
        if at % 8 or not 0 < digits - at < 0x10000:
            raise _NotTables
        return at

    def _read_tokens(self, at: int) -> tuple[list[bytes], int]:
        tokens = []
        for _ in range(_TOKENS):
            end = self.data.index(b"\0", at, at + 0x1000) if b"\0" in self.data[at : at + 0x1000] else -1
            if end < 0:
                raise _NotTables
            tokens.append(self.data[at:end])
            at = end + 1
        return tokens, at

    def _check_index(self, table: int, at: int) -> int:
        index = struct.unpack_from(f"<{_TOKENS}H", self.data, at)
        expected = 0
        for offset, token in zip(index, self.tokens, strict=True):
            if offset != expected:
                raise _NotTables
            expected += len(token) + 1
        return at + 2 * _TOKENS

    def _u32(self, at: int) -> int:
        if at < 0:
            raise _NotTables
        return int.from_bytes(self.data[at : at + 4], "little")

    def _find_names(self, table: int) -> tuple[int, int]:
        """How many symbols there are, and where their names begin: 8 bytes after that number."""
        for at in self._count_candidates(table):
            count = self._u32(at)
            if _SYMBOLS_MIN <= count <= _SYMBOLS_MAX and self._fits(at + 8, count, table):
                return count, at + 8
        raise _NotTables

    def _count_candidates(self, table: int) -> Iterator[int]:
        import re

        # relative_base, an address in the kernel's half, stands before the number; four bytes of padding after it.
        before = re.compile(rb"\xff\xff\xff\xff...\0\0\0\0\0", re.DOTALL)
        yield from (match.start() + 4 for match in before.finditer(self.data, 0, table) if match.start() % 8 == 4)
        # Where the base comes later, markers end at the token table: rising numbers from 0 lead to the names' end.
        at = table - (4 if self._u32(table - 4) else 8)
        last = self._u32(at)
        for _ in range(_SYMBOLS_MAX // _MARKED):
            if not self._u32(at):
                latest = at - last - 8
                yield from range(latest - latest % 8, max(latest - _MARKED * 512, 0), -8)
                return
            at -= 4

    def _fits(self, names: int, count: int, table: int) -> bool:
        """Whether ``count`` names lead to the markers that tell of every 256th, and those to the token table."""
        at, marks = names, []
        for n in range(count):
            if n % _MARKED == 0:
                marks.append(at - names)
            length, at = self._length(at)
            at += length
            if length == 0 or at > table:
                return False
        markers = _aligned(at)
        end = _aligned(markers + 4 * len(marks))
        sequences = _aligned(end + 3 * count)
        return table in (end, sequences) and struct.unpack_from(f"<{len(marks)}I", self.data, markers) == tuple(marks)

    def _length(self, at: int) -> tuple[int, int]:
        """A name's packed length: one byte, or two where the first has its top bit set (since Linux 6.1)."""
        first = self.data[at]
        return (first & 0x7F | self.data[at + 1] << 7, at + 2) if first & 0x80 else (first, at + 1)

    def symbols(self) -> list[tuple[int, str, str]]:
        addresses = self._addresses()
        found, at = [], self.names
        for address in addresses:
            length, at = self._length(at)
            text = b"".join([self.tokens[token] for token in self.data[at : at + length]])
            at += length
            found.append((address, chr(text[0]) if text else "?", text[1:].decode(errors="replace")))
        found.sort(key=lambda symbol: symbol[0])
        return found

    def _addresses(self) -> list[int]:
        size = _aligned(4 * self.count)
        places = ((self.count_at - 8 - size, self.count_at - 8), (self.index_end, self.index_end + size))
        for offsets_at, base_at in places:
            if offsets_at < 0 or base_at + 8 > len(self.data):
                continue
            base = int.from_bytes(self.data[base_at : base_at + 8], "little")
            if base >= _KERNEL_HALF:
                addresses = self._relative(struct.unpack_from(f"<{self.count}i", self.data, offsets_at), base)
                if _rises(addresses):
                    return addresses
        raise _NotTables

    def _relative(self, offsets: Sequence[int], base: int) -> list[int]:
        """With KALLSYMS_ABSOLUTE_PERCPU negative offsets are relative and others absolute; else all are relative."""
        if any(offset < 0 for offset in offsets):
            return [base - 1 - offset if offset < 0 else offset for offset in offsets]
        return [base + offset for offset in offsets]


def _rises(addresses: Sequence[int]) -> bool:
    from itertools import pairwise

    return all(low <= high for low, high in pairwise(addresses))
