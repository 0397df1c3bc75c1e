"""Escape untrusted text before it reaches a terminal, a log or a report.

A guest's console, symbols and memory, and the claims of a peer or a snapshot, are untrusted. A terminal would execute
their control sequences (clear the screen, set the clipboard, reverse the direction of writing), and a CI system would
take lines of a log as its own commands. All such text passes through here, except the live console, which is the
guest's own terminal and byte-exact.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import re

# What services read as commands: GitHub's "::name" at the start of a line (blanks aside; a wrapped sentence has its
# words at the start of lines), "##[name" and "##vso[name" anywhere in one (GitHub, Azure), "##teamcity[",
# "travis_fold:", "section_start:" (GitLab).
_COMMAND = r"(?<!\S):(?=:)|(?<=#)#(?=\w*\[)|(?<!\S)[ts](?=ravis_(?:fold|time):|ection_(?:start|end):)"
_MARKS = ("::", "##", "travis_", "section_")


@cache
def _commands() -> re.Pattern[str]:
    import re  # imported here because most starts need it never

    return re.compile(_COMMAND)


def _escaped(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


def printable(text: str, most: int | None = None) -> str:
    """Return ``text`` as one line of at most ``most`` of its characters: unprintable ones, line ends included, become
    ``\\x1b`` or ``\\u202e``, a tab becomes a blank, and commands of CI systems are broken up. Idempotent."""
    if most is not None:
        text = text[:most]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c == "\t" else _code(c) for c in text)
    return _commands().sub(_escaped, text) if any(mark in text for mark in _MARKS) else text


def _code(c: str) -> str:
    number = ord(c)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def printable_lines(text: str) -> str:
    """Return each line of ``text`` as :func:`printable` does; the line ends stay."""
    return "\n".join(printable(line) for line in text.split("\n"))
