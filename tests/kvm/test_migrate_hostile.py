"""Whoever connects may be anybody: what is no migration is refused with a reason, and leaves no machine behind."""

from __future__ import annotations

import contextlib
import copy
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm import migrate
from vmm.errors import MigrationError, VmmError
from vmm.machine import Machine
from vmm.migrate.address import PREFACE, Address, Listener, connect
from vmm.migrate.source import hello
from vmm.migrate.wire import DATA_MAX, Channel, Kind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXIT = bytes.fromhex("b010e6f4")  # mov al, 16; out 0xf4, al
TOKEN = bytes(16)
DISK = {"readonly": False, "serial": "", "cache": "writeback", "sector": 512, "queues": 1, "iops": 0, "bps": 0}


class Source:
    """A source that says what it likes to a receiver, which listens on TCP."""

    def __init__(self, **how: Any) -> None:
        self.refusals: list[str] = []
        self.came: Any = None
        self._receiver = migrate.Receiver("tcp:127.0.0.1:0", patience=2, on_refused=self._refused, **how)
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()
        port = int(self._receiver.address.rpartition(":")[2])
        self.raw = socket.create_connection(("127.0.0.1", port))
        self.raw.sendall(PREFACE)
        self.channel = Channel(self.raw)

    def _refused(self, why: str) -> None:
        raise MigrationError(why)

    def _receive(self) -> None:
        try:
            with self._receiver:
                self.came = self._receiver.receive(10)
        except BaseException as error:
            self.came = error

    def refused(self, why: str = "") -> None:
        """It was refused, for that reason."""
        self.raw.shutdown(socket.SHUT_WR)
        self._thread.join(120)
        self.channel.close()
        if isinstance(self.came, Machine):
            self.came.close()
        assert isinstance(self.came, MigrationError), self.came
        assert why in str(self.came)


@pytest.fixture
def greeting(flat: Callable[..., Machine]) -> dict[str, Any]:
    machine = flat(EXIT, rng=False)
    return {**hello(machine, "precopy", TOKEN, fence=False), "state": machine.save()}


def greeted(greeting: dict[str, Any]) -> tuple[Source, Any]:
    said = copy.deepcopy(greeting)
    state = said.pop("state")
    source = Source()
    source.channel.send_value(Kind.HELLO, said)
    source.channel.receive(Kind.ACCEPT)
    return source, {"machine": state, "later": None}


