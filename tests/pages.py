"""Documentation that is run: a page's Python and console blocks, compared with the output that the page shows.

A ``python`` block prints what the ``text`` block behind it shows. A ``console`` block has its commands after ``$``, and
the output of each below it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A block that is run: its language, the line its text starts at, the text, and the output shown (None: none)."""

    language: str
    line: int
    text: str
    shown: str | None


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page that are run, in order; a command of a console block is a block of its own."""
    found: list[Block] = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        language, text = match.groups()
        line = page.count("\n", 0, match.start()) + 1
        if language == "python":
            found.append(Block(language, line, text, None))
        elif language == "console":
            for command in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                at = line + text.count("\n", 0, command.start())
                found.append(Block(language, at, command.group(1), command.group(2)))
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
        printed = _output_of_command(block.text) if block.language == "console" else _output(block, page, names)
        shown = block.shown or ""
        assert shows(shown, printed), f"{page.name}:{block.line}: shown:\n{shown}\nprinted:\n{printed}"


def _output(block: Block, page: Path, names: dict[str, object]) -> str:
    printed = io.StringIO()
    # Blank lines in front, so that a traceback names the page's line.
    code = compile(ast.parse("\n" * block.line + block.text, str(page)), str(page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def _output_of_command(command: str) -> str:
    """Run a shell command with this Python's scripts on the path; return both of its streams as they were mixed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        shell=True,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    ).stdout
