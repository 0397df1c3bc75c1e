"""pyvmm run: the command's output is found in the console's whatever the guest prints; requests that cannot be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.cli.run import CommandOutput, configure
from vmm.errors import ConfigError

BOOT = b"early kernel words\r\npyvmm: comman\r\n"
BEGIN = b"pyvmm: command\r\n"

# Text that likes to look like init's lines, and anything.
NASTY = st.lists(
    st.sampled_from([b"pyvmm: exit status ", b"pyvmm: ", b"p", b"7", b"255", b"1234", b"\n", b"\r", b"\r\n", b"x"])
    | st.binary(max_size=8),
    max_size=12,
).map(b"".join)


def on_console(text: bytes) -> bytes:
    """As the guest's terminal writes it (ONLCR)."""
    return text.replace(b"\n", b"\r\n")


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(at)]


@settings(max_examples=examples(300), deadline=None)
@given(printed=NASTY, status=st.integers(0, 255), cuts=st.lists(st.integers(0, 500), max_size=6))
def test_any_output_comes_out_as_it_was_with_the_last_status(printed: bytes, status: int, cuts: list[int]) -> None:
    output, shown = CommandOutput(), b""
    for piece in pieces(BOOT + BEGIN + on_console(printed + b"pyvmm: exit status %d\n" % status), cuts):
        shown += output.feed(piece)
    rest, found = output.finish()
    assert (shown + rest, found) == (printed, status)


@settings(max_examples=examples(100), deadline=None)
@given(printed=NASTY, cuts=st.lists(st.integers(0, 500), max_size=6))
def test_of_a_guest_that_dies_all_it_printed_comes_out(printed: bytes, cuts: list[int]) -> None:
    printed += b"."  # no status line at the end
    output, shown = CommandOutput(), b""
    for piece in pieces(BOOT + BEGIN + on_console(printed), cuts):
        shown += output.feed(piece)
    rest, found = output.finish()
    if found is None:
        assert shown + rest == printed
    else:  # it printed a status line itself
        assert printed.startswith(shown + b"pyvmm: exit status %d" % found)


def test_output_is_shown_as_soon_as_it_is_certain() -> None:
    output = CommandOutput()
    assert output.feed(BOOT + BEGIN + b"one\r\ntw") == b"one\ntw"
    assert output.feed(b"o pyvmm: ex") == b"o "
    assert output.feed(b"cellent\r") == b"pyvmm: excellent"
    assert output.feed(b"\npyvmm: exit status 3\r\n") == b"\n"
    assert output.finish() == (b"", 3)


def test_what_the_kernel_says_before_the_command_is_not_shown() -> None:
    output = CommandOutput()
    assert output.feed(BOOT * 1000) == b""
    assert output.finish() == (b"", None)


@pytest.mark.parametrize(
    ("fields", "command", "why"),
    [
        ({}, [], "run what"),
        ({"console": "pty"}, ["true"], "no use for console"),
        ({"gdb": "1234"}, ["true"], "no use for gdb"),
        ({"reboot": True}, ["true"], "no use for reboot"),
        ({"kernel": "k", "shares": ["/:../../etc"]}, ["true"], "initramfs"),
        ({"kernel": "k"}, ["nul\0"], "NUL"),
    ],
)
def test_a_request_that_cannot_be_is_refused(fields: dict[str, object], command: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        configure(fields, command)


@pytest.mark.parametrize(
    ("append", "quiet"), [("loglevel=7", False), ("-- loglevel=7", True), ('x="loglevel=7"', True)]
)
def test_the_kernel_is_quiet_unless_it_was_told_how_loud_to_be(
    append: str, quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.cli.default_linux.find", lambda config, **how: config)
    line = configure({"append": append}, ["true"]).append
    assert line == (f"quiet loglevel=1 {append}" if quiet else append)
