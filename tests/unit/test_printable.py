"""What a guest wrote is harmless once it is printable: to terminals, and to CI systems that read logs."""

from __future__ import annotations

import re

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.printable import printable, printable_lines

COMMANDS = re.compile(r"^\s*::\w|##\w*\[|(?<!\S)(?:travis_\w+:|section_(?:start|end):)")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("an ordinary line, with été and 漢字", "an ordinary line, with été and 漢字"),
        ("\x1b]52;c;cm0gLXJmIH4K\x07", r"\x1b]52;c;cm0gLXJmIH4K\x07"),
        ("\x1b[2J\x1b[1;31mred", r"\x1b[2J\x1b[1;31mred"),
        ("a\tb\rc\nd", r"a b\x0dc\x0ad"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("abc\u202edcba\u2066x\u200f", r"abc\u202edcba\u2066x\u200f"),
        ("\u2028\ud800\U000e0001", r"\u2028\ud800\U000e0001"),
        ("::error file=x::injected", r"\x3a:error file=x::injected"),
        ("   ::set-output name=x::y", r"   \x3a:set-output name=x::y"),
        ("##[error]x and ##vso[task.setvariable]", r"#\x23[error]x and #\x23vso[task.setvariable]"),
        ("##teamcity[testFailed]", r"#\x23teamcity[testFailed]"),
        ("section_start:1:x", r"\x73ection_start:1:x"),
        ("std::vector<int>::at+0x10", "std::vector<int>::at+0x10"),
        ("### a heading [1]", "### a heading [1]"),
    ],
)
def test_what_would_be_obeyed_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@settings(max_examples=examples(300), deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=list(":#[]\x1b\u202e \n\tabsection_start:travis_fold"))))
@pytest.mark.hypothesis
def test_any_text_becomes_one_harmless_line_and_stays_as_it_then_is(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert not COMMANDS.search(shown)
    assert printable(shown) == shown
    assert all(not COMMANDS.search(line) for line in printable_lines(text).split("\n"))


def test_a_length_is_of_the_text_not_of_what_is_shown() -> None:
    assert printable("\x1b" * 10, 2) == r"\x1b\x1b"
