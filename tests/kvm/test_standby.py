"""Snapshots on a period, and a second process that takes over."""

from __future__ import annotations

import multiprocessing
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from effort import PATIENCE
from test_mirror import written_in

from vmm import migrate, snapshot
from vmm.errors import ConfigError, MigrationError
from vmm.machine import Machine
from vmm.migrate import mirror
from vmm.migrate.wire import Frame, Kind
from vmm.parts import Disk
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
        machine.console.expect(rb"round 2\n", PATIENCE)
        yield machine


def has_passed(machine: Machine) -> bool:
    machine.console.send(b"q")
    return machine.wait(PATIENCE).code == 0x10


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
    deadline = time.monotonic() + 120
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

    def __init__(self, address: str, **how: Any) -> None:
        self.receiver = migrate.Receiver(address, patience=5, **how)
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
    following.thread.join(PATIENCE)
    assert not following.thread.is_alive()


def test_the_standby_takes_over_when_the_first_is_killed(first: tuple[Following, Any, Any]) -> None:
    following, process, sent = first
    until = sent.recv() + 2
    while sent.recv() < until:
        pass
    assert not following.came
    process.kill()
    following.thread.join(PATIENCE)
    machine = following.came[0]
    assert isinstance(machine, Machine), machine
    with machine:
        assert has_passed(machine)


def test_it_does_not_when_the_machine_ends_in_order(first: tuple[Following, Any, Any]) -> None:
    following, process, pipe = first
    pipe.send("end")
    process.join(PATIENCE)
    following.thread.join(PATIENCE)
    assert isinstance(following.came[0], MigrationError)
    assert "ended" in str(following.came[0])


def test_who_needs_more_than_a_standby_has_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fence"):
        machine.standby("tcp:127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"half of the standby.s timeout: give less"):
        machine.standby(f"unix:{tmp_path}/there", every=60)


# ---- with disks ----

SIZE = 4 << 20
DISK_WORDS = f"sectors={SIZE // 512} rounds=0"


def run_with_disks(pipe: Any, kernel: str, address: str, disks: list[str]) -> None:
    with Machine(kernel=kernel, memory="16M", append=DISK_WORDS, disks=disks) as machine:
        machine.start()
        machine.console.expect(rb"round 0\n", PATIENCE)
        shadow = machine.standby(address, every=0.1)
        while True:
            if pipe.poll(0.02):
                pipe.recv()
                return
            pipe.send(shadow.sent)


@pytest.fixture
def disks(tmp_path: Path) -> list[str]:
    """One that the guest writes all along, one that it could write, one that both sides see."""
    for number in range(3):
        (tmp_path / f"{number}.img").write_bytes(bytes([number + 1]) * SIZE)
    return [f"{tmp_path}/0.img", f"{tmp_path}/1.img,temporary", f"{tmp_path}/2.img,ro"]


@pytest.fixture
def first_with_disks(
    guest: Callable[[str], str], tmp_path: Path, disks: list[str]
) -> Iterator[tuple[Following, Any, Any]]:
    (tmp_path / "there").mkdir()
    following = Following(f"unix:{tmp_path}/socket", disks_in=tmp_path / "there", disks=[f"{tmp_path}/2.img"])
    ours, theirs = _SPAWN.Pipe()
    args = (theirs, guest("blk_rw"), following.receiver.address, disks)
    process = _SPAWN.Process(target=run_with_disks, args=args)
    process.start()
    theirs.close()
    yield following, process, ours
    process.kill()
    following.thread.join(PATIENCE)
    assert not following.thread.is_alive()


@pytest.mark.parametrize("states", [3, 12])
def test_the_standby_has_the_disks_of_the_moment_that_it_goes_on_from(
    first_with_disks: tuple[Following, Any, Any], tmp_path: Path, states: int
) -> None:
    following, process, pipe = first_with_disks
    while pipe.recv() < states:
        pass
    process.kill()
    following.thread.join(PATIENCE)
    machine = following.came[0]
    assert isinstance(machine, Machine), machine
    there = tmp_path / "there"
    with machine:
        assert [disk.path for disk in machine.config.disks] == [
            f"{there}/disk0.img", f"{there}/disk1.img", f"{tmp_path}/2.img",
        ]  # fmt: skip
        machine.console.expect(rb"round \d+\n", PATIENCE)  # it reads what it wrote before, and writes here
        assert has_passed(machine), machine.console.tail()
        last = int(machine.console.tail().rpartition(b"round ")[2].split()[0])
    image, wanted = (there / "disk0.img").read_bytes(), bytearray(b"\1" * SIZE)
    for block in range(0, 256, 3):
        wanted[block * 4096 : (block + 1) * 4096] = written_in(last)[block * 4096 :][:4096]
    assert image == wanted
    assert (there / "disk1.img").read_bytes() == b"\2" * SIZE
    assert sorted(path.name for path in there.iterdir()) == ["disk0.img", "disk1.img"]


def test_a_machine_that_ends_in_order_leaves_no_disks_there(
    first_with_disks: tuple[Following, Any, Any], tmp_path: Path
) -> None:
    following, process, pipe = first_with_disks
    while pipe.recv() < 2:
        pass
    pipe.send("end")
    process.join(PATIENCE)
    following.thread.join(PATIENCE)
    assert "ended" in str(following.came[0])
    assert list((tmp_path / "there").iterdir()) == []


def test_what_is_staged_is_in_the_disks_only_when_its_moment_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    images = mirror.Images([Disk(str(path))], [4096 * 2])
    images.put(Frame(Kind.DISK, 0, b"\1" * 8192, None))
    images.stage(Frame(Kind.DISK, 4096, b"\2" * 512, None))
    images.stage(Frame(Kind.DISK_ZEROS, 0, (512).to_bytes(8, "little"), None))
    assert path.read_bytes() == b"\1" * 8192
    with pytest.raises(MigrationError, match="that there are not"):
        images.stage(Frame(Kind.DISK, 8192, b"1", None))
    with pytest.raises(MigrationError, match="that there are not"):
        images.stage(Frame(Kind.DISK, 0, b"1", None, 1))
    images.apply()
    assert path.read_bytes() == bytes(512) + b"\1" * 3584 + b"\2" * 512 + b"\1" * 3584
    for _ in range(2):
        images.stage(Frame(Kind.DISK, 0, b"never" + bytes(507), None))
    with pytest.raises(MigrationError, match="more than it has disks"):
        images.stage(Frame(Kind.DISK, 0, b"", None))
    images.keep()
    assert path.read_bytes()[:5] == bytes(5)
