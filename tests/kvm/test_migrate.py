"""Machines that move to another process: their guest checks its memory and clocks all along, and finds nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from effort import PATIENCE

from vmm import migrate
from vmm.errors import ConfigError, MigrationError, StateError
from vmm.machine import Machine
from vmm.migrate import precopy
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOOP = bytes.fromhex("ebfe")
CHECKING = "pages=512 ballast=1024 rate=20000 tsc_jump=20000 jump=20000"


class Arriving:
    """A machine awaited on a thread of its own."""

    def __init__(self, address: str, patience: float = PATIENCE, **how: Any) -> None:
        self._patience = patience
        self.receiver = migrate.Receiver(address, **how)
        self.address = self.receiver.address
        self._came: list[Machine | BaseException] = []
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        try:
            with self.receiver:
                self._came.append(self.receiver.receive(self._patience))
        except BaseException as error:
            self._came.append(error)

    def result(self) -> Machine | BaseException:
        self._thread.join(PATIENCE + 10)
        return self._came[0]

    def machine(self) -> Machine:
        came = self.result()
        if isinstance(came, BaseException):
            raise came
        return came


@pytest.fixture
def running(guest: Callable[[str], str]) -> Iterator[Callable[..., Machine]]:
    """Makes a running machine whose guest checks itself; all that came of it are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(words: str = CHECKING, **fields: Any) -> Machine:
            machine = stack.enter_context(
                Machine(**{"kernel": guest("self_check"), "memory": "64M", "append": words, **fields})
            )
            machine.start()
            machine.console.expect(rb"round 2\n", PATIENCE)
            return machine

        yield make


def has_passed(machine: Machine) -> bool:
    """Tell the guest to end; whether it found nothing wrong."""
    machine.console.send(b"q")
    outcome = machine.wait(PATIENCE)
    return outcome.code == 0x10 and machine.console.tail().endswith(b"PASS\n")


@pytest.mark.parametrize("postcopy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_guest_finds_nothing_wrong_through_twenty_moves(
    running: Callable[..., Machine], tmp_path: Path, postcopy: bool
) -> None:
    machine = running()
    for n in range(20):
        there = Arriving(f"unix:{tmp_path}/{n}")
        moved = machine.migrate(there.address, postcopy=postcopy)
        assert (moved.rounds == 0) == postcopy and moved.downtime < 5
        assert machine.wait().reason == "migrated" and machine.wait().status == 0
        machine.close()
        machine = there.machine()
        time.sleep(0.05)
    with machine:
        assert has_passed(machine)


def test_over_tcp(running: Callable[..., Machine]) -> None:
    machine = running()
    there = Arriving("tcp:127.0.0.1:0")
    machine.migrate(there.address)
    with there.machine() as moved:
        assert has_passed(moved)
    assert machine.wait().reason == "migrated"
    with pytest.raises(StateError, match="moved"):
        machine.start()


def test_only_pages_that_hold_something_are_sent(running: Callable[..., Machine], tmp_path: Path) -> None:
    machine = running("pages=64 rate=100", memory="256M")
    there = Arriving(f"unix:{tmp_path}/there")
    assert machine.migrate(there.address).bytes < 4 << 20
    there.machine().close()


def test_a_guest_that_writes_faster_than_the_link_is_held_back(
    running: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precopy, "ROUNDS_MAX", 6)
    machine = running("pages=64 tsc_jump=20000 jump=20000")
    there = Arriving(f"unix:{tmp_path}/there")
    shares: list[float] = []
    moved = machine.migrate(
        there.address, bandwidth=1 << 20, downtime=0.06, progress=lambda progress: shares.append(progress.share)
    )
    assert moved.rounds == 6
    assert shares == sorted(shares, reverse=True) and 0.3 < shares[-1] < 1
    with there.machine() as machine:
        assert has_passed(machine)


