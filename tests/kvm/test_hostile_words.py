"""Guests that make it costly to look at them, or write what a terminal or a CI system would obey: each way out."""

from __future__ import annotations

import io
import json
import re
import signal
import struct
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmm.errors import ConsoleTimeout
from vmm.machine import Machine
from vmm.observe.budget import Budget
from vmm.observe.postmortem import brief, report
from vmm.observe.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Callable

    GuestPath = Callable[[str], str]

ENTRY, DATA = 0x1000000, 0x2000000
OBEYED = (
    b"\x1b]0;title\x07\x1b[2J\r\n::error file=x::injected\r\n##[error]too \x9b31m\xe2\x80\xae\x1b]52;c;cm0K\x07\r\n"
)
NAME = "\x1b[2Jevil\u202e::x\n::error::by name ##[group]"
RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|^\s*::\w|##\w*\[", re.MULTILINE)
DIE = bytes.fromhex("0f011d02000000 0f0b") + bytes(10)  # lidt of zeroes, ud2


def printing(text: bytes) -> bytes:
    """Code that sends ``text`` to the UART."""
    return b"\x66\xba\xf8\x03" + b"".join(bytes([0xB0, c, 0xEE]) for c in text)


def kernel(folder: Path, code: bytes, data: bytes = b"") -> str:
    """A file with ``code`` at the entry and ``data`` elsewhere, for --kind linux64."""
    parts = [(ENTRY, code), (DATA, data)] if data else [(ENTRY, code)]
    head, at, body = b"", 64 + 56 * len(parts), b""
    for address, content in parts:
        head += struct.pack("<IIQQQQQQ", 1, 7, at + len(body), address, address, len(content), len(content), 1)
        body += content
    ident = b"\x7fELF\2\1\1" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, len(parts), 0, 0, 0)
    path = folder / "kernel"
    path.write_bytes(header + head + body)
    return str(path)


def boot(path: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "vmm", "boot", "--kernel", path, "--kind", "linux64", "--mem", "128M", "--rng", "off",
            *flags]  # fmt: skip


# ---- what looking costs ----


def fake_kallsyms(count: int, length: int, token: int) -> bytes:
    """Tables of ``count`` names of ``length`` tokens of ``token`` bytes each."""

    def pad(data: bytes) -> bytes:
        return data + bytes(-len(data) % 8)

    name = bytes([0x80 | length & 0x7F, length >> 7]) + b"\xff" * length
    tokens = [bytes([n]) if chr(n).isdigit() else b"x" for n in range(255)] + [b"A" * token]
    index, table = [], b""
    for one in tokens:
        index.append(len(table))
        table += one + b"\0"
    marks = range(0, count * len(name), 256 * len(name))
    return (
        pad(struct.pack(f"<{count}I", *range(count))) + struct.pack("<QQ", 0xFFFFFFFF80000000, count)
        + pad(name * count) + pad(struct.pack(f"<{len(marks)}I", *marks))
        + pad(table) + struct.pack("<256H", *index)
    )  # fmt: skip


