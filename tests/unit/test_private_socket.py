"""Listening UNIX sockets: a dead one is replaced, all else is refused and left as it is; only the owner connects."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from vmm import control
from vmm.console import host_end
from vmm.devices.virtio import vsock
from vmm.errors import ConfigError
from vmm.migrate.address import Address, Listener
from vmm.net.link import SocketLink
from vmm.observe.gdb import GdbServer
from vmm.private_socket import PATH_MAX, PrivateSocket
from vmm.snapshot import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def _link(path: str) -> SocketLink:
    end = SocketLink(path)
    end.open(0, 1, None)
    return end


class _Machine:
    """As much of a machine as a listener that nobody comes to asks for."""

    debug: Any = type("Debug", (), {})()
    config: Any = type("Config", (), {"kernel": None})()

    def load(self) -> Any:
        return type("Entry", (), {"mode": "long"})()


class _Snapshot:
    layers: tuple[Any, ...] = ()
    regions: tuple[Any, ...] = ()
    state: Any = None


LISTENERS: dict[str, Callable[[str], Any]] = {
    "private": lambda path: PrivateSocket(path, "cannot listen"),
    "console": host_end.Unix,
    "control": lambda path: control.Control(_Machine(), path),  # type: ignore[arg-type]
    "gdb": lambda path: GdbServer(_Machine(), path),  # type: ignore[arg-type]
    "migration": lambda path: Listener(Address.parse(f"unix:{path}"), None),
    "net": _link,
    "serve": lambda path: serving.PageListener(_Snapshot(), path),  # type: ignore[arg-type]
    "vsock": vsock._listen,
}


@pytest.fixture(params=LISTENERS)
def listen(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return LISTENERS[request.param]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A place for a socket in which nothing but it, and a link's lock, may be left."""
    (tmp_path / "there").mkdir()
    yield tmp_path / "there"
    assert {path.name for path in (tmp_path / "there").iterdir()} <= {"s", "s.lock"}


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as end:
        try:
            end.connect(str(path))
        except OSError:
            return False
        return True


def test_a_socket_is_its_owners_alone_and_goes_with_the_listener(listen: Callable[[str], Any], folder: Path) -> None:
    with closing(listen(str(folder / "s"))):
        assert stat.S_IMODE(os.lstat(folder / "s").st_mode) == 0o600
        assert connects(folder / "s")
    assert not (folder / "s").exists()


def test_the_socket_of_a_killed_process_is_replaced(listen: Callable[[str], Any], folder: Path) -> None:
    words = "import socket, sys, os, signal; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); "
    subprocess.run([sys.executable, "-c", words + "os.kill(os.getpid(), signal.SIGKILL)", str(folder / "s")])
    assert stat.S_ISSOCK(os.lstat(folder / "s").st_mode) and not connects(folder / "s")
    with closing(listen(str(folder / "s"))):
        assert connects(folder / "s")


def _file(path: Path) -> None:
    path.write_text("precious")


def _symlink(path: Path) -> None:
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (_file, "a regular file"),
        (lambda path: path.mkdir(), "a directory"),
        (os.mkfifo, "a FIFO"),
        (_symlink, "a symbolic link"),
    ],
    ids=["file", "directory", "FIFO", "link"],
)
def test_what_is_no_socket_is_refused_by_name_and_left(
    listen: Callable[[str], Any], folder: Path, make: Callable[[Path], object], what: str
) -> None:
    make(folder / "s")
    before = os.lstat(folder / "s")
    with pytest.raises(ConfigError, match=f": it is {what}, not a socket, and is left as it is: choose another path"):
        listen(str(folder / "s"))
    assert os.lstat(folder / "s")[:4] == before[:4]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("name", [name for name in LISTENERS if name != "net"])
def test_a_living_socket_is_refused_and_does_not_notice(name: str, folder: Path, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as living:
        living.bind(str(folder / "s"))
        for listening in (False, True):
            if listening and kind != socket.SOCK_DGRAM:
                living.listen()
            before = os.lstat(folder / "s")
            with pytest.raises(ConfigError, match="it is the socket of a program that is running: choose another"):
                LISTENERS[name](str(folder / "s"))
            assert os.lstat(folder / "s")[:4] == before[:4]
        living.setblocking(False)
        with pytest.raises(BlockingIOError):
            living.recv(1) if kind == socket.SOCK_DGRAM else living.accept()


def test_a_link_does_not_take_a_file_for_the_socket_of_a_machine_that_left(folder: Path) -> None:
    with closing(_link(str(folder / "s"))) as end:
        end.close()
        (folder / "s").write_text("precious")
        with pytest.raises(ConfigError, match="a regular file"):
            _link(str(folder / "s"))
    assert (folder / "s").read_text() == "precious"


def test_of_many_that_start_at_once_one_listens(folder: Path) -> None:
    """Each finds the same dead socket; all but one are refused, and the one is reached."""
    path = str(folder / "s")
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        made: list[PrivateSocket] = []
        refused: list[ConfigError] = []
        together = threading.Barrier(8)

        def start(
            made: list[PrivateSocket] = made,
            refused: list[ConfigError] = refused,
            together: threading.Barrier = together,
        ) -> None:
            together.wait()
            try:
                made.append(PrivateSocket(path, "cannot listen"))
            except ConfigError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(made), len(refused)) == (1, 7)
        made[0].socket.setblocking(False)
        assert connects(folder / "s")
        made[0].socket.accept()[0].close()
        made[0].close()


def test_the_umask_of_the_process_is_never_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mask: int) -> int:
        raise AssertionError("the umask belongs to all threads")

    monkeypatch.setattr(os, "umask", refuse)
    with closing(PrivateSocket(str(folder / "s"), "cannot listen")):
        assert stat.S_IMODE(os.lstat(folder / "s").st_mode) == 0o600


def test_the_name_of_another_is_not_removed(folder: Path) -> None:
    with closing(PrivateSocket(str(folder / "s"), "cannot listen")):
        os.unlink(folder / "s")
        (folder / "s").write_text("mine")
    assert (folder / "s").read_text() == "mine"


def test_a_path_that_no_client_could_name_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * (PATH_MAX - len(str(tmp_path)) - 1)))
    PrivateSocket(path, "cannot listen").close()
    with pytest.raises(ConfigError, match="longer than a socket's may be, 107 bytes"):
        PrivateSocket(path + "x", "cannot listen")
    with pytest.raises(ConfigError, match="cannot listen: No such file or directory"):
        PrivateSocket(str(tmp_path / "none" / "s"), "cannot listen")


def test_a_directory_that_another_program_has_locked_is_not_waited_for_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.private_socket.LOCK_SECONDS", 0.0)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="a lock on its directory"):
        PrivateSocket(str(folder / "s"), "cannot listen")
    os.close(fd)
    PrivateSocket(str(folder / "s"), "cannot listen").close()
