"""The README's examples run, and print what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import blocks, run_page

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_examples_run_and_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    languages = [block.language for block in blocks(README.read_text())]
    assert languages.count("python") >= 4 and languages.count("console") == 2
    run_page(README)


@pytest.mark.parametrize(
    "shown", ["$ echo yes\nno\n", "$ echo yes >&2\n", "$ true\nyes\n"], ids=["other", "unshown", "nothing"]
)
def test_a_command_that_prints_something_else_is_a_failure(shown: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```console\n{shown}```\n")
    with pytest.raises(AssertionError, match=r"page.md:\d+: shown"):
        run_page(page)
