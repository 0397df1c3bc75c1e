"""virtio-fs through registers and rings, with the host's virtiofsd: a guest that speaks FUSE and knows no rules.

The messages are those of Linux, include/uapi/linux/fuse.h. No guest code runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from effort import PATIENCE, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from users import ordinary_user

from vmm import Machine
from vmm.devices.virtio.fs import Fs, find_server
from vmm.errors import ConfigError, HostError
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Iterator

HIGH_PRIORITY, REQUESTS = 0, 1
LOOKUP, READLINK, MKNOD, MKDIR, UNLINK, OPEN, READ, WRITE, INIT, CREATE = 1, 5, 8, 9, 10, 14, 15, 16, 26, 35
ROOT = 1
SECRET = "the host's own\n"


class Guest:
    """A machine with one share, and a FUSE client on the rings of its device."""

    def __init__(self, directory: Path, *, readonly: bool = False, transport: str = "pci") -> None:
        self.machine = Machine(memory="32M", virtio=transport, rng=False)
        try:
            with ordinary_user():
                self.fs = Fs(self.machine.native, 0, directory, "work", readonly=readonly)
            self.machine.add(self.fs)
            self.driver = VirtioDriver.of(self.machine, self.fs)
        except BaseException:
            self.machine.close()
            raise
        self.unique = 0

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def start(self) -> None:
        self.driver.start(packed=True)
        self.ask(INIT, 0, struct.pack("<IIII", 7, 31, 1 << 17, 0))

    def ask(self, opcode: int, node: int, *parts: bytes, room: int = 4096) -> bytes:
        """One request; its answer's payload. OSError: what the server said."""
        self.unique += 1
        size = 40 + sum(map(len, parts))
        header = struct.pack("<IIQQIIII", size, opcode, self.unique, node, 0, 0, 1, 0)
        answer = self.driver.request(REQUESTS, [header, *parts], [16, room], timeout=PATIENCE)
        length, error, unique = struct.unpack("<IiQ", answer.pieces[0])
        assert unique == self.unique
        assert length == answer.written
        if error:
            raise OSError(-error, os.strerror(-error))
        return answer.pieces[1][: length - 16]

    def refused(self, *words: object) -> int:
        """The error number of a request that must fail."""
        with pytest.raises(OSError) as refused:
            self.ask(*words)  # type: ignore[arg-type]
        assert refused.value.errno is not None
        return refused.value.errno

    def look_up(self, name: str, node: int = ROOT) -> tuple[int, int]:
        """The node and the mode behind a name."""
        entry = self.ask(LOOKUP, node, name.encode() + b"\0")
        return struct.unpack_from("<Q", entry)[0], struct.unpack_from("<I", entry, 100)[0]

    def read(self, node: int, size: int = 4096) -> bytes:
        (handle,) = struct.unpack_from("<Q", self.ask(OPEN, node, struct.pack("<II", os.O_RDONLY, 0)))
        return self.ask(READ, node, struct.pack("<QQIIQII", handle, 0, size, 0, 0, 0, 0), room=size)

    def create(self, name: str, data: bytes) -> None:
        wanted = struct.pack("<IIII", os.O_WRONLY | os.O_CREAT, 0o644, 0, 0)
        made = self.ask(CREATE, ROOT, wanted, name.encode() + b"\0")
        node, handle = struct.unpack_from("<Q", made)[0], struct.unpack_from("<Q", made, 128)[0]
        head = struct.pack("<QQIIQII", handle, 0, len(data), 0, 0, 0, 0)
        assert struct.unpack_from("<I", self.ask(WRITE, node, head, data))[0] == len(data)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An ordinary user's directory to share, beside a secret; skipped by name without virtiofsd."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)  # it is not the ordinary user's
    try:
        find_server()
    except HostError as error:
        pytest.skip(str(error))
    place = Path(tempfile.mkdtemp(prefix="vmm-share-"))
    with ordinary_user() as user:
        pass
    os.chown(place, user, -1)
    place.chmod(0o755)
    with ordinary_user():
        (place / "secret").write_text(SECRET)
        (place / "work").mkdir()
        (place / "work" / "hello").write_text("from the host\n")
    yield place / "work"
    shutil.rmtree(place)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_files_go_both_ways(work: Path, transport: str) -> None:
    with Guest(work, transport=transport) as guest:
        guest.start()
        node, mode = guest.look_up("hello")
        assert stat.S_ISREG(mode)
        assert guest.read(node) == b"from the host\n"
        guest.create("answer", b"from the guest\n")
        assert (work / "answer").read_bytes() == b"from the guest\n"
        assert (work / "answer").stat().st_uid == work.stat().st_uid
        assert guest.driver.transport.config(0, 40) == b"work".ljust(36, b"\0") + struct.pack("<I", 1)
        guest.driver.wait_interrupt()


