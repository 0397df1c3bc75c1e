"""``pyvmm trace``: lines beside the guest's console, files and tables, and requests that cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from effort import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    GuestPath = Callable[[str], str]

SAID = "Hello from long mode\nPASS\n"


def trace(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmm", "trace", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)


def written(lines: str) -> str:
    """The text that the UART's transmit register was given, by the lines of a trace."""
    values = [line.split(" <- ")[1].split()[0] for line in lines.splitlines() if "uart THR <- " in line]
    return "".join(chr(int(value, 16)) for value in values)


def test_lines_go_to_standard_error_beside_the_console(guest: GuestPath) -> None:
    done = trace("--", "--kernel", guest("hello"))
    assert (done.returncode, done.stdout) == (33, SAID)
    assert written(done.stderr) == SAID
    assert "<print+0x" in done.stderr and "out dx, al" in done.stderr
    assert "debug-exit exit <- 0x10" in done.stderr.splitlines()[-1]


def test_a_saved_trace_shows_the_same_lines_later(guest: GuestPath, tmp_path: Path) -> None:
    saved, lines = str(tmp_path / "t"), tmp_path / "lines"
    done = trace("--save", saved, "--lines", str(lines), "--", "--kernel", guest("hello"))
    assert (done.returncode, done.stdout, done.stderr) == (33, SAID, "")
    shown = trace(saved)
    assert (shown.returncode, shown.stderr) == (0, "")
    # Times are scaled once more when the trace ends; all else is the same.
    assert [line.split()[1:4] for line in shown.stdout.splitlines()] == [
        line.split()[1:4] for line in lines.read_text().splitlines()
    ]
    assert written(shown.stdout) == SAID


def test_every_result_of_one_run(guest: GuestPath, tmp_path: Path) -> None:
    page, perfetto = tmp_path / "t.html", tmp_path / "t.json"
    done = trace("--summary", "--html", str(page), "--perfetto", str(perfetto), "--", "--kernel", guest("hello"))
    assert (done.returncode, done.stdout) == (33, SAID)
    assert f"uart THR {len(SAID):41}" in done.stderr
    assert "uart THR" in page.read_text()
    assert sum(event["ph"] == "X" for event in json.loads(perfetto.read_text())["traceEvents"]) == 2 * len(SAID) + 1


def test_only_the_newest_are_kept_and_it_is_said(guest: GuestPath, tmp_path: Path) -> None:
    saved = str(tmp_path / "t")
    done = trace("--keep", "1", "--save", saved, "--", "--kernel", guest("exits"), "--append", "pio=20000 cpl=3")
    assert done.returncode == 33 and "older events were dropped" in done.stderr
    assert "older events were dropped" in trace("--summary", saved).stdout


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "trace what?"),
        (["--keep", "0", "--", "--kernel", "k"], "1 or more"),
        (["missing"], "missing: No such file"),
        (["{here}"], "is not a trace of pyvmm"),
        (["{here}", "--", "--kernel", "k"], "either a saved trace or"),
        (["--symbols", "{here}", "--", "--kernel", "k"], "give it after --"),
        (["--lines", "/", "--", "--kernel", "k"], "choose another file"),
        (["--save", "/nowhere/t", "--", "--kernel", "k"], "there is no directory /nowhere; choose another file"),
        (["--html", "/", "--", "--kernel", "k"], "cannot write /: it is a directory"),
        (["--perfetto", "/nowhere/t", "--", "--kernel", "k"], "choose another file"),
        (["--", "--kernel", "{here}", "--symbols", "{here}"], "is neither an ELF file nor a System.map"),
        (["--colour"], "pyvmm trace --help"),
        (["--", "--colour"], "pyvmm boot --help"),
    ],
)
def test_a_request_that_cannot_be_gets_one_sentence_and_status_2(words: list[str], why: str) -> None:
    done = trace(*(word.format(here=__file__) for word in words))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert why in done.stderr
