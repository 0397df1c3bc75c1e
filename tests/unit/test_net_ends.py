"""Host ends of networks without a machine: links, seats at them, passt's command line, refusals that name the fix."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vmm import side_process
from vmm.devices.virtio.net import derive_mac, parse_mac
from vmm.errors import ConfigError, HostError
from vmm.net import end_of, passt
from vmm.net.end import Backoff, Refusal, wait
from vmm.net.link import HELLO, SocketLink, greet, link
from vmm.net.passt import Passt
from vmm.net.tap import Tap
from vmm.parts import Net

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is missing: apt-get install passt")


@pytest.fixture
def stop() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "link")


def opened(path: str) -> SocketLink:
    end = SocketLink(path)
    end.open(0, 1, None)
    return end


def meet(left: SocketLink, right: SocketLink, stop: int) -> tuple[socket.socket, socket.socket]:
    """Connect both, as their devices' threads do."""
    found: list[socket.socket | None] = [None]
    thread = threading.Thread(target=lambda: found.__setitem__(0, left.connect(stop)))
    thread.start()
    there = right.connect(stop)
    thread.join(120)
    assert found[0] is not None and there is not None
    return found[0], there


def assert_connected(left: socket.socket, right: socket.socket) -> None:
    left.sendall(b"over")
    right.settimeout(5)
    assert right.recv(4) == b"over"


def test_the_configuration_names_the_end() -> None:
    assert isinstance(end_of(Net("user")), Passt)
    assert isinstance(end_of(Net.parse("tap=tap7")), Tap)
    assert isinstance(end_of(Net.parse("socket=/tmp/x")), SocketLink)


# ---- links ----


def test_a_link_in_this_process_is_connected_and_has_two_identities() -> None:
    left, right = link()
    assert left.identity() != right.identity()
    a, b = left.connect(-1), right.connect(-1)
    assert a and b
    with a, b:
        assert_connected(a, b)
    assert left.connect(-1) is None  # a peer in this process does not come back


def test_two_that_name_one_path_meet_whoever_is_first(path: str, stop: int) -> None:
    first, second = opened(path), opened(path)
    try:
        for left, right in (meet(first, second, stop), meet(second, first, stop)):
            with left, right:
                assert_connected(left, right)
    finally:
        second.close()
        first.close()
    assert not os.path.exists(path)


@pytest.mark.parametrize("leaver", [0, 1], ids=["the-listener", "who-connected"])
def test_who_remains_meets_who_returns(path: str, stop: int, leaver: int) -> None:
    ends = (opened(path), opened(path))
    sockets = meet(*ends, stop)
    identity = ends[leaver].identity()
    for sock in sockets:
        sock.close()
    ends[leaver].close()
    stayed = ends[1 - leaver]
    if leaver == 0:  # the other one notices, and listens in its place
        thread = threading.Thread(target=lambda: back.append(stayed.connect(stop)))
        back: list[socket.socket | None] = []
        thread.start()
        while not os.path.exists(path):
            time.sleep(0.01)
        returned = opened(path)
        here = returned.connect(stop)
        thread.join(120)
        there = back[0]
    else:
        returned = opened(path)
        there, here = meet(stayed, returned, stop)
    assert returned.identity() == identity  # and so its MAC address is what it was
    assert here is not None and there is not None
    with here, there:
        assert_connected(here, there)
    returned.close()
    stayed.close()


