"""The labs are true: their code runs, prints what they show, and their listings are the bytes of their comments."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import blocks, run_page, shows

ROOT = Path(__file__).resolve().parents[2]
LABS = ROOT / "docs" / "labs"
PAGES = sorted(path.name for path in LABS.glob("[0-9]*.md"))
LINUX = "10-linux.md"  # needs a kernel, and minutes: tests/linux
LISTING = re.compile(r"bytes\.fromhex\(  # (16|32|64)-bit, at (0x[0-9a-f]+)\n(.*?)^\)", re.MULTILINE | re.DOTALL)


# What these show a host that takes a dead guest's registers knows from a replay, with breakpoints.
MARKS = {"02-protected-and-long-mode.md": pytest.mark.stops("breakpoint")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in PAGES if name != LINUX])
def test_a_lab_runs_and_prints_what_its_page_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(LABS / name)


@pytest.mark.parametrize("name", PAGES)
def test_the_bytes_of_a_listing_are_what_its_comments_assemble_to(name: str, tmp_path: Path) -> None:
    for tool in ("as", "ld", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    listings = LISTING.findall((LABS / name).read_text())
    assert listings or name == LINUX
    for bits, address, rows in listings:
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


def test_what_a_page_shows_is_compared(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1"):
        run_page(page)
    page.write_text("```python\nprint(1)\n```\n")  # printed, and not shown
    with pytest.raises(AssertionError):
        run_page(page)


def test_a_text_block_belongs_to_the_python_block_before_it() -> None:
    found = blocks("```python\na\n```\n\n```python\nb\n```\nprose\n```text\nc\n```\n")
    assert [(block.line, block.text, block.shown) for block in found] == [(1, "a\n", None), (5, "b\n", "c\n")]