def test_what_the_source_would_send_is_accepted(greeting: dict[str, Any]) -> None:
    source, state = greeted(greeting)
    source.channel.send_value(Kind.STATE, state)
    source.channel.receive(Kind.READY)
    source.refused("stays where it was")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"version": 1}, "version 1 of the protocol"),
        ({"how": "teleport"}, "does not know"),
        ({"how": "standby"}, "the other a standby"),
        ({"token": b"short"}, "does not know"),
        ({"regions": [[0, 4096]]}, "lies elsewhere"),
        ({"description": {}}, "describes no machine"),
        ({"description": {"version": 1, "config": {"gdb": "1234"}}}, "describes no machine"),
        ({"fence": "/etc/passwd"}, "as it should"),
        ({"fence": True}, "give --fence FILE"),
        ({"more": 1}, "as it should"),
        ({"disks": [1 << 20]}, "which disks come along"),
        ({"disks": {}}, "as it should"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_greeting_that_cannot_be_is_refused(greeting: dict[str, Any], changed: dict[str, Any], why: str) -> None:
    greeting.pop("state")
    source = Source()
    source.channel.send_value(Kind.HELLO, {**greeting, **changed})
    with pytest.raises(MigrationError, match="the other side says"):
        source.channel.receive(Kind.ACCEPT)
    source.refused(why)


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ((), {"symbols": "/etc/passwd"}),
        ((), {"shares": [{"directory": "/", "tag": "root"}]}),
        (("config",), {"kernel": "/etc/passwd"}),
        (("config",), {"initrd": ["/etc/passwd"]}),
        (("config",), {"gdb": "/tmp/gdb"}),
        (("config",), {"control": "/tmp/control"}),
        (("config",), {"standby": "tcp:192.0.2.1:1"}),
        (("config",), {"disks": [{"path": "/etc/passwd"}]}),
        (("disks", 0), {"path": "/etc/passwd"}),
        (("disks", 0), {"overlay": "/etc/passwd"}),
        (("disks", 0), {"layers": ["/etc/passwd"]}),
        (("nets", 0), {"socket": "/etc/passwd"}),
        (("nets", 0), {"tap": "tap0"}),
        (("nets", 0), {"hostfwd": ["tcp::8080-:80"]}),
        (("vsock",), {"path": "/etc/passwd"}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "top",
)
def test_whatever_locates_is_refused(
    greeting: dict[str, Any], tmp_path: Path, where: tuple[Any, ...], more: dict[str, Any]
) -> None:
    greeting.pop("state")
    described = greeting["description"]
    described["disks"] = [{"size": 512, **DISK}]
    described["nets"] = [{"forwards": 0, "backend": "user", "mac": None, "mtu": None, "queues": 1, "pps": 0, "bps": 0}]
    described["vsock"] = {"cid": 3}
    at = described
    for step in where:
        at = at[step]
    at.update(more)
    source = Source(disks=["x.img"], nets=["user"], vsock=f"{tmp_path}/v")
    source.channel.send_value(Kind.HELLO, {**greeting, "disks": [0]})
    with pytest.raises(MigrationError, match="the other side says"):
        source.channel.receive(Kind.ACCEPT)
    source.refused("describes no machine")
    assert [path.name for path in tmp_path.iterdir()] == ["flat0.bin"]


def test_a_processor_that_is_not_here_is_refused_before_memory_is_sent(greeting: dict[str, Any]) -> None:
    greeting.pop("state")
    for row in greeting["description"]["cpuid"]:
        if row[0] == 7:
            row[4] = 0xFFFFFFFF
    source = Source()
    source.channel.send_value(Kind.HELLO, greeting)
    with pytest.raises(MigrationError, match="lacks what the machine has"):
        source.channel.receive(Kind.ACCEPT)
    source.refused()


@pytest.mark.parametrize(
    ("kind", "payload", "address"),
    [
        (Kind.PAGES, bytes(4096), 1 << 40),
        (Kind.PAGES, bytes(4096), (16 << 20) - 1),
        (Kind.ZEROS, (DATA_MAX + 1).to_bytes(8, "little"), 0),
        (Kind.ZEROS, (4096).to_bytes(8, "little"), (1 << 64) - 4096),
        (Kind.YOURS, b"", 0),
        (Kind.READY, b"", 0),
        (Kind.EPOCH, b"\xf6", 0),
        (Kind.STATE, b"\xf6", 0),
        (Kind.STATE, b"\xa0", 0),
    ],
)
def test_a_frame_that_cannot_come_now_is_refused(
    greeting: dict[str, Any], kind: Kind, payload: bytes, address: int
) -> None:
    source, _ = greeted(greeting)
    source.channel.send(kind, payload, address=address)
    source.refused()


@pytest.fixture
def with_disks(greeting: dict[str, Any]) -> dict[str, Any]:
    """What says that two disks come along."""
    greeting.pop("state")
    greeting["description"]["disks"] = [{"size": size, **DISK} for size in (1 << 20, 8192)]
    return {**greeting, "disks": [1 << 20, 8192]}


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ([1 << 20], "which disks come along"),
        ([1 << 20, -1], "which disks come along"),
        ([1 << 20, 1 << 63], "which disks come along"),
        ([1 << 20, "8192"], "which disks come along"),
        ([1 << 20, True], "which disks come along"),
        ([1 << 20, 0], "disk 1 does not come along"),
        ([0, 0], "disk 0 does not come along"),
        ([1 << 20, 8193], "not whole sectors"),
        ([1 << 20, (1 << 63) - 512], "cannot be made as large"),
    ],
    ids=str,
)
def test_disks_that_cannot_come_are_refused_and_leave_nothing(
    with_disks: dict[str, Any], tmp_path: Path, sizes: list[Any], why: str
) -> None:
    source = Source(disks_in=tmp_path)
    source.channel.send_value(Kind.HELLO, {**with_disks, "disks": sizes})
    with pytest.raises(MigrationError, match="the other side says"):
        source.channel.receive(Kind.ACCEPT)
    source.refused(why)
    assert list(tmp_path.glob("disk*")) == []


@pytest.mark.parametrize(
    ("kind", "payload", "disk", "address"),
    [
        (Kind.DISK, bytes(512), 2, 0),
        (Kind.DISK, bytes(512), 65535, 0),
        (Kind.DISK, bytes(512), 1, 8192),
        (Kind.DISK, bytes(512), 1, 7681),
        (Kind.DISK, bytes(512), 1, (1 << 64) - 512),
        (Kind.DISK, b"", 1, 8193),
        (Kind.DISK, bytes(16384), 1, 0),
        (Kind.DISK_ZEROS, (8193).to_bytes(8, "little"), 1, 0),
        (Kind.DISK_ZEROS, (512).to_bytes(8, "little"), 1, (1 << 64) - 512),
        (Kind.DISK_ZEROS, (DATA_MAX + 1).to_bytes(8, "little"), 0, 0),
    ],
)
def test_bytes_outside_a_disk_are_refused_and_the_files_removed(
    with_disks: dict[str, Any], tmp_path: Path, kind: Kind, payload: bytes, disk: int, address: int
) -> None:
    source = Source(disks_in=tmp_path)
    source.channel.send_value(Kind.HELLO, with_disks)
    source.channel.receive(Kind.ACCEPT)
    assert [(path.name, path.stat().st_size) for path in sorted(tmp_path.glob("disk*"))] == [
        ("disk0.img", 1 << 20), ("disk1.img", 8192),
    ]  # fmt: skip
    source.channel.send(Kind.DISK, bytes(512), disk=1, address=7680)
    source.channel.send(Kind.DISK_ZEROS, (8192).to_bytes(8, "little"), disk=1)
    source.channel.send(Kind.ROUND)
    source.channel.receive(Kind.SEEN)
    source.channel.send(kind, payload, address=address, disk=disk)
    source.refused("bytes of" if len(payload) != 8 or payload[2] < 4 else "zeros in one frame")
    assert list(tmp_path.glob("disk*")) == []


