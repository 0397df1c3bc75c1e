"""Snapshots on a period, and a second process that takes over."""

from __future__ import annotations

import multiprocessing
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from vmm import migrate, snapshot
from vmm.errors import ConfigError, MigrationError
from vmm.machine import Machine
from vmm.snapshot.keeping import kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WORDS = "pages=64 ballast=256 rate=4000 tsc_jump=60000 jump=60000"
_SPAWN = multiprocessing.get_context("forkserver")


@pytest.fixture
def machine(guest: Callable[[str], str]) -> Iterator[Machine]:
    with Machine(kernel=guest("self_check"), memory="32M", append=WORDS) as machine:
        machine.start()
        machine.console.expect(rb"round 2\n", 30)
        yield machine


def has_passed(machine: Machine) -> bool:
    machine.console.send(b"q")
    return machine.wait(30).code == 0x10


def test_the_last_snapshots_can_be_restored(machine: Machine, tmp_path: Path) -> None:
    keeper = machine.keep(tmp_path / "kept", every=1000, retain=3)
    for n in range(1, 9):
        keeper.take()
        names = kept(tmp_path / "kept")
        assert names[-1] == f"{n:08}" and min(n, 3) <= len(names) < 6
        for name in names:
            with snapshot.read(tmp_path / "kept" / name) as one:
                one.check()
    machine.close()
    for name in kept(tmp_path / "kept"):
        with Machine.restore(tmp_path / "kept" / name, identity="same") as restored:
            restored.start()
            assert has_passed(restored)


def test_snapshots_are_written_on_the_period_and_numbered_on(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "00000041").mkdir()
    keeper = machine.keep(tmp_path, every=0.05, retain=2)
    deadline = time.monotonic() + 20
    while len(kept(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    keeper.stop()
    assert kept(tmp_path)[-1] >= "00000042"
    assert has_passed(machine)
    with pytest.raises(ConfigError, match="greater than 0"):
        machine.keep(tmp_path, every=0)


def run_and_send(pipe: Any, kernel: str, address: str) -> None:
    with Machine(kernel=kernel, memory="32M", append=WORDS) as machine:
        machine.start()
        shadow = machine.standby(address, every=0.1)
        pipe.send("ready")
        while True:
            if pipe.poll(0.02):
                pipe.recv()
                return
            pipe.send(shadow.sent)


class Following:
    """A standby on a thread."""

    def __init__(self, address: str) -> None:
        self.receiver = migrate.Receiver(address, patience=5)
        self.came: list[Machine | BaseException] = []
        self.thread = threading.Thread(target=self._follow)
        self.thread.start()

    def _follow(self) -> None:
        try:
            with self.receiver:
                self.came.append(self.receiver.stand_by())
        except BaseException as error:
            self.came.append(error)


@pytest.fixture
def first(guest: Callable[[str], str], tmp_path: Path) -> Iterator[tuple[Following, Any, Any]]:
    following = Following(f"unix:{tmp_path}/there")
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=run_and_send, args=(theirs, guest("self_check"), following.receiver.address))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    while ours.recv() < 3:
        pass
    yield following, process, ours
    process.kill()
    following.thread.join(30)
    assert not following.thread.is_alive()


def test_the_standby_takes_over_when_the_first_is_killed(first: tuple[Following, Any, Any]) -> None:
    following, process, _ = first
    time.sleep(0.13)
    assert not following.came
    process.kill()
    following.thread.join(30)
    machine = following.came[0]
    assert isinstance(machine, Machine), machine
    with machine:
        assert has_passed(machine)


def test_it_does_not_when_the_machine_ends_in_order(first: tuple[Following, Any, Any]) -> None:
    following, process, pipe = first
    pipe.send("end")
    process.join(30)
    following.thread.join(30)
    assert isinstance(following.came[0], MigrationError)
    assert "ended" in str(following.came[0])


def test_who_needs_more_than_a_standby_has_is_refused(
    machine: Machine, guest: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="fence"):
        machine.standby("tcp:127.0.0.1:1")
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    with Machine(kernel=guest("spin"), memory="16M", disks=[str(disk)]) as other:
        other.start()
        with pytest.raises(ConfigError, match="disks that are written"):
            other.standby(f"unix:{tmp_path}/there")
