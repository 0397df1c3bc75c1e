"""The frames of a migration: what was sent comes, and nothing else is taken for it; addresses; the fence."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import ConfigError, MigrationError
from vmm.migrate import Receiver, address, wire
from vmm.migrate import fence as fences
from vmm.migrate.address import Address, Listener, connect
from vmm.migrate.fence import Fence
from vmm.migrate.wire import Channel, Kind, LinkLost
from vmm.snapshot import cbor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VALUES = [Kind.HELLO, Kind.STATE, Kind.EPOCH, Kind.ACCEPT]


def pair() -> tuple[Channel, Channel, socket.socket, socket.socket]:
    a, b = socket.socketpair()
    return Channel(a), Channel(b), a, b


def frame(kind: int, payload: bytes, address: int = 0) -> bytes:
    """A whole frame with a right checksum."""
    out, _, _, raw = pair()
    done: list[bytes] = []
    if kind in list(Kind):
        out.send(Kind(kind), payload, address=address)
        done.append(raw.recv(1 << 20, socket.MSG_WAITALL | socket.MSG_DONTWAIT))
    out.close()
    raw.close()
    return done[0]


@given(data=st.binary(max_size=4096), address=st.integers(0, (1 << 64) - 1))
@settings(max_examples=examples(100), deadline=None)
def test_data_come_as_they_were_sent(data: bytes, address: int) -> None:
    out, into, *_ = pair()
    out.send(Kind.PAGES, data, address=address)
    out.send_value(Kind.STATE, {"a": [1, data]})
    assert into.receive(Kind.PAGES)[:3] == (Kind.PAGES, address, data)
    assert into.receive(Kind.STATE).value == {"a": [1, data]}
    assert out.sent == 2 * 24 + len(data) + len(cbor.encode({"a": [1, data]}))
    out.close()
    into.close()


def test_a_disk_has_a_number_and_nothing_else_has() -> None:
    out, into, raw, _ = pair()
    out.send(Kind.DISK, b"bytes", address=512, disk=65535)
    out.send(Kind.DISK_ZEROS, bytes(8), disk=1)
    assert into.receive(Kind.DISK) == (Kind.DISK, 512, b"bytes", None, 65535)
    assert into.receive(Kind.DISK_ZEROS).disk == 1
    head = struct.pack("<HHIQ", Kind.ROUND, 1, 0, 0)
    raw.sendall(head + struct.pack("<II", wire._crc(0, head), 0))
    with pytest.raises(MigrationError, match="does not speak this protocol"):
        into.receive(Kind.ROUND)
    out.close()
    into.close()


def test_who_refused_and_went_is_heard_by_who_still_sends() -> None:
    out, into, *_ = pair()
    out.send(Kind.PAGES, bytes(4096))  # which nobody reads
    into.send_value(Kind.REFUSE, "there is no room")
    into.close()
    with pytest.raises(MigrationError, match="the other side says: there is no room") as caught:
        for _ in range(2):
            out.send(Kind.PAGES, bytes(4096))
    assert not isinstance(caught.value, LinkLost)
    out.close()


@given(data=st.binary(max_size=200))
@settings(max_examples=examples(300), deadline=None)
def test_any_bytes_are_refused(data: bytes) -> None:
    _, into, raw, _ = pair()
    raw.sendall(data)
    raw.shutdown(socket.SHUT_WR)
    with pytest.raises(MigrationError):
        into.receive(*Kind)
    into.close()
    raw.close()


@given(flip=st.integers(0, 8 * (24 + 64) - 1))
@settings(max_examples=examples(200), deadline=None)
def test_a_flipped_bit_is_found(flip: int) -> None:
    sent = bytearray(frame(Kind.PAGES, bytes(range(64)), 0x1000))
    sent[flip // 8] ^= 1 << flip % 8
    _, into, raw, _ = pair()
    raw.sendall(sent)
    raw.shutdown(socket.SHUT_WR)
    with pytest.raises(MigrationError):
        into.receive(*Kind)
    into.close()
    raw.close()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (struct.pack("<IIQII", 99, 0, 0, 0, 0), "does not speak"),
        (struct.pack("<IIQII", Kind.PAGES, wire.DATA_MAX + 1, 0, 0, 0), "PAGES of 262145 bytes"),
        (struct.pack("<IIQII", Kind.STATE, wire.STATE_MAX + 1, 0, 0, 0), "STATE of 67108865 bytes"),
        (struct.pack("<IIQII", Kind.HELLO, wire.HELLO_MAX + 1, 0, 0, 0), "HELLO of 262145 bytes"),
        (struct.pack("<IIQII", Kind.REFUSE, wire.TEXT_MAX + 1, 0, 0, 0), "REFUSE of 16385 bytes"),
        (struct.pack("<IIQII", Kind.ZEROS, 7, 0, 0, 0), "ZEROS of 7 bytes"),
        (struct.pack("<IIQII", Kind.TAKEN, 1, 0, 0, 0), "TAKEN of 1 bytes"),
        (frame(Kind.STATE, b"\xff"), "holds no value"),
        (frame(Kind.TAKEN, b""), "only READY can come"),
        (frame(Kind.REFUSE, cbor.encode("no \x1b[2J room")), r"other side says: no \?\[2J room"),
        (frame(Kind.ABORT, cbor.encode([1])), "it gave no reason"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(sent: bytes, why: str) -> None:
    _, into, raw, _ = pair()
    raw.sendall(sent)
    with pytest.raises(MigrationError, match=why):
        into.receive(Kind.READY)


def test_an_end_and_silence_are_a_lost_link(monkeypatch: pytest.MonkeyPatch) -> None:
    out, into, raw, _ = pair()
    raw.sendall(frame(Kind.READY, b"")[:10])
    monkeypatch.setattr(wire, "PATIENCE", 0.05)
    with pytest.raises(LinkLost):
        into.receive(Kind.READY)
    out, into, raw, _ = pair()
    with pytest.raises(LinkLost):
        into.receive(Kind.READY, timeout=0.05)
    out.close()
    with pytest.raises(LinkLost, match="closed"):
        into.receive(Kind.READY)


class Dripping:
    """Sends, or takes, a byte every so often, as long as the other side is there."""

    EVERY = 0.02

    def __init__(self, raw: socket.socket, data: bytes = b"") -> None:
        self._raw = raw
        self._data = data
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._drip)
        self._thread.start()

    def _drip(self) -> None:
        with self._raw, contextlib.suppress(OSError):
            while self.bytes < (len(self._data) or 1 << 30):
                if self._data:
                    self._raw.sendall(self._data[self.bytes : self.bytes + 1])
                elif not self._raw.recv(1):
                    return
                self.bytes += 1
                if self._over.wait(self.EVERY):
                    return

    def join(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame and a greeting have 0.3 s; a byte comes every 0.02 s, and all of them would take minutes."""
    monkeypatch.setattr(wire, "PATIENCE", 0.3)
    monkeypatch.setattr(wire, "SLOWEST", 1 << 40)
    monkeypatch.setattr(address, "GREETING_SECONDS", 0.3)


