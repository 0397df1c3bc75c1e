"""The labs are true: their code runs, prints what they show, and their listings are the bytes of their comments."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LABS = ROOT / "docs" / "labs"
PAGES = sorted(path.name for path in LABS.glob("[0-9]*.md"))
LINUX = "10-linux.md"  # needs a kernel, and minutes: tests/linux
LISTING = re.compile(r"bytes\.fromhex\(  # (16|32|64)-bit, at (0x[0-9a-f]+)\n(.*?)^\)", re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("name", [name for name in PAGES if name != LINUX])
def test_a_lab_runs_and_prints_what_its_page_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(LABS / name)


@pytest.mark.parametrize("name", PAGES)
def test_the_bytes_of_a_listing_are_what_its_comments_assemble_to(name: str, tmp_path: Path) -> None:
    for tool in ("as", "ld", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    for bits, address, rows in LISTING.findall((LABS / name).read_text()):
        pieces = "".join(re.findall(r'^ *"([0-9a-f ]*)"', rows, re.MULTILINE))
        comments = re.findall(r"# (.*)$", rows, re.MULTILINE)
        source = [".intel_syntax noprefix", f".code{bits}", *(line.split(" ;")[0] for line in comments)]
        assert assembled("\n".join(source), address, tmp_path) == bytes.fromhex(pieces), f"{name}, at {address}"


def assembled(source: str, address: str, folder: Path) -> bytes:
    """The flat binary of GNU assembler source, to lie at ``address``."""
    Path(folder, "lab.s").write_text(source + "\n")
    for command in (
        ["as", "--64", "-o", "lab.o", "lab.s"],
        ["ld", "-m", "elf_x86_64", "-Ttext", address, "-e", address, "-o", "lab.elf", "lab.o"],
        ["objcopy", "-O", "binary", "-j", ".text", "lab.elf", "lab.bin"],
    ):
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return Path(folder, "lab.bin").read_bytes()


def test_the_index_has_every_lab_in_order() -> None:
    assert re.findall(r"\]\((\d\d-[\w-]+\.md)\)", (LABS / "README.md").read_text()) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_paths_that_a_lab_names_exist(name: str) -> None:
    named = set(re.findall(r"`((?:vmm|native|guests|tests|bench|docs)/[\w./-]*)`", (LABS / name).read_text()))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_dots_stand_for_anything_within_a_line_only() -> None:
    assert shows("took ... ns\nend\n", "took 417 ns \nend\n")
    assert not shows("took ... ns\n", "took 417 us\n")
    assert not shows("took ...\n", "took 417 ns\nend\n")
    assert not shows("", "something\n")
