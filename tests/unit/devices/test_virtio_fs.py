"""Shares without a machine: what is refused, and this host's virtiofsd started as an ordinary user starts it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from users import ordinary_user

from vmm.devices.virtio import fs
from vmm.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

GET_FEATURES, VERSION, REPLY = 1, 1, 4


# ---- what is asked for ----


@settings(max_examples=examples(100), deadline=None)
@given(st.text(max_size=40))
def test_a_tag_is_1_to_36_bytes_without_a_nul(tag: str) -> None:
    if 1 <= len(tag.encode()) <= 36 and "\0" not in tag:
        assert fs.checked_tag(tag) == tag
    else:
        with pytest.raises(ConfigError, match="give 1 to 36 bytes"):
            fs.checked_tag(tag)


def test_what_is_no_directory_cannot_be_shared(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="not a directory"):
            fs.checked_directory(path, readonly=True)


def test_a_directory_the_user_may_not_write_can_be_shared_read_only(share: Path) -> None:
    share.chmod(0o555)
    with ordinary_user():
        assert fs.checked_directory(share, readonly=True) == str(share)
        with pytest.raises(ConfigError, match="or share it read-only"):
            fs.checked_directory(share, readonly=False)


def test_a_symbolic_link_is_shared_as_what_it_points_to_when_the_machine_is_made(share: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(share)
    assert fs.checked_directory(link, readonly=False) == str(share)


def test_a_host_without_virtiofsd_is_told_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fs.SERVER_VARIABLE, raising=False)
    with pytest.raises(HostError, match=r"install the package virtiofsd \(Debian 12: qemu-system-common\)"):
        fs.find_server(places=("/nowhere/virtiofsd",))


def test_the_variable_chooses_the_server_or_says_that_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fs.SERVER_VARIABLE, "/bin/sh")
    assert fs.find_server() == "/bin/sh"
    monkeypatch.setenv(fs.SERVER_VARIABLE, "/nowhere/virtiofsd")
    with pytest.raises(HostError, match="cannot be run"):
        fs.find_server()


# ---- the server ----


@pytest.fixture
def share() -> Iterator[Path]:
    """A directory anybody can reach, which an ordinary user owns; its name is as awkward as names can be."""
    place = Path(tempfile.mkdtemp(prefix="vmm-share-"))
    place.chmod(0o755)
    directory = place / "a,b=\\c d"
    directory.mkdir()
    with ordinary_user() as user:
        pass
    os.chown(directory, user, -1)
    yield directory
    shutil.rmtree(place)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> str:
    """The host's virtiofsd; skipped by name where there is none."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)  # it is not the ordinary user's
    try:
        return fs.find_server()
    except HostError as error:
        pytest.skip(str(error))


def ended(server: int, seconds: float) -> bool:
    """Whether the process behind a pidfd ends within that time."""
    return bool(select.select([server], [], [], seconds)[0])


def features(connection: socket.socket) -> int:
    """Ask the back end what it can do: it has finished its start when it answers."""
    connection.settimeout(20)
    connection.sendall(struct.pack("=III", GET_FEATURES, VERSION, 0))
    with connection.makefile("rb") as answers:  # it may come in pieces
        request, flags, size, value = struct.unpack("=IIIQ", answers.read(20))
    assert (request, flags, size) == (GET_FEATURES, VERSION | REPLY, 8)
    return int(value)


@pytest.mark.parametrize("readonly", [False, True])
def test_an_ordinary_user_gets_a_server_that_is_shut_in_and_ends_with_its_socket(
    server: str, share: Path, readonly: bool
) -> None:
    with ordinary_user() as user:
        connection_fd, pidfd, log = fs._start_server(server, str(share), readonly)
    try:
        with socket.socket(fileno=connection_fd) as connection:
            assert features(connection) >> 32 & 1, "VIRTIO_F_VERSION_1"
            confined = [status for status in statuses(pidfd) if status["Seccomp"] == "2"]
            assert confined, "no process of the server runs under seccomp"
            for status in confined:
                assert status["Uid"].split()[0] == str(user)
                assert not int(status["CapEff"], 16) >> 21 & 1, "CAP_SYS_ADMIN"
                assert not int(status["CapEff"], 16) >> 27 & 1, "CAP_MKNOD"
        assert ended(pidfd, 20)
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        os.close(log)


def statuses(pidfd: int) -> list[dict[str, str]]:
    """/proc/PID/status of the process behind a pidfd and of all below it."""
    first = Path(f"/proc/self/fdinfo/{pidfd}").read_text().split("Pid:")[1].split()[0]
    found, wanted = [], [first]
    while wanted:
        process = wanted.pop()
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        found.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
        for task in Path(f"/proc/{process}/task").iterdir():
            wanted += (task / "children").read_text().split()
    return found


def test_the_server_dies_with_a_monitor_that_is_killed(server: str, share: Path) -> None:
    program = """
        import os, sys, time
        from vmm.devices.virtio import fs
        _, pidfd, _ = fs._start_server(sys.argv[1], sys.argv[2], False)
        print(open(f"/proc/self/fdinfo/{pidfd}").read().split("Pid:")[1].split()[0], flush=True)
        time.sleep(100)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), server, str(share)], stdout=subprocess.PIPE, text=True
    ) as monitor:
        assert monitor.stdout is not None
        pidfd = os.pidfd_open(int(monitor.stdout.readline()))
        time.sleep(0.2)  # some way into its start, or past it
        assert not ended(pidfd, 0)
        monitor.kill()
    assert ended(pidfd, 20)
    os.close(pidfd)


def test_a_directory_that_went_away_is_an_error_in_words(server: str, share: Path) -> None:
    with ordinary_user(), pytest.raises(HostError, match="could not be mounted for the file server"):
        fs._start_server(server, str(share / "gone"), False)


def test_a_host_without_user_namespaces_is_told_how_to_allow_them() -> None:
    import errno

    with pytest.raises(HostError, match=r"max_user_namespaces.*or run as root"):
        fs._refused(-errno.ENOSPC)