def test_a_frame_that_comes_byte_by_byte_has_one_deadline(hurry: None) -> None:
    _, into, raw, _ = pair()
    peer = Dripping(raw, frame(Kind.PAGES, bytes(1 << 16)))
    with pytest.raises(LinkLost):
        into.receive(Kind.PAGES)
    into.close()
    peer.join()
    assert peer.bytes < 1 << 16


def test_a_frame_that_is_taken_byte_by_byte_has_one_deadline(hurry: None) -> None:
    out, _, raw, taking = pair()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer = Dripping(taking)
    with pytest.raises(LinkLost):
        out.send(Kind.STATE, bytes(1 << 20))
    out.close()
    peer.join()
    assert peer.bytes < 1 << 20


HELLO_HEAD = struct.pack("<HHIQII", Kind.HELLO, 0, wire.HELLO_MAX, 0, 0, 0) + bytes(wire.HELLO_MAX)


@pytest.mark.parametrize("place", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("at_once", "dripped"),
    [(b"", address.PREFACE * 1000), (address.PREFACE, HELLO_HEAD), (address.PREFACE + HELLO_HEAD[:30], HELLO_HEAD)],
    ids=["preface", "header", "payload"],
)
def test_a_greeting_that_comes_byte_by_byte_has_one_deadline_and_the_next_is_taken(
    hurry: None, tmp_path: Path, place: str, at_once: bytes, dripped: bytes
) -> None:
    refused: list[str] = []
    where = f"unix:{tmp_path}/s" if place == "unix" else "tcp:127.0.0.1:0"
    with Receiver(where, on_refused=refused.append) as receiver:
        there = receiver.listener.address
        first = socket.socket(socket.AF_UNIX) if place == "unix" else socket.socket()
        first.connect(there.host if place == "unix" else (there.host, there.port))
        first.sendall(at_once)
        peer = Dripping(first, dripped)
        second = connect(there, None)
        channel = Channel(second)
        channel.send_value(Kind.HELLO, {"version": 0})
        with pytest.raises(TimeoutError):
            receiver.receive(2)
        peer.join()
        assert peer.bytes < len(dripped)
        assert len(refused) == 2 and "speaks version 0" in refused[1]
        with pytest.raises(MigrationError, match="speaks version 0"):
            channel.receive(Kind.ACCEPT)
        channel.close()


