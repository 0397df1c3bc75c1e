"""Documentation that is run: a page's Python blocks, and the ``text`` block behind each, which is what it printed."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Block(NamedTuple):
    """A Python block: the line its text starts at, the text, and what the page says it prints (None: nothing)."""

    line: int
    text: str
    shown: str | None


def blocks(page: str) -> list[Block]:
    """The Python blocks of a page, each with the ``text`` block that follows before any other fence."""
    found: list[Block] = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        language, text = match.groups()
        if language == "python":
            found.append(Block(page.count("\n", 0, match.start()) + 1, text, None))
        elif language == "text" and found and found[-1].shown is None:
            found[-1] = found[-1]._replace(shown=text)
    return found


def shows(shown: str, printed: str) -> bool:
    """Whether a page may show this for what was printed: the same, where ``...`` stands for anything in a line."""
    lines = (".*?".join(re.escape(part) for part in line.split("...")) for line in shown.splitlines())
    return re.fullmatch("\n".join(lines), "\n".join(line.rstrip() for line in printed.splitlines())) is not None


def run_page(page: Path) -> None:
    """Run a page's blocks in order, in the current directory, and compare what each prints."""
    names: dict[str, object] = {"__name__": "lab"}
    for block in blocks(page.read_text()):
        printed = io.StringIO()
        # Blank lines in front, so that a traceback names the page's line.
        code = compile(ast.parse("\n" * block.line + block.text, str(page)), str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        shown = block.shown or ""
        assert shows(shown, printed.getvalue()), (
            f"{page.name}:{block.line}: shown:\n{shown}\nprinted:\n{printed.getvalue()}"
        )