def test_the_brake_leaves_a_guest_less_of_its_time_until_it_is_let_go(running: Callable[..., Machine]) -> None:
    machine = running("pages=64")
    waits: list[tuple[bool, float]] = []  # of the brake's thread: whether the machine stood, and for how many seconds
    enough = threading.Semaphore(0)

    class End(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append((machine.paused, timeout))
            enough.release()
            return super().wait(timeout)

    with precopy.Brake(machine) as brake:
        brake._end = End()
        for _ in range(30):
            brake.press()
        assert brake.share == precopy.SHARE_MIN
        begun = len(waits)
        for _ in range(begun + 22):
            assert enough.acquire(timeout=120)
    assert not machine.paused
    last = waits[begun + 2 : begun + 22]  # ten slices of time since it was pressed to the end
    held, ran = (sum(seconds for stood, seconds in last if stood == which) for which in (True, False))
    assert held / (held + ran) == pytest.approx(1 - precopy.SHARE_MIN)
    assert has_passed(machine)


def test_a_cancelled_machine_goes_on_here(running: Callable[..., Machine], tmp_path: Path) -> None:
    machine = running("pages=2048")
    there = Arriving(f"unix:{tmp_path}/there")

    def cancel(progress: migrate.Progress) -> None:
        if progress.sent > 1 << 20:
            assert machine.migration is not None
            threading.Thread(target=machine.migration.cancel).start()

    with pytest.raises(MigrationError, match="cancelled"):
        machine.migrate(there.address, bandwidth=2 << 20, downtime=0.01, progress=cancel)
    assert isinstance(there.result(), MigrationError)
    assert machine.running and not machine.paused
    assert has_passed(machine)


def test_a_destination_that_cannot_have_it_says_why(running: Callable[..., Machine], tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    machine = running(disks=[f"{disk}"])
    there = Arriving(f"unix:{tmp_path}/there", disks=[f"{tmp_path}/nothing"])
    with pytest.raises(MigrationError, match=r"other side says: disk .*nothing: there is no such file"):
        machine.migrate(there.address)
    assert isinstance(there.result(), MigrationError)
    with pytest.raises(ConfigError, match="in use"):
        Machine(kernel=machine.config.kernel, disks=[f"{disk}"])
    assert has_passed(machine)


def test_a_disk_is_the_machines_wherever_it_is(running: Callable[..., Machine], tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    machine = running(disks=[f"{disk},serial=mine"])
    there = Arriving(f"unix:{tmp_path}/there", disks=[f"{disk}"])
    machine.migrate(there.address)
    with there.machine() as moved:
        assert moved.config.disks[0].serial == "mine"  # what it is comes along; where it is does not
        machine.close()
        with pytest.raises(ConfigError, match="in use"):
            Machine(kernel=machine.config.kernel, disks=[f"{disk}"])
        assert has_passed(moved)


def test_where_it_is_now_is_announced_to_its_network(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(LOOP, rng=False, nets=[f"socket={tmp_path}/here"])
    VirtioDriver.of(machine, machine.virtio[0]).start()
    machine.start()
    there = Arriving(f"unix:{tmp_path}/there", nets=[f"socket={tmp_path}/elsewhere"])
    machine.migrate(there.address)
    with there.machine() as moved:
        assert moved.virtio[0].save()["announces"] == 5


@pytest.mark.parametrize("place", ["tcp", "unix"])
def test_a_source_says_of_nothing_where_it_is(running: Callable[..., Machine], tmp_path: Path, place: str) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    machine = running(disks=[f"{disk}"])
    refused: list[str] = []
    address = "tcp:127.0.0.1:0" if place == "tcp" else f"unix:{tmp_path}/there"
    there = Arriving(address, patience=3, on_refused=refused.append)
    with pytest.raises(MigrationError, match=r"disk 0 does not come along.*: give --disk FILE"):
        machine.migrate(there.address)
    assert isinstance(there.result(), TimeoutError)
    assert len(refused) == 1
    assert has_passed(machine)


def test_a_fence_is_named_on_both_sides(running: Callable[..., Machine], tmp_path: Path) -> None:
    machine = running()
    refused: list[str] = []
    there = Arriving("tcp:127.0.0.1:0", patience=3, on_refused=refused.append)
    with pytest.raises(MigrationError, match="give --fence FILE, the file that both sides see, here too"):
        machine.migrate(there.address, fence=str(tmp_path / "fence"))
    assert isinstance(there.result(), TimeoutError)
    there = Arriving("tcp:127.0.0.1:0", patience=3, on_refused=refused.append, fence=str(tmp_path / "fence"))
    with pytest.raises(MigrationError, match="only this side has a fence"):
        machine.migrate(there.address)
    assert isinstance(there.result(), TimeoutError)
    there = Arriving("tcp:127.0.0.1:0", fence=str(tmp_path / "fence"))
    machine.migrate(there.address, fence=str(tmp_path / "fence"))
    with there.machine() as moved:
        assert has_passed(moved)


def test_a_machine_that_ends_on_its_way_does_not_arrive(running: Callable[..., Machine], tmp_path: Path) -> None:
    machine = running("pages=2048")
    there = Arriving(f"unix:{tmp_path}/there")

    def end(progress: migrate.Progress) -> None:
        machine.console.send(b"q")

    with pytest.raises(MigrationError, match="ended"):
        machine.migrate(there.address, bandwidth=2 << 20, downtime=0.01, progress=end)
    assert isinstance(there.result(), MigrationError)
    assert machine.wait().code == 0x10


def test_nobody_there(running: Callable[..., Machine], tmp_path: Path) -> None:
    machine = running()
    with pytest.raises(MigrationError, match="cannot connect"):
        machine.migrate(f"unix:{tmp_path}/nobody")
    with pytest.raises(ConfigError, match="is no address"):
        machine.migrate("http://there")
    assert has_passed(machine)


class Link:
    """A TCP relay between two sides, to be cut."""

    def __init__(self, address: str) -> None:
        self._to = int(address.rpartition(":")[2])
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.bytes = 0
        self.up = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                if not self.up:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._move, args=(a, b), daemon=True).start()

    def _move(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
                self.bytes += len(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """All connections end; new ones may be made."""
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        """For good."""
        self._server.close()
        self.cut()


@pytest.mark.parametrize("secure", [False, True], ids=["in the clear", "TLS"])
def test_pages_come_after_the_link_was_cut(
    running: Callable[..., Machine], request: pytest.FixtureRequest, secure: bool
) -> None:
    tls = request.getfixturevalue("certificates") if secure else lambda name: None
    machine = running("pages=512 ballast=12000 rate=20000 tsc_jump=20000 jump=20000")
    there = Arriving("tcp:127.0.0.1:0", tls=tls("a"))
    link = Link(there.address)
    how = {"postcopy": True, "tls": tls("b")}
    moving = threading.Thread(target=machine.migrate, args=(link.address,), kwargs=how)
    moving.start()
    moved = there.machine()
    cuts = 0
    while moved.lazy is not None and moved.lazy.state != "done" and cuts < 5:
        time.sleep(0.02)
        link.cut()
        cuts += 1
    moving.join(PATIENCE)
    assert cuts and not moving.is_alive()
    assert machine.wait().reason == "migrated"
    with moved:
        assert moved.lazy is not None and moved.lazy.wait(PATIENCE)
        assert has_passed(moved)
    link.close()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_a_link_that_is_lost_before_the_handover_leaves_it_here(running: Callable[..., Machine], share: float) -> None:
    machine = running()
    there = Arriving("tcp:127.0.0.1:0")
    link = Link(there.address)

    def watch(progress: migrate.Progress) -> None:
        if progress.sent > share * (6 << 20):
            link.close()

    with pytest.raises(MigrationError, match="link"):
        machine.migrate(link.address, bandwidth=16 << 20, downtime=0.001, progress=watch)
    assert isinstance(there.result(), MigrationError)
    assert has_passed(machine)
