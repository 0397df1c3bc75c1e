"""The kernel command line's grammar, each case as next_arg of Linux has it; and that every decision goes by it."""

from __future__ import annotations

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.boot.cmdline import CommandLine, Option

CASES: list[tuple[str, list[tuple[str, str | None]]]] = [
    ("", []),
    (" \t ", []),
    ("quiet", [("quiet", None)]),
    ("a=1 b=2=3\tc=", [("a", "1"), ("b", "2=3"), ("c", "")]),
    ("quiet -- panic=5 console=web", [("quiet", None)]),
    ("-- quiet", []),
    ('"--" quiet', []),
    ("--quiet a=--", [("--quiet", None), ("a", "--")]),
    ("--=1 quiet", [("--", "1"), ("quiet", None)]),
    ('dyndbg="file a.c +p" quiet', [("dyndbg", "file a.c +p"), ("quiet", None)]),
    ('"dyndbg=file a.c +p" quiet', [("dyndbg", "file a.c +p"), ("quiet", None)]),
    ('a="-- b" c', [("a", "-- b"), ("c", None)]),
    ('a=x" "y c', [("a", 'x" "y'), ("c", None)]),
    ('a="never closed b', [("a", "never closed b")]),
    ('"', [("", None)]),
    ("=a=b", [("=a", "b")]),
]


@pytest.mark.parametrize(("text", "options"), CASES)
def test_options_are_what_the_kernel_reads(text: str, options: list[tuple[str, str | None]]) -> None:
    assert CommandLine(text).options == [Option(*option) for option in options]


def test_the_last_value_counts_and_a_dash_is_an_underscore() -> None:
    line = CommandLine("loglevel=3 virtio-mmio.device=x loglevel=7 loglevel")
    assert line.last("loglevel") == "7"
    assert line.values("virtio_mmio.device") == ["x"] and "virtio_mmio.device" in line
    assert "quiet" not in line and line.last("panic") is None


@settings(max_examples=examples(200))
@given(st.text(alphabet=' "=-a', max_size=40))
def test_any_text_is_read_to_its_end(text: str) -> None:
    options = CommandLine(text).options
    assert sum(len(o.name) + len(o.value or "") for o in options) <= len(text)
    assert all('"' in text or not set(o.name) & set(" ") for o in options)
