"""A machine told what to do over its control socket, and the commands that do."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from effort import PATIENCE, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.control import LINE_MAX, REQUESTS, Control, _parse, ask
from vmm.errors import ConfigError, HostError, StateError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PYVMM = [sys.executable, "-m", "vmm"]


@pytest.fixture
def machine(guest: Callable[[str], str]) -> Iterator[Machine]:
    with Machine(kernel=guest("self_check"), memory="32M", append="pages=64 tsc_jump=20000 jump=20000") as machine:
        machine.start()
        machine.console.expect(rb"round 2\n", PATIENCE)
        yield machine


def test_a_machine_is_held_and_goes_on(machine: Machine, tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with Control(machine, path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert ask(path, {"do": "status"})["state"] == "running"
        ask(path, {"do": "pause"})
        assert machine.paused and ask(path, {"do": "status"})["state"] == "paused"
        with pytest.raises(StateError, match="held already"):
            ask(path, {"do": "pause"})
        ask(path, {"do": "resume"})
        assert not machine.paused
        with pytest.raises(StateError, match="not on its way"):
            ask(path, {"do": "cancel"})
    assert not os.path.exists(path)
    with pytest.raises(HostError, match="no machine answers"):
        ask(path, {"do": "status"})


def test_a_snapshot_by_command_can_be_restored(machine: Machine, tmp_path: Path) -> None:
    with Control(machine, str(tmp_path / "control")):
        command = [*PYVMM, "snapshot", str(tmp_path / "control"), "there"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.startswith("there: "), done.stderr
    with Machine.restore(tmp_path / "there") as restored:
        restored.start()
        restored.console.expect(rb"round \d+\n", PATIENCE)


def test_a_machine_moves_by_command(guest: Callable[[str], str], tmp_path: Path) -> None:
    control, there = str(tmp_path / "control"), f"unix:{tmp_path}/there"
    boot = ["boot", "--kernel", guest("self_check"), "--mem", "32M", "--append", "pages=64 tsc_jump=20000 jump=20000"]
    receiving = subprocess.Popen(
        [*PYVMM, "receive", there], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    booted = subprocess.Popen(
        [*PYVMM, *boot, "--control", control], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert booted.stdout and receiving.stderr
    try:
        assert b"waiting for a machine" in receiving.stderr.readline()
        while b"round 2" not in booted.stdout.readline():
            assert booted.poll() is None
        moved = subprocess.run([*PYVMM, "migrate", control, there], capture_output=True, text=True, timeout=60)
        assert moved.returncode == 0 and moved.stdout.startswith("moved: held for "), moved.stderr
        assert booted.wait(PATIENCE) == 0
        output, _ = receiving.communicate(b"q", timeout=60)
        assert receiving.returncode == 33 and output.endswith(b"PASS\n")
    finally:
        for process in (booted, receiving):
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"\n", "JSON object"),
        (b"[1]\n", "does one of"),
        (b'{"do": "explode"}\n', "does one of status"),
        (b'{"do": "pause", "why": 1}\n', "takes nothing"),
        (b'{"do": "migrate"}\n', "needs to"),
        (b'{"do": "migrate", "to": "unix:/x", "downtime": true}\n', "downtime is not"),
        (b"[" * 60000 + b"\n", "JSON object"),
    ],
)
def test_a_request_that_is_none_gets_a_sentence(machine: Machine, tmp_path: Path, line: bytes, sentence: str) -> None:
    with Control(machine, str(tmp_path / "control")), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "control"))
        connection.sendall(line)
        assert sentence in connection.makefile().readline()
        connection.sendall(b'{"do": "status"}\n')
        assert '"running"' in connection.makefile().readline()


@settings(max_examples=examples(100), deadline=None)
@given(line=st.binary(max_size=LINE_MAX // 256))
@pytest.mark.parametrize("name", REQUESTS)
def test_any_line_is_a_request_or_refused(name: str, line: bytes) -> None:
    for text in (line, b'{"do": "' + name.encode() + b'", ' + line + b"}"):
        try:
            found, fields = _parse(text)
        except ConfigError:
            continue
        assert found in REQUESTS and fields.keys() <= REQUESTS[found].keys()
