"""Peers that send or take a byte every so often: they have one deadline, as others have, and hold nothing for ever."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from vmm import control
from vmm.control import CLIENTS_MAX, Control, ask
from vmm.deadline import Deadline, receive, send
from vmm.errors import SnapshotError
from vmm.snapshot import fetching, records, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERY = 0.02  # seconds: far less than any deadline here


class Machine:
    """As much of one as a control socket asks for."""

    paused = False
    running = True
    migration = None
    messages: tuple[str, ...] = ()
    config: Any = type("Config", (), {"memory": 1 << 20, "cpus": 1})()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control")


@pytest.fixture
def listening(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    monkeypatch.setattr(control, "REQUEST_SECONDS", 0.3)
    with Control(Machine(), path) as listening:  # type: ignore[arg-type]
        yield listening


def client(path: str) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.connect(path)
    return end


def drip_until_closed(end: socket.socket, most: int) -> int:
    """Send a byte every so often; return after how many the other side has closed."""
    end.settimeout(EVERY)
    for sent in range(most):
        try:
            end.sendall(b" ")
            if not end.recv(1):
                return sent
        except TimeoutError:
            continue
        except OSError:
            return sent
    return most


def test_a_request_that_comes_byte_by_byte_ends_its_client(listening: Control, path: str) -> None:
    with client(path) as end:
        assert drip_until_closed(end, 10_000) < 10_000
    assert ask(path, {"do": "status"})["state"] == "running"


def test_clients_that_say_nothing_give_their_places_to_others(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "IDLE_SECONDS", 0.3)
    with Control(Machine(), path):  # type: ignore[arg-type]
        idle = [client(path) for _ in range(CLIENTS_MAX)]
        assert ask(path, {"do": "status"})["state"] == "running"
        for end in idle:
            end.close()


def test_a_socket_whose_places_are_taken_closes_at_once(path: str) -> None:
    listening = Control(Machine(), path)  # type: ignore[arg-type]
    idle = [client(path) for _ in range(CLIENTS_MAX + 1)]
    for end in idle[:CLIENTS_MAX]:
        end.sendall(b'{"do": "status"}\n')
        assert end.recv(1)
    closing = threading.Thread(target=listening.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    for end in idle:
        end.close()


def test_requests_may_come_together_and_be_cut_anywhere(listening: Control, path: str) -> None:
    request = b'{"do": "status"}\n'
    with client(path) as end, end.makefile("rb") as answers:
        end.sendall(request * 3 + request[:5])
        for _ in range(3):
            assert answers.readline().startswith(b'{"ok"')
        end.sendall(request[5:])
        assert answers.readline().startswith(b'{"ok"')
        end.sendall(b"x" * control.LINE_MAX)
        assert answers.readline().startswith(b'{"error"')
        end.sendall(b"\n" + request[:-1])
        end.shutdown(socket.SHUT_WR)
        assert answers.readline().startswith(b'{"error"') and answers.readline().startswith(b'{"ok"')


def test_a_server_that_sends_its_records_byte_by_byte_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "ANSWERS", 0.3)
    monkeypatch.setattr(fetching, "SLOWEST", 1 << 40)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((1 << 20).to_bytes(8, "little"))
        dripping = threading.Thread(target=drip_until_closed, args=(theirs, 10_000))
        dripping.start()
        with pytest.raises(SnapshotError, match="cannot be read"):
            fetching.receive(ours)
        ours.close()
        dripping.join()


def test_a_server_that_announces_too_much_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((records.SIZE_MAX + 1).to_bytes(8, "little"))
        with pytest.raises(SnapshotError, match="it serves no snapshot"):
            fetching.receive(ours)


def test_a_reader_of_pages_that_takes_them_byte_by_byte_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_READER_SECONDS", 0.3)
    monkeypatch.setattr(serving, "SLOWEST", 1 << 40)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        theirs.sendall(bytes(8 * 64))
        with pytest.raises(TimeoutError):
            serving.answer_requests(ours, lambda gpa: bytes(4096))


def test_a_deadline_that_is_over_is_over() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"abc")
        assert receive(ours, 3, Deadline(None)) == b"abc"
        for over in (Deadline(0), Deadline(-1)):
            with pytest.raises(TimeoutError):
                receive(ours, 1, over)
            with pytest.raises(TimeoutError):
                send(ours, b"a", over)
        theirs.close()
        assert receive(ours, 3, Deadline(60)) == b""
