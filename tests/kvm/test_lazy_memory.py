"""Guests whose memory comes while they run: from a snapshot's file, or another process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vmm import snapshot
from vmm.cli import main
from vmm.errors import HostError, SnapshotError, StateError
from vmm.machine import Machine
from vmm.snapshot import working_set
from vmm.testing.ring import VirtioDriver, writable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vmm.snapshot.lazy import LazyMemory

SUM, FIRST, END, PAGE = 0x200000, 0x300000, 0xF00000, 4096
PAGES = (END - FIRST) // PAGE
ADD_UP = bytes.fromhex(
    "be00003000"  # mov esi, FIRST
    "31c0"  # xor eax, eax
    "0306"  # again: add eax, [rsi]
    "81c600100000"  # add esi, 4096
    "81fe0000f000"  # cmp esi, END
    "72f0"  # jb again
    "890425" + SUM.to_bytes(4, "little").hex()  # mov [SUM], eax
    + "b010e6f4"  # mov al, 16; out 0xf4, al
)  # fmt: skip


def word(page: int) -> int:
    return (page + 1) * 2654435761 & 0xFFFFFFFF


TOTAL = sum(map(word, range(PAGES))) & 0xFFFFFFFF


@pytest.fixture
def path(flat: Callable[..., Machine], tmp_path: Path) -> Path:
    """A chain of two: every second page that the guest will add up is in the differential."""
    machine = flat(ADD_UP)
    machine.load()
    for half in (0, 1):
        for page in range(half, PAGES, 2):
            machine.memory.write(FIRST + page * PAGE, word(page).to_bytes(4, "little"))
        machine.snapshot(tmp_path / ("top" if half else "base"), differential=True).close()
    with snapshot.read(tmp_path / "top") as top:
        assert top.parent is not None
        snapshot.merge(top, tmp_path / "whole").close()
    return tmp_path


def restore(source: Path | socket.socket) -> tuple[Machine, LazyMemory]:
    try:
        machine = Machine.restore(source, later=True)
    except HostError as error:
        pytest.skip(str(error))
    assert machine.lazy is not None
    return machine, machine.lazy


def added_up(machine: Machine) -> int:
    outcome = machine.run(60)
    assert outcome.reason == "debug-exit", outcome
    return int.from_bytes(machine.memory.read(SUM, 4), "little")


@pytest.mark.parametrize("name", ["whole", "top"])
def test_a_guest_runs_while_its_memory_comes_from_a_file(path: Path, name: str) -> None:
    machine, memory = restore(path / name)
    with machine:
        before = memory.statistics()
        assert before["missing"] > PAGES // 2 - 10
        assert added_up(machine) == TOTAL
        after = memory.statistics()
        assert after["faults"] >= (PAGES if name == "whole" else PAGES // 2)
        assert after["repeated"] == 0


def test_the_pages_touched_first_are_fetched_first_the_next_time(path: Path) -> None:
    machine, memory = restore(path / "whole")
    with machine, snapshot.read(path / "whole") as found:
        assert working_set.load(found) == []
        assert added_up(machine) == TOTAL
        touched = memory.touched()
        heap = [gpa for gpa in touched if FIRST <= gpa < END]
        assert heap == sorted(heap) and len(heap) == PAGES
        working_set.save(found, touched)
        assert working_set.load(found) == touched
    machine, memory = restore(path / "whole")
    with machine:
        deadline = time.monotonic() + 120
        while memory.statistics()["unasked"] < PAGES and time.monotonic() < deadline:
            time.sleep(0.01)
        assert added_up(machine) == TOTAL
        assert memory.statistics()["faults"] < 50  # not one for each page: only what was not recorded


def test_the_command_records_a_working_set_and_uses_it(path: Path) -> None:
    found = []
    for flags in (["--record"], ["--later"], ["--record"]):
        done = subprocess.run(
            [sys.executable, "-m", "vmm", "restore", *flags, str(path / "whole")], capture_output=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (33, b"")
        with snapshot.read(path / "whole") as whole:
            found.append(working_set.load(whole))
    assert set(range(FIRST, END, PAGE)) <= set(found[0])
    assert found[0] == found[1] == found[2]


def test_a_closed_machine_still_tells_what_it_touched_and_nothing_else(path: Path) -> None:
    machine, memory = restore(path / "whole")
    with machine:
        assert added_up(machine) == TOTAL
    assert len(memory.touched()) >= PAGES
    with pytest.raises(StateError, match="closed"):
        memory.statistics()


def test_a_machine_can_be_stopped_while_its_source_is_gone(path: Path) -> None:
    with server(path / "top", path / "door") as process, call(path / "door") as connection:
        machine, memory = restore(connection)
        with machine:
            machine.start()
            while memory.statistics()["faults"] < PAGES // 4:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            while memory.state != "lost":
                time.sleep(0.01)
            machine.stop()
            assert machine.wait(120).reason == "stopped"


def test_a_machine_closes_while_a_device_waits_for_a_page_that_does_not_come(path: Path) -> None:
    with server(path / "top", path / "door") as process, call(path / "door") as connection:
        machine, memory = restore(connection)
        driver = VirtioDriver.of(machine, machine.virtio[-1], arena=(END, END + (1 << 20)))
        driver.start()
        process.send_signal(signal.SIGSTOP)
        driver.rings[0].offer([writable(FIRST, 64)])
        driver.transport.notify(0)
        while not memory.statistics()["faults"]:
            time.sleep(0.001)
        closing = threading.Thread(target=machine.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()


def test_a_working_set_of_another_snapshot_is_none_and_a_damaged_one_is_refused(path: Path) -> None:
    with snapshot.read(path / "whole") as whole, snapshot.read(path / "base") as base:
        working_set.save(whole, [FIRST])
        os.rename(path / "whole" / working_set.NAME, path / "base" / working_set.NAME)
        assert working_set.load(base) == []
        working_set.save(base, [FIRST])
        content = bytearray((path / "base" / working_set.NAME).read_bytes())
        content[30] ^= 1
        (path / "base" / working_set.NAME).write_bytes(content)
        with pytest.raises(SnapshotError, match="damaged"):
            working_set.load(base)


def test_a_snapshot_of_a_machine_whose_memory_is_still_to_come_has_all_of_it(path: Path) -> None:
    machine, memory = restore(path / "top")
    with machine:
        machine.snapshot(path / "again").close()
        assert memory.state == "done"
        checkpoint = machine.checkpoint()
        assert added_up(machine) == TOTAL
        machine.rollback(checkpoint)
        assert added_up(machine) == TOTAL
    with Machine.restore(path / "again") as again:
        assert added_up(again) == TOTAL


SERVER = """
import socket, sys
from vmm import snapshot
from vmm.snapshot.serving import PageServer
with socket.socket(socket.AF_UNIX) as door, snapshot.read(sys.argv[1]) as found:
    door.bind(sys.argv[2])
    door.listen()
    print("ready", flush=True)
    while True:
        connection, _ = door.accept()
        with connection:
            PageServer(found).serve(connection)
