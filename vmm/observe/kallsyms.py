"""The symbols a stripped Linux kernel carries in its own memory: the tables of ``kernel/kallsyms.c``.

Nothing says where they are. The tokens that names are packed with are 256 strings, and digits stand for themselves
in every kernel: ten of them in a row are searched for in guest memory, the table around them is checked against its
index, and from there the others are found, each by what it must look like. Three orders are known, as
``scripts/kallsyms.c`` wrote them, one after the other; the second is in late 6.1 kernels, the third since 6.4::

    offsets, relative_base, num_syms, names, markers, token_table, token_index
    offsets, relative_base, num_syms, names, markers, seqs_of_names, token_table, token_index
    num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names

The guest may have written all of it: every walk is bounded and spends of a budget, tables that do not fit together
are none, and what is kept is no larger than names that a kernel can have.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from vmm.observe.budget import Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.memory import GuestMemory

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_TOKENS = 256
_TOKENS_MAX = 0x10000  # bytes of the token table: its index has 16 bits
_MARKED = 256  # symbols between two markers
_SYMBOLS_MIN, _SYMBOLS_MAX = 100, 1 << 20  # a distribution's kernel has some 200,000
_NAME_MAX = 512  # KSYM_NAME_LEN with the type letter (include/linux/kallsyms.h); 128 before Linux 6.1
_BEFORE, _AFTER = 32 << 20, 8 << 20  # how far the tables may reach to each side of the tokens
_KERNEL_HALF = 1 << 63


class _NotTables(Exception):
    """What was found is something else."""


class Kallsyms(Sequence[tuple[int, str, str]]):
    """Symbols as ``(address, type letter, name)``, by address. Held packed: 12 bytes a symbol, and the text."""

    def __init__(self, addresses: array[int]) -> None:
        """``addresses`` rise; :meth:`add` gives the names to them, one after the other."""
        self._addresses = addresses
        self._text = bytearray(b"\0")  # each symbol's type letter and name, with a zero before and behind it
        self._starts = array("I")

    def add(self, text: bytes) -> None:
        """The next symbol's type letter and name."""
        self._starts.append(len(self._text))
        self._text += text + b"\0"

    def close(self) -> Kallsyms:
        """No more: addresses without names go. Returns itself."""
        del self._addresses[len(self._starts) :]
        return self

    @property
    def addresses(self) -> Sequence[int]:
        """The addresses alone."""
        return self._addresses

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, at: int) -> tuple[int, str, str]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[int, str, str]]: ...
    def __getitem__(self, at: int | slice) -> tuple[int, str, str] | list[tuple[int, str, str]]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        start = self._starts[at]
        text = self._text[start : self._text.index(b"\0", start)].decode("latin-1")
        return self._addresses[at], text[:1] or "?", text[1:]

    def address(self, name: str) -> int | None:
        """Where ``name`` is; the lowest place of several."""
        import re

        found = re.search(rb"\0[^\0]" + re.escape(name.encode("latin-1", "replace")) + rb"\0", self._text)
        return self._addresses[bisect_right(self._starts, found.start() + 1) - 1] if found else None


def find(memory: GuestMemory, budget: Budget | None = None) -> Kallsyms | None:
    """Every symbol in the kernel's tables, those of them that the budget reached; ``None``: no tables."""

    def places(part: Budget) -> Iterator[int]:
        start = 0
        while (at := memory.search(_DIGITS, start, spend=part.spend)) is not None:
            yield at
            start = at + 1

    def window(digits: int, before: int, after: int, part: Budget) -> tuple[bytes, int]:
        # Untouched parts are zeroes, and reading them would allocate guest pages.
        low, high = digits - before - (digits - before) % 8, digits + after
        number = next(n for n, (gpa, size) in enumerate(memory.regions) if gpa <= digits < gpa + size)
        gpa, size = memory.regions[number]
        low, high = max(gpa, low), min(gpa + size, high)
        data = bytearray(high - low)
        for at, n in memory.in_use(number, low):
            if at >= high:
                break
            first, end = max(low, at), min(high, at + n)
            part.spend(looked=end - first)
            data[first - low : end - low] = memory.view(first, end - first)
        return bytes(data), low

    return _first(places, window, budget or Budget())


def parse(image: bytes, budget: Budget | None = None) -> Kallsyms | None:
    """The same from the bytes of an unpacked kernel; tables are found at multiples of 8."""

    def places(part: Budget) -> Iterator[int]:
        at = -1
        while (at := image.find(_DIGITS, at + 1)) >= 0:
            yield at

    def window(digits: int, before: int, after: int, part: Budget) -> tuple[bytes, int]:
        low, high = max(0, digits - before - (digits - before) % 8), digits + after
        part.spend(looked=high - low)
        return image[low:high], low

    return _first(places, window, budget or Budget())


