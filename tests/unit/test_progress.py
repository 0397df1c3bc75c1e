"""What is shown while pyvmm gets a Linux for itself."""

from __future__ import annotations

import io
import re
import sys

import pytest

from vmm.cli.default_linux import progress_display


class Terminal(io.StringIO):
    """Standard error, a terminal."""

    def isatty(self) -> bool:
        return True


def shown(text: str) -> dict[str, int]:
    """The percentage that was shown last of each step."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return {step: int(percent) for step, percent in re.findall(r"(step \w+).*?(\d+)%", plain)}


def test_a_finished_step_ends_at_100_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_display() as progress:
        progress("step one", 0, None)  # which does not know how much there is to do
        progress("step two", 3, 10)
        progress("step three", 0, None)
    assert shown(terminal.getvalue()) == {"step one": 100, "step two": 100, "step three": 100}


def test_a_step_that_failed_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(OSError, match="gone"), progress_display() as progress:
        progress("step one", 0, None)
        progress("step two", 3, 10)
        raise OSError("gone")
    assert shown(terminal.getvalue()) == {"step one": 100, "step two": 30}