def test_a_new_driver_begins_anew(work: Path) -> None:
    with Guest(work) as guest:
        for _ in range(3):
            guest.start()
            assert guest.read(guest.look_up("hello")[0]) == b"from the host\n"
        assert guest.machine.messages == []


def test_no_name_leads_out_of_the_directory(work: Path) -> None:
    (work / "outside").symlink_to(work.parent / "secret")
    (work / "above").symlink_to("..")
    with Guest(work) as guest:
        guest.start()
        for name in ("../secret", "/etc/passwd", "hello/../../secret", "above/secret", str(work.parent / "secret")):
            assert guest.refused(LOOKUP, ROOT, name.encode() + b"\0") in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR), (
                name
            )
        try:  # ".." of the root is the root, or an error
            node, _ = guest.look_up("..")
        except OSError:
            node = ROOT
        assert guest.refused(LOOKUP, node, b"secret\0") == errno.ENOENT
        for name in ("outside", "above"):
            link, mode = guest.look_up(name)
            assert stat.S_ISLNK(mode)
            assert guest.refused(OPEN, link, struct.pack("<II", os.O_RDONLY, 0)) in (errno.EBADF, errno.ELOOP)
            assert guest.refused(LOOKUP, link, b"secret\0") in (errno.ENOTDIR, errno.ELOOP)
            assert guest.refused(CREATE, link, struct.pack("<IIII", 1, 0o644, 0, 0), b"new\0")
        assert guest.ask(READLINK, guest.look_up("outside")[0]) == os.fsencode(work.parent / "secret")
    assert sorted(path.name for path in work.parent.iterdir()) == ["secret", "work"]


def test_a_fifo_does_not_hold_the_server(work: Path) -> None:
    os.mkfifo(work / "pipe")
    with Guest(work) as guest:
        guest.start()
        node, mode = guest.look_up("pipe")
        assert stat.S_ISFIFO(mode)
        assert guest.refused(OPEN, node, struct.pack("<II", os.O_RDONLY, 0))
        assert guest.read(guest.look_up("hello")[0]) == b"from the host\n"


@pytest.mark.parametrize("kind", [stat.S_IFBLK, stat.S_IFCHR])
def test_device_nodes_are_refused(work: Path, kind: int) -> None:
    with Guest(work) as guest:
        guest.start()
        assert guest.refused(MKNOD, ROOT, struct.pack("<IIII", kind | 0o666, 0x105, 0, 0), b"node\0") == errno.EPERM
    assert not (work / "node").exists()


def test_nothing_in_a_read_only_share_changes(work: Path) -> None:
    with Guest(work, readonly=True) as guest:
        guest.start()
        node, _ = guest.look_up("hello")
        assert guest.read(node) == b"from the host\n"
        create = struct.pack("<IIII", os.O_WRONLY | os.O_CREAT, 0o644, 0, 0)
        assert guest.refused(CREATE, ROOT, create, b"new\0") == errno.EROFS
        assert guest.refused(MKDIR, ROOT, struct.pack("<II", 0o755, 0), b"new\0") == errno.EROFS
        assert guest.refused(UNLINK, ROOT, b"hello\0") == errno.EROFS
        assert guest.refused(OPEN, node, struct.pack("<II", os.O_RDWR, 0)) == errno.EROFS
    assert [path.name for path in work.iterdir()] == ["hello"]


def test_nodes_and_handles_that_do_not_exist_are_errors(work: Path) -> None:
    with Guest(work) as guest:
        guest.start()
        for number in (2**64 - 1, 0, 12345):
            assert guest.refused(LOOKUP, number, b"hello\0")
            assert guest.refused(READ, ROOT, struct.pack("<QQIIQII", number, 0, 16, 0, 0, 0, 0))
        assert guest.look_up("hello")