def test_a_third_machine_waits_until_one_leaves(path: str, stop: int) -> None:
    first, second, third = opened(path), opened(path), opened(path)
    assert len({end.identity() for end in (first, second, third)}) == 3
    a, b = meet(first, second, stop)
    found: list[socket.socket | None] = []
    thread = threading.Thread(target=lambda: found.append(third.connect(stop)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    a.close()
    b.close()
    second.close()
    again = first.connect(stop)
    thread.join(120)
    assert again is not None and found[0] is not None
    with again, found[0]:
        assert_connected(again, found[0])
    third.close()
    first.close()


def test_a_machine_that_was_killed_leaves_nothing_that_stands_in_the_way(path: str, stop: int) -> None:
    script = f"from vmm.net.link import SocketLink; e = SocketLink({path!r}); e.open(0, 1, None); print(); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert os.path.exists(path)
    left, right = opened(path), opened(path)
    for sock in meet(left, right, stop):
        sock.close()
    right.close()
    left.close()


def test_who_says_no_hello_is_hung_up_on_and_the_next_one_is_served(path: str, stop: int) -> None:
    end = opened(path)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(path)
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        other = opened(path)
        here, there = meet(end, other, stop)
        with here, there:
            assert_connected(here, there)
    other.close()
    end.close()


def test_connecting_to_what_is_no_machine_is_refused(path: str, stop: int) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        end = opened(path)
        stranger, _ = server.accept()
        stranger.sendall(b"220 mail.example\r\n\r\n")
        with stranger, pytest.raises(Refusal, match="is not a machine of this version"):
            end.connect(stop)
        end.close()


def test_waiting_for_a_peer_ends_when_the_device_does(path: str, stop: int) -> None:
    end = opened(path)
    os.eventfd_write(stop, 1)
    assert end.connect(stop) is None
    end.close()


def test_a_link_where_one_may_not_write_names_the_path() -> None:
    with pytest.raises(HostError, match=r"link /proc/nowhere/link: .*: give a path in a directory you may write"):
        SocketLink("/proc/nowhere/link").open(0, 1, None)


def test_a_silent_client_is_given_up_after_its_time(stop: int) -> None:
    left, right = socket.socketpair()
    with left, right:
        right.sendall(HELLO[:7])
        assert greet(left, stop, 0.05) == HELLO[:7]


# ---- addresses ----


def test_a_derived_address_is_local_unicast_and_the_same_next_time() -> None:
    addresses = {derive_mac(f"socket /x {seat} {index}") for seat in range(1, 65) for index in range(8)}
    assert len(addresses) == 64 * 8
    assert all(address[0] & 3 == 2 for address in addresses)
    assert derive_mac("user 0").hex(":") == "5a:8a:33:9d:6d:2f"


@pytest.mark.parametrize("text", ["", "52:54:00:12:34", "52:54:00:12:34:5", "52:54:00:12:34:zz", "1:2:3:4:5:6:7"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a MAC address: write 52:54:00:12:34:56"):
        parse_mac(text)


def test_a_multicast_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="multicast"):
        parse_mac("01:00:5e:00:00:01")


# ---- tap ----


@pytest.mark.parametrize("name", ["", "a name", "a/b", "sixteen-bytes-xx"])
def test_a_name_no_interface_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="names no interface"):
        Tap(name)


@pytest.mark.parametrize(
    ("error", "queues", "fix"),
    [
        (errno.EPERM, 1, r"as root, ip tuntap add dev tap7 mode tap user \$USER$"),
        (errno.EPERM, 2, r"as root, ip tuntap add dev tap7 mode tap user \$USER multi_queue$"),
        (errno.EBUSY, 1, "a tap of its own"),
        (errno.EINVAL, 2, "no tap with several queues: as root, ip tuntap .* multi_queue$"),
    ],
)
def test_a_tap_that_cannot_be_had_names_the_fix(
    monkeypatch: pytest.MonkeyPatch, error: int, queues: int, fix: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    monkeypatch.setattr(os, "open", lambda *_: os.dup(2))
    with pytest.raises(HostError, match=f"^tap tap7: .*{fix}"):
        Tap("tap7").open(0, queues, None)


# ---- passt ----


def test_forwarded_ports_are_what_was_asked_for_and_no_other() -> None:
    words = Passt(("tcp::8080-:80", "tcp:127.0.0.1:2222-:22")).command()
    given = list(itertools.pairwise(words))
    assert ("--tcp-ports", "8080:80") in given
    assert ("--tcp-ports", "127.0.0.1/2222:22") in given
    assert ("--udp-ports", "none") in given  # passt would forward UDP 8080 and 2222 too
    nothing = Passt().command()
    assert list(itertools.pairwise(nothing)).count(("--tcp-ports", "none")) == 1


def test_a_port_that_is_taken_is_a_refusal_and_not_a_forward_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"hostfwd of tcp 127.0.0.1:{port}: .* choose another host port"):
            Passt((f"tcp:127.0.0.1:{port}-:80",)).open(0, 1, None)


def test_without_passt_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "COMMAND", "passt-that-nobody-has")
    with pytest.raises(HostError, match="apt-get install passt"):
        Passt().open(0, 1, None)


def test_what_passt_says_is_told_apart_from_its_noise() -> None:
    assert passt.reason("Failed to send 9 bytes to syslog\nDon't run as root. Changing to nobody...\nBad thing\n") == (
        "Bad thing"
    )
    assert "default route" in passt.reason("No external routable interface for IPv4\nExternal interface not usable\n")


ARP = bytes.fromhex("ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 0a00020f 000000000000 0a000202")


@needs_passt
def test_passt_answers_for_the_gateway_and_another_one_after_it_was_lost(stop: int) -> None:
    end = Passt()
    try:
        end.open(0, 1, None)
    except HostError as error:
        pytest.skip(f"no passt here: {error}")
    for _ in range(2):
        there = end.connect(stop)
        assert there is not None
        with there:
            there.settimeout(10)
            there.sendall(len(ARP).to_bytes(4, "big") + ARP)
            while True:
                size = int.from_bytes(there.recv(4, socket.MSG_WAITALL), "big")
                frame = there.recv(size, socket.MSG_WAITALL)
                if frame[12:14] == b"\x08\x06":
                    break
            assert frame[20:22] == b"\0\2" and frame[28:32] == bytes([10, 0, 2, 2])


@needs_passt
@pytest.mark.parametrize("taken", [False, True], ids=["nobody-connected", "connected"])
def test_forwarded_ports_are_free_once_the_end_is_closed(stop: int, taken: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(5):
        end = Passt([f"tcp:127.0.0.1:{port}-:80", f"udp:127.0.0.1:{port}-:80"])
        try:
            end.open(0, 1, None)  # refuses a port that is taken
        except HostError as error:
            pytest.skip(f"no passt here: {error}")
        if taken:
            there = end.connect(stop)
            assert there is not None
            with there, pytest.raises(ConfigError, match="choose another host port"):
                Passt([f"tcp:127.0.0.1:{port}-:80"]).open(0, 1, None)
        end.close()
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as again:
                again.bind(("127.0.0.1", port))


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_process, "PATIENCE", 0.01)
    with subprocess.Popen(["sleep", "1000"]) as process:
        side_process.await_end(os.pidfd_open(process.pid))
        assert process.wait(120) == -signal.SIGKILL


# ---- trying again ----


def test_tries_come_further_apart_until_a_connection_lasts() -> None:
    backoff = Backoff()
    now = 1000.0
    waits = []
    for _ in range(10):
        backoff.begin(now)
        waits.append(backoff.lost(now + 1))
    assert waits[:5] == [0, 0.1, 0.2, 0.4, 0.8]
    assert waits[-1] == 10
    backoff.begin(now)
    assert backoff.lost(now + 60) == 0


def test_waiting_tells_what_came_from_the_end_and_from_nothing(stop: int) -> None:
    left, right = socket.socketpair()
    with left, right:
        assert wait(left.fileno(), stop, 0) is False
        right.send(b"x")
        assert wait(left.fileno(), stop) is True
        os.eventfd_write(stop, 1)
        assert wait(left.fileno(), stop) is None