PLAIN = st.recursive(
    st.none() | st.integers(-1, 1 << 64) | st.binary(max_size=8) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
@settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_value_with_anything_in_it_is_taken_or_refused(greeting: dict[str, Any], data: st.DataObject) -> None:
    """Somewhere in greeting or state stands something else; no machine runs that was not given away."""
    said = copy.deepcopy(greeting)
    at: Any = said
    while True:
        key = data.draw(st.sampled_from(sorted(at, key=str)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 3)) == 0:
            break
        at = at[key]
    at[key] = data.draw(PLAIN)
    state = said.pop("state")
    source = Source()
    try:
        source.channel.send_value(Kind.HELLO, said)
        source.channel.receive(Kind.ACCEPT)
        source.channel.send_value(Kind.STATE, {"machine": state, "later": None})
        source.channel.receive(Kind.READY)
    except MigrationError:
        pass
    source.refused()


# ---- TLS ----


def test_a_relay_passes_on_all_of_it_both_ways_at_once(certificates: Callable[[str], migrate.Tls]) -> None:
    listener = Listener(Address.parse("tcp:127.0.0.1:0"), certificates("a"))
    data = random.Random(1).randbytes(3 << 20), random.Random(2).randbytes(5 << 20)
    come: dict[int, bytes] = {}
    with contextlib.closing(listener), ThreadPoolExecutor(3) as at_once:
        there = at_once.submit(connect, listener.address, certificates("b"))
        ours, _, _ = listener.accept(10, native=True)
        with ours, there.result() as theirs:
            ours.settimeout(20)
            sending = at_once.submit(ours.sendall, data[0])
            receiving = at_once.submit(whole, ours, len(data[1]))
            # One thread for each TLS connection: what it sends is less than the relay and the kernel hold.
            for at in range(0, len(data[1]), 1 << 16):
                theirs.sendall(data[1][at : at + (1 << 16)])
                come[at] = whole(theirs, min(1 << 16, len(data[0]) - at)) if at < len(data[0]) else b""
            assert receiving.result() == data[1] and b"".join(come.values()) == data[0]
            sending.result()
            theirs.close()
            assert ours.recv(1) == b""


def whole(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := connection.recv(size - len(data))):
        data += part
    return bytes(data)


@pytest.mark.parametrize("postcopy", [False, True], ids=["pre-copy", "post-copy"])
@pytest.mark.parametrize(
    ("here", "moves"),
    [("b", True), ("other", False), (None, False)],
    ids=["one of ours", "another authority's", "nobody"],
)
def test_over_tls_the_sides_know_each_other(
    guest: Callable[[str], str],
    certificates: Callable[[str], migrate.Tls],
    here: str | None,
    moves: bool,
    postcopy: bool,
) -> None:
    came: list[Any] = []
    refused: list[str] = []
    receiver = migrate.Receiver("tcp:127.0.0.1:0", tls=certificates("a"), on_refused=refused.append)

    def receive() -> None:
        try:
            with receiver:
                came.append(receiver.receive(5))
        except TimeoutError as error:
            came.append(error)

    there = threading.Thread(target=receive)
    there.start()
    with Machine(kernel=guest("self_check"), memory="32M", append="pages=64 tsc_jump=20000 jump=20000") as machine:
        machine.start()
        machine.console.expect(rb"round 2\n", 120)
        if moves:
            machine.migrate(receiver.address, tls=certificates("b"), postcopy=postcopy)
        else:
            with pytest.raises(VmmError):
                machine.migrate(receiver.address, tls=certificates(here) if here else None, postcopy=postcopy)
        there.join()
        assert isinstance(came[0], Machine) == moves and bool(refused) != moves
        with came[0] if moves else machine as running:
            running.console.send(b"q")
            assert running.wait(30).code == 0x10
