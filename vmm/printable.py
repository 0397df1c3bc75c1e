"""Text that a guest wrote, as it may reach a terminal, a log or a report.

A guest's console, its symbols, its memory and what a peer or a snapshot claims are an adversary's words. A terminal
would obey what is in them (clear the screen, set the clipboard, reverse the direction of writing), and a CI system
would take lines of a log as its own commands. Every way out passes through here, but the live console, which is
the guest's own terminal and byte-exact.
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
    import re  # not on the way of a start, which most messages are

    return re.compile(_COMMAND)


def _escaped(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


def printable(text: str, most: int | None = None) -> str:
    """One line of ``text``, at most ``most`` characters of it: what is not printable, line ends among it, as ``\\x1b``
    or ``\\u202e``, a tab as a blank, and nothing that a CI system takes for a command. Idempotent."""
    if most is not None:
        text = text[:most]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c == "\t" else _code(c) for c in text)
    return _commands().sub(_escaped, text) if any(mark in text for mark in _MARKS) else text


def _code(c: str) -> str:
    number = ord(c)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def printable_lines(text: str) -> str:
    """Each line of ``text`` as :func:`printable` has it; the line ends stay."""
    return "\n".join(printable(line) for line in text.split("\n"))