@settings(max_examples=examples(10), deadline=None)
@given(
    queue=st.sampled_from([HIGH_PRIORITY, REQUESTS]),
    data=st.lists(st.binary(min_size=1, max_size=200), max_size=4),
    room=st.lists(st.integers(1, 5000), max_size=3),
)
def test_requests_of_any_bytes_cost_a_guest_no_more_than_its_share(
    queue: int, data: list[bytes], room: list[int]
) -> None:
    if not data and not room:
        data = [b"\0"]
    with tempfile.TemporaryDirectory(prefix="vmm-share-") as place:
        Path(place, "hello").touch()
        os.chmod(place, 0o777)
        try:
            guest = Guest(Path(place))
        except HostError as error:
            pytest.skip(str(error))
        with guest:
            guest.start()
            guest.driver.submit(queue, data, room)
            guest.driver.kick(queue, always=True)
            with contextlib.suppress(TimeoutError, RuntimeError):  # no answer to give, or the server chose to end
                guest.driver.wait(queue, timeout=0.2)
            if not guest.driver.broken:
                with contextlib.suppress(RuntimeError):  # that it chose to end may be seen only now
                    guest.start()
                    assert guest.look_up("hello")
                    assert guest.machine.messages == []
                    return
            deadline = time.monotonic() + PATIENCE
            while not guest.machine.messages and time.monotonic() < deadline:
                time.sleep(0.01)
            assert guest.driver.broken
            assert "the file server of share 'work' has ended" in guest.machine.messages[0]


def server_of(guest: Guest) -> int:
    """The process id of a guest's file server: a child of ours that names the directory."""
    name = b"=" + os.fsencode(guest.fs.directory)
    children = [
        child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]
    words = {child: Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children}
    (server,) = (child for child in children if any(word.endswith(name) for word in words[child]))
    return int(server)


def test_a_server_that_dies_breaks_its_device_with_one_message_and_no_other(work: Path) -> None:
    other = work.parent / "other"
    other.mkdir()
    with Guest(work) as guest:
        second = Fs(guest.machine.native, 1, other, "other")
        guest.machine.add(second)
        memory, size = guest.machine.memory.regions[0]
        beside = VirtioDriver.of(guest.machine, second, arena=(memory + size // 4, memory + size // 2))
        beside.start()
        guest.start()
        os.kill(server_of(guest), signal.SIGKILL)
        guest.driver.wait_interrupt(2, timeout=20)
        assert guest.driver.broken
        assert not beside.broken
        (said,) = guest.machine.messages
        assert said.startswith("virtio-fs0 needs a reset by its driver: the file server of share 'work' has ended")
        with pytest.raises(RuntimeError, match="needs a reset"):  # it does not come back for a new driver
            guest.start()


def test_a_server_that_hangs_delays_a_reset_once_and_is_killed(work: Path) -> None:
    with Guest(work) as guest:
        guest.start()
        outer = server_of(guest)
        processes = [outer, *(int(child) for child in Path(f"/proc/{outer}/task/{outer}/children").read_text().split())]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        began = time.monotonic()
        guest.driver.reset()
        assert 4 < time.monotonic() - began < 9
        (said,) = guest.machine.messages
        assert "the file server of share 'work' does not answer" in said
        for process in processes:
            assert not Path(f"/proc/{process}").exists()


def test_what_cannot_be_shared_is_refused_before_a_machine_runs(work: Path) -> None:
    with Machine(memory="16M", rng=False) as machine:
        with pytest.raises(ConfigError, match="not a directory"):
            Fs(machine.native, 0, work / "nowhere", "work")
        with pytest.raises(ConfigError, match="1 to 36 bytes"):
            Fs(machine.native, 0, work, "")


def test_guest_memory_cannot_be_cut_short_by_who_was_given_it() -> None:
    with Machine(memory="16M", rng=False) as machine:
        for memfd in machine.memory.memfds:
            for size in (0, 1 << 40):
                with pytest.raises(PermissionError):
                    os.ftruncate(memfd, size)