def _first(
    places: Callable[[Budget], Iterator[int]],
    window: Callable[[int, int, int, Budget], tuple[bytes, int]],
    budget: Budget,
) -> Kallsyms | None:
    """The symbols of the first tables around one of ``places``; ``window(at, before, after)`` gives that many bytes
    around one, as far as they are there, and where those begin."""
    found: Kallsyms | None = None
    with budget.part("the search for the kernel's symbols") as part:
        for at in places(part):
            part.spend()
            try:
                # Check the surroundings first: memory full of digits must not cause megabytes of copies for each.
                near, low = window(at, _TOKENS_MAX, 2 * _TOKENS_MAX, part)
                _Tokens(near, at - low)
                wide, low = window(at, _BEFORE, _AFTER, part)
                tables = _Tables(wide, at - low, part)
                found = Kallsyms(tables.addresses())
                tables.name(found)
                break
            except (_NotTables, struct.error, IndexError, ValueError, OverflowError):
                found = None
    return found.close() if found else None


def _aligned(at: int) -> int:
    return at + -at % 8


class _Tokens:
    """The token table and its index in ``data``, around the digits' tokens at ``digits``. Raises ``_NotTables``."""

    def __init__(self, data: bytes, digits: int) -> None:
        at = digits
        for _ in range(ord("0")):
            at = data.rfind(b"\0", 0, at - 1) + 1
        if at % 8 or not 0 < digits - at < _TOKENS_MAX:
            raise _NotTables
        self.table = at
        *self.tokens, rest = data[at : at + _TOKENS_MAX].split(b"\0", _TOKENS)
        if len(self.tokens) != _TOKENS:
            raise _NotTables
        index_at = _aligned(at + min(_TOKENS_MAX, len(data) - at) - len(rest))
        expected = 0
        for offset, token in zip(struct.unpack_from(f"<{_TOKENS}H", data, index_at), self.tokens, strict=True):
            if offset != expected:
                raise _NotTables
            expected += len(token) + 1
        self.index_end = index_at + 2 * _TOKENS


class _Tables:
    """The tables in ``data``, whose tokens of digits are at ``digits``; looking at them spends of ``part``."""

    def __init__(self, data: bytes, digits: int, part: Budget) -> None:
        self.data = data
        self._part = part
        tokens = _Tokens(data, digits)
        self.tokens, self.index_end = tokens.tokens, tokens.index_end
        self.count, self.names = self._find_names(tokens.table)
        self.count_at = self.names - 8

    def _u32(self, at: int) -> int:
        if at < 0:
            raise _NotTables
        return int.from_bytes(self.data[at : at + 4], "little")

    def _find_names(self, table: int) -> tuple[int, int]:
        """How many symbols there are, and where their names begin: 8 bytes after that number."""
        for at in self._count_candidates(table):
            self._part.spend()
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
        at = names
        marks: list[int] = []
        for n in range(count):
            if n % _MARKED == 0:
                self._part.spend(looked=at - names - marks[-1] if marks else 0)
                marks.append(at - names)
            length, at = self._length(at)
            at += length
            if not 0 < length <= _NAME_MAX or at > table:
                return False
        markers = _aligned(at)
        end = _aligned(markers + 4 * len(marks))
        sequences = _aligned(end + 3 * count)
        return table in (end, sequences) and struct.unpack_from(f"<{len(marks)}I", self.data, markers) == tuple(marks)

    def _length(self, at: int) -> tuple[int, int]:
        """A name's packed length: one byte, or two where the first has its top bit set (since Linux 6.1)."""
        first = self.data[at]
        return (first & 0x7F | self.data[at + 1] << 7, at + 2) if first & 0x80 else (first, at + 1)

    def name(self, symbols: Kallsyms) -> None:
        """Give ``symbols`` their names, in order."""
        at, tokens, data = self.names, self.tokens, self.data
        kept = 0
        for n in range(self.count):
            length, at = self._length(at)
            text = b"".join([tokens[token] for token in data[at : at + length]])
            if not 0 < len(text) <= _NAME_MAX:
                raise _NotTables
            at += length
            kept += len(text) + 13
            if n % _MARKED == 0:
                self._part.spend(kept=kept)
                kept = 0
            symbols.add(text)

    def addresses(self) -> array[int]:
        """Each symbol's, rising."""
        size = _aligned(4 * self.count)
        places = ((self.count_at - 8 - size, self.count_at - 8), (self.index_end, self.index_end + size))
        for offsets_at, base_at in places:
            if offsets_at < 0 or base_at + 8 > len(self.data):
                continue
            base = int.from_bytes(self.data[base_at : base_at + 8], "little")
            if base >= _KERNEL_HALF:
                self._part.spend(looked=size, kept=size)
                offsets = array("i", self.data[offsets_at : offsets_at + 4 * self.count])
                addresses = self._relative(offsets, base)
                if _rises(addresses):
                    return addresses
        raise _NotTables

    def _relative(self, offsets: array[int], base: int) -> array[int]:
        """With KALLSYMS_ABSOLUTE_PERCPU negative offsets are relative and others absolute; else all are relative."""
        if min(offsets) < 0:
            return array("Q", [base - 1 - offset if offset < 0 else offset for offset in offsets])
        return array("Q", [base + offset for offset in offsets])


def _rises(addresses: array[int]) -> bool:
    import operator

    return all(map(operator.le, addresses, addresses[1:]))
