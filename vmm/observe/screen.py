"""The text screen of a guest that writes to a VGA card which is not there: 80 by 25 cells at 0xb8000.

The range of the card is ordinary memory of the machine (see :mod:`vmm.layout`), so what a guest stores there stays
there. A cell is a character of code page 437 and an attribute (IBM VGA, mode 3); nothing scrolls by hardware, since
there is no CRTC.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from vmm.printable import printable

if TYPE_CHECKING:
    from vmm.memory import GuestMemory

ADDRESS = 0xB8000
COLUMNS, ROWS = 80, 25
_SIZE = 2 * COLUMNS * ROWS
# of the cells that are not blank: fewer are noise, and other data has few letters or cells that cannot be seen
_CELLS_MIN, _TEXT_SHARE = 4, 0.75
_ATTRIBUTES = 8  # or one that most have: in plain text every other letter would be one


def rows(memory: GuestMemory) -> list[str] | None:
    """The lines of the screen down to the last that is not blank, without blanks behind them; ``None``: guest memory
    holds no text there."""
    if not any(gpa <= ADDRESS and gpa + size >= ADDRESS + _SIZE for gpa, size in memory.regions):
        return None
    cells = memory.read(ADDRESS, _SIZE)
    characters, attributes = cells[::2], cells[1::2]
    written = [(c, a) for c, a in zip(characters, attributes, strict=True) if c not in (0, 0x20)]
    # A character is text if it can be seen (its colours differ) and is ASCII or, for frames and bars, 0xb0 to 0xdf.
    text = [c for c, a in written if (0x20 < c < 0x7F or 0xB0 <= c < 0xE0) and a & 15 != a >> 4 & 7]
    if len(written) < _CELLS_MIN or len(text) < _TEXT_SHARE * len(written):
        return None
    used = Counter(a for _, a in written)
    if len(used) > _ATTRIBUTES and max(used.values()) < len(written) / 2:
        return None
    lines = [
        printable(characters[at : at + COLUMNS].replace(b"\0", b" ").decode("cp437").rstrip())
        for at in range(0, COLUMNS * ROWS, COLUMNS)
    ]
    while not lines[-1]:
        lines.pop()
    return lines


def section(lines: list[str] | None) -> list[str]:
    """What :func:`rows` gave, as lines of a report."""
    if lines is None:
        return [f"text screen at {ADDRESS:#x}: guest memory holds no text there"]
    return [f"text screen at {ADDRESS:#x}:", *(f"  {line}".rstrip() for line in lines)]