"""


@contextlib.contextmanager
def server(name: Path, at: Path) -> Iterator[subprocess.Popen[str]]:
    at.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(name), str(at)], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def call(at: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(at))
    return connection


def test_a_guest_runs_while_its_memory_comes_over_a_socket(path: Path) -> None:
    with server(path / "top", path / "door"), call(path / "door") as connection:
        machine, memory = restore(connection)
        with machine:
            memory.fetch_rest()
            assert added_up(machine) == TOTAL
            assert memory.wait(60)
            assert memory.state == "done"


def test_a_guest_that_is_paused_while_it_waits_for_pages_loses_no_instruction(path: Path) -> None:
    with server(path / "top", path / "door"), call(path / "door") as connection:
        machine, _ = restore(connection)
        with machine:
            machine.start()
            for _ in range(30):  # each kick finds the vCPU in a fault, or about to be
                machine.pause()
                machine.resume()
            assert machine.wait(60).reason == "debug-exit"
            assert int.from_bytes(machine.memory.read(SUM, 4), "little") == TOTAL


def test_a_guest_waits_while_the_server_is_gone_and_goes_on_with_another(path: Path) -> None:
    with server(path / "top", path / "door") as process, call(path / "door") as connection:
        machine, memory = restore(connection)
        with machine:
            machine.start()
            while memory.statistics()["faults"] < PAGES // 4:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 120
            while memory.state != "lost" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert memory.state == "lost"
            missing = memory.statistics()["missing"]
            time.sleep(0.05)
            assert memory.statistics()["missing"] == missing > 0
            with server(path / "top", path / "door"), call(path / "door") as again:
                from vmm.snapshot.fetching import receive

                receive(again)
                memory.connect(again)
                assert machine.wait(60).reason == "debug-exit"
            assert int.from_bytes(machine.memory.read(SUM, 4), "little") == TOTAL


def test_a_guest_whose_memory_will_not_come_ends_with_that_outcome(path: Path) -> None:
    with server(path / "top", path / "door") as process, call(path / "door") as connection:
        machine, memory = restore(connection)
        with machine:
            machine.start()
            while memory.statistics()["faults"] < PAGES // 4:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait()
            memory.abandon("the other machine is gone")
            outcome = machine.wait(120)
            assert (outcome.reason, outcome.status) == ("memory-lost", 28)
            with pytest.raises(StateError, match="will not"):
                memory.wait()


def test_a_snapshot_while_the_source_is_gone_is_refused(path: Path) -> None:
    with server(path / "top", path / "door") as process, call(path / "door") as connection:
        machine, _ = restore(connection)
        with machine:
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(StateError, match="its source is gone: connect it to another"):
                machine.snapshot(path / "again")
            assert not (path / "again").exists()


def test_what_pyvmm_serve_has_is_restored_and_waited_for_when_it_is_gone(path: Path) -> None:
    at = path / "served"

    @contextlib.contextmanager
    def serving(name: str, until: signal.Signals) -> Iterator[None]:
        at.unlink(missing_ok=True)
        words = [sys.executable, "-m", "vmm", "serve", str(path / name), str(at)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and process.stdout.readline() == f"{path / name} is at unix:{at}\n"
            assert at.stat().st_mode & 0o777 == 0o600
            yield
        finally:
            process.send_signal(until)
            process.wait(120)
            assert at.exists() == (until is signal.SIGKILL)

    def heard(machine: Machine, words: str) -> bool:
        deadline = time.monotonic() + 120
        while not any(words in message for message in machine.messages) and time.monotonic() < deadline:
            time.sleep(0.01)
        return any(words in message for message in machine.messages)

    with contextlib.ExitStack() as stack:
        with serving("top", signal.SIGKILL):
            machine = stack.enter_context(Machine.restore(f"unix:{at}"))
        machine.start()
        assert heard(machine, f"the guest waits for its memory: no snapshot is served at {at}: Connection refused")
        with serving("base", signal.SIGTERM):
            assert heard(machine, f"another snapshot is served at {at}")
        with serving("top", signal.SIGTERM):
            assert machine.wait(60).reason == "debug-exit"
        assert int.from_bytes(machine.memory.read(SUM, 4), "little") == TOTAL
        assert "its memory comes again" in machine.messages


def test_what_cannot_be_served_or_had_is_said_in_a_sentence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["serve", str(path / "top"), str(path / "no" / "where")], "cannot serve at .*No such file"),
        (["serve", str(path), str(path / "door")], "no snapshot|is not"),
        (["restore", f"unix:{path}/nobody"], "no snapshot is served at .*nobody: No such file"),
        (["restore", "--record", f"unix:{path}/nobody"], "--record are for a snapshot's directory"),
    ):
        assert main(words) == 2
        assert re.search(why, capsys.readouterr().err)