def test_a_greeting_of_many_values_is_refused_before_any_is_made() -> None:
    _, into, raw, _ = pair()
    items = wire.HELLO_VALUES
    payload = b"\x99" + (items + 1).to_bytes(2, "big") + b"\x80" * (items + 1)
    head = struct.pack("<HHIQ", Kind.HELLO, 0, len(payload), 0)
    raw.sendall(head + struct.pack("<II", wire._crc(wire._crc(0, head), payload), 0) + payload)
    with pytest.raises(MigrationError, match="more values than a record may have"):
        into.receive(Kind.HELLO)


def test_bandwidth_is_kept_to() -> None:
    a, b = socket.socketpair()
    channel = Channel(a, bandwidth=1 << 20)
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: b.recv(1 << 16), b"")])
    reader.start()
    began = time.monotonic()
    for _ in range(8):
        channel.send(Kind.PAGES, bytes(1 << 16))
    assert time.monotonic() - began > 0.4
    channel.close()
    reader.join()


# ---- addresses ----


@pytest.mark.parametrize("text", ["unix:/a/b", "tcp:host:1", "tcp:[::1]:65535", "tcp:127.0.0.1:0"])
def test_an_address_is_read_and_written(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize("text", ["", "unix:", "tcp:host", "tcp:host:x", "tcp:host:65536", "udp:host:1", "/path"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Address.parse(text)


def test_a_descriptor_comes_along_and_the_socket_is_the_users_alone(tmp_path: Path) -> None:
    listener = Listener(Address.parse(f"unix:{tmp_path}/s"), None)
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
    r, w = os.pipe()
    connection = connect(listener.address, None, given=w)
    accepted, fd, _ = listener.accept(5)
    assert fd is not None
    os.write(fd, b"x")
    assert os.read(r, 1) == b"x"
    for end in (r, w, fd):
        os.close(end)
    connection.close()
    accepted.close()
    listener.close()
    assert not (tmp_path / "s").exists()


def test_who_speaks_something_else_is_refused(tmp_path: Path) -> None:
    listener = Listener(Address.parse("tcp:127.0.0.1:0"), None)
    with socket.create_connection((listener.address.host, listener.address.port)) as other:
        other.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(MigrationError, match="not a machine"):
            listener.accept(5)
    with pytest.raises(TimeoutError):
        listener.accept(0.01)
    listener.close()


# ---- the fence ----


@pytest.fixture(params=["path", "descriptor"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Fence, Callable[[], Fence]]]:
    path = str(tmp_path / "fence") if request.param == "path" else None
    source = Fence.make(path)

    def other() -> Fence:
        return Fence.open(path, source.token) if path else Fence.adopt(source.another(), source.token)

    yield source, other
    source.close()


def test_a_machine_that_was_given_is_taken_once(both: tuple[Fence, Callable[[], Fence]]) -> None:
    source, other = both
    there = other()
    assert not there.lock_within(0.05)
    source.give()
    assert there.lock_within(1) and there.take()
    assert there.state == fences.TAKEN and not source.try_lock()
    there.close()
    assert source.try_lock() and not source.take()


def test_a_machine_that_was_kept_is_not_taken(both: tuple[Fence, Callable[[], Fence]]) -> None:
    source, other = both
    there = other()
    source.keep()
    source.close()
    assert there.lock_within(1) and not there.take()
    there.close()


def test_a_dead_source_is_known_by_its_lock(both: tuple[Fence, Callable[[], Fence]]) -> None:
    source, other = both
    there = other()
    assert there.source_lives()
    source.close()  # as the kernel does
    assert not there.source_lives()
    assert there.lock_within(1) and there.take()
    there.close()


def test_a_fence_of_another_migration_is_refused(tmp_path: Path) -> None:
    source = Fence.make(str(tmp_path / "fence"))
    with pytest.raises(MigrationError, match="another migration"):
        Fence.open(str(tmp_path / "fence"), bytes(16))
    with pytest.raises(ConfigError, match="another machine's"):
        Fence.make(str(tmp_path / "fence"))
    with pytest.raises(ConfigError, match="need to see one file"):
        Fence.open(str(tmp_path / "nothing"), bytes(16))
    source.close()
    again: Any = Fence.make(str(tmp_path / "fence"))
    again.close()


def test_a_descriptor_that_is_no_fence_is_refused(tmp_path: Path) -> None:
    """It would be opened anew, with the rights of this process."""
    (tmp_path / "mine").write_bytes(bytes(24))
    for path, flags in (("mine", os.O_RDONLY), ("mine", os.O_WRONLY), ("mine", os.O_PATH), (".", os.O_RDONLY)):
        with pytest.raises(MigrationError, match="no file that it can write"):
            Fence.adopt(os.open(tmp_path / path, flags), bytes(16))
    with pytest.raises(MigrationError, match="no file that it can write"):
        Fence.adopt(os.open("/dev/null", os.O_RDWR), bytes(16))
    assert (tmp_path / "mine").read_bytes() == bytes(24)