DIGITS = b"".join(b"%d\0" % n for n in range(10))
COSTLY = {
    "names that unpack to gigabytes": fake_kallsyms(100, 1000, 4000),
    "many names as long as can be": fake_kallsyms(250_000, 2, 250),
    "digits everywhere": DIGITS * ((2 << 20) // len(DIGITS)),
}


@pytest.mark.parametrize("data", COSTLY.values(), ids=COSTLY.keys())
def test_looking_at_a_guest_costs_no_more_than_it_may(tmp_path: Path, data: bytes) -> None:
    # The limit is of addresses: most are the guest's memory and libraries, whatever the guest did.
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); " \
              "sys.argv = sys.argv[1:]; runpy.run_module('vmm', run_name='__main__')"  # fmt: skip
    words = boot(kernel(tmp_path, DIE, data), "--console", "none")
    done = subprocess.run(
        [sys.executable, "-c", limited, *words[2:]], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 12, done.stderr
    assert "exception without an IDT: ud2 at 0x1000007 raises #UD" in done.stderr
    assert len(done.stderr) < 10_000


def test_a_spent_budget_is_said_in_a_line_of_the_screen(tmp_path: Path) -> None:
    with Machine(kernel=kernel(tmp_path, DIE, DIGITS * 1000), kind="linux64", memory="128M", rng=False) as machine:
        outcome = machine.run(timeout=60)
        with machine.looking(Budget(looked=1 << 20)):
            screen = report(machine, outcome)
    lines = [line for line in screen.splitlines() if "was ended" in line]
    assert lines[0].startswith("  (the search for the kernel's symbols was ended after 0 MiB of guest memory")
    assert "exception without an IDT" in screen


def test_a_budget_that_nobody_shows_is_said_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.observe.budget.LOOKED", 1 << 20)
    monkeypatch.setattr(Budget.__init__, "__defaults__", (10.0, 1 << 20, 1 << 20, None))
    with Machine(kernel=kernel(tmp_path, DIE, DIGITS * 1000), kind="linux64", memory="128M", rng=False) as machine:
        machine.run(timeout=60)
        assert not machine.symbols
        assert not machine.symbols  # and not searched for again
        assert len([text for text in machine.messages if "symbols was ended" in text]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_while_it_looks_at_a_guest_that_has_ended(tmp_path: Path, number: int) -> None:
    patched = """
import sys, time
import vmm.observe.postmortem as postmortem
from vmm.cli import main

def report(machine, outcome):
    with machine.looking() as budget:
        print("looking", budget.within < 1000, flush=True)
        while True:
            budget.spend()

postmortem.report = report
sys.exit(main(sys.argv[1:]))
"""
    words = boot(kernel(tmp_path, DIE), "--console", "none")
    process = subprocess.Popen([sys.executable, "-c", patched, *words[3:]], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"looking True\n"
        process.send_signal(number)
        assert process.wait(timeout=60) == (130 if number == signal.SIGINT else 143)


def test_a_time_limit_holds_while_a_guest_that_has_ended_is_looked_at(tmp_path: Path) -> None:
    from vmm.cli.run_limits import LOOKING_LEAST, RunLimits

    with Machine(kernel=kernel(tmp_path, DIE), kind="linux64", memory="32M", rng=False) as machine:
        machine.run(timeout=60)
        for timeout, most in ((None, 40.0), (0.0, LOOKING_LEAST), (15.0, 15.0)):
            with RunLimits(timeout).looking(machine), machine.looking() as budget:
                assert budget.within <= most
                assert budget.within > most - 5


# ---- what goes out ----


def harmless(text: str) -> bool:
    return not RAW.search(text)


@pytest.fixture
def dead(tmp_path: Path) -> Any:
    """A machine that has printed, and died at a place with a name of its own choosing."""
    path = kernel(tmp_path, printing(OBEYED) + DIE)
    with Machine(kernel=path, kind="linux64", memory="128M", rng=False) as machine:
        machine.view.symbols = Symbols([(ENTRY, 0, NAME)], "the guest")
        machine.run(timeout=60)
        yield machine


def test_the_console_is_byte_exact_and_the_screen_is_not(tmp_path: Path) -> None:
    done = subprocess.run(
        boot(kernel(tmp_path, printing(OBEYED) + DIE)), capture_output=True, stdin=subprocess.DEVNULL, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (12, OBEYED)
    screen = done.stderr.decode()
    assert r"\x3a:error file=x::injected" in screen
    assert harmless(screen), screen


def test_screens_diagnoses_and_messages_are_harmless(dead: Machine) -> None:
    assert dead.outcome is not None
    found = dead.diagnose()
    assert "evil" in found.sentence
    for text in (report(dead, dead.outcome), brief(dead, dead.outcome), found.sentence, *found.evidence):
        assert harmless(text), text
    dead.log.add(f"a device says {NAME}")
    assert "evil" in dead.messages[-1]
    assert harmless(dead.messages[-1])


def test_what_a_program_waits_for_in_vain_is_harmless(dead: Machine) -> None:
    with pytest.raises(ConsoleTimeout) as missed:
        dead.console.expect("never", timeout=0)
    assert "injected" in str(missed.value)
    assert harmless(str(missed.value))
    assert missed.value.transcript == OBEYED


def test_traces_and_profiles_are_harmless(tmp_path: Path) -> None:
    from vmm.observe import timeline
    from vmm.observe.recording import Recording
    from vmm.observe.summary import table

    path = kernel(tmp_path, printing(OBEYED) + DIE)
    with Machine(kernel=path, kind="linux64", memory="128M", rng=False) as machine:
        machine.view.symbols = Symbols([(ENTRY, 0, NAME)], "the guest")
        with machine.profile(hz=1000) as profile, machine.trace() as trace:
            machine.run(timeout=60)
        trace.save(str(tmp_path / "saved"))
        profile.counts = {(0, (ENTRY + 1,)): 3}
        profile._names.clear()
        profile.stop()
        shown = [profile.table(), profile.folded()]
    for recording in (trace, Recording.load(str(tmp_path / "saved"))):
        shown += [table(recording), *map(recording.line, recording.events)]
        timeline.write_page(recording, str(tmp_path / "page.html"))
        timeline.write_perfetto(recording, str(tmp_path / "perfetto.json"))
        texts = timeline.page_data(recording)
        shown += [line for key in ("texts", "places", "devices") for line in texts[key]]
        perfetto = json.loads((tmp_path / "perfetto.json").read_text())
        shown += [str(value) for event in perfetto["traceEvents"] for value in event.get("args", {}).values()]
    assert sum("evil" in text for text in shown) > 6
    for text in shown:
        assert harmless(text), text


def test_a_failed_test_s_report_is_harmless(dead: Machine) -> None:
    from vmm.testing.plugin import _describe

    text = _describe(dead, stop=True)
    assert "injected" in text
    assert harmless(text), text


def test_errors_and_last_words_of_commands_are_harmless(capfd: pytest.CaptureFixture[str]) -> None:
    from vmm import slow_reader
    from vmm.cli import main
    from vmm.console.host_end import HostEnd

    HostEnd().say(NAME)
    slow_reader.report(f"pyvmm: {OBEYED.decode(errors='replace')}\n")
    with redirect_stdout(io.StringIO()):
        assert main(["boot", "--kernel", "/nowhere/\x1b[2J\n::error::x"]) == 2
    printed = capfd.readouterr().err
    assert printed.count("error") >= 3
    assert harmless(printed), printed
