"""Copies of disks' files, and how a file that was not copied is known again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.errors import HostError
from vmm.snapshot import disks
from vmm.snapshot.disks import changed_since, copy_disk, identity

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 65536
EXTENT = st.tuples(st.integers(0, 40 * BLOCK), st.integers(1, 3 * BLOCK), st.integers(0, 255))


@pytest.fixture(params=["kernel", "here"])
def copier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies made by the kernel, and by ourselves, where that cannot."""

    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    if request.param == "here":
        monkeypatch.setattr(os, "copy_file_range", refuse)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(EXTENT, max_size=6), st.integers(0, 43 * BLOCK))
def test_a_copy_has_the_bytes_and_the_size_of_its_source(
    tmp_path: Path, copier: None, extents: list[tuple[int, int, int]], size: int
) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    copy.unlink(missing_ok=True)
    with open(source, "wb") as file:
        for at, n, byte in extents:
            file.seek(at)
            file.write(bytes([byte]) * n)
        file.truncate(size)
    copy_disk(str(source), str(copy))
    assert copy.read_bytes() == source.read_bytes()


def test_a_hole_stays_a_hole(tmp_path: Path, copier: None) -> None:
    with open(tmp_path / "source", "wb") as file:
        file.truncate(1 << 30)
        file.seek(512 << 20)
        file.write(b"x")
    copy_disk(str(tmp_path / "source"), str(tmp_path / "copy"))
    found = (tmp_path / "copy").stat()
    assert found.st_size == 1 << 30
    assert found.st_blocks * 512 <= 2 * BLOCK


def test_a_descriptor_is_copied_whatever_its_position_and_flags(tmp_path: Path) -> None:
    content = os.urandom(3 * BLOCK + 512)
    (tmp_path / "source").write_bytes(content)
    fd = os.open(tmp_path / "source", os.O_RDWR | os.O_DIRECT)
    os.unlink(tmp_path / "source")
    os.lseek(fd, 1000, os.SEEK_SET)
    copy_disk(fd, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == content
    assert os.lseek(fd, 0, os.SEEK_CUR) == 1000
    os.close(fd)


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(HostError, match="File exists"):
        copy_disk(str(tmp_path / "source"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == b"old"


def test_a_source_that_is_written_meanwhile_is_refused_and_no_copy_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(b"a" * BLOCK)
    sync = os.fsync

    def fsync(fd: int) -> None:
        sync(fd)
        with open(tmp_path / "source", "r+b") as file:
            file.write(b"b")
        os.utime(tmp_path / "source", ns=(1, 1))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(HostError, match="was written while it was copied"):
        copy_disk(str(tmp_path / "source"), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_full_host_leaves_no_copy(tmp_path: Path, copier: None) -> None:
    import resource
    import signal

    (tmp_path / "source").write_bytes(os.urandom(4 * BLOCK))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BLOCK, before[1]))
    try:
        with pytest.raises(HostError, match="make room, or name another place"):
            copy_disk(str(tmp_path / "source"), str(tmp_path / "copy"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "copy").exists()


def test_blocks_are_shared_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's file system need not be one: a reflink is then what the file system would do."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(BLOCK))
    shared: list[int] = []

    def reflink(of: int, to: int) -> bool:
        shared.append(os.sendfile(to, of, 0, BLOCK))
        return True

    def never(*_: object) -> None:
        raise AssertionError("copied although it is shared")

    monkeypatch.setattr(disks, "_reflink", reflink)
    monkeypatch.setattr(disks, "_copy_range", never)
    copy_disk(str(source), str(copy))
    assert copy.read_bytes() == source.read_bytes() and shared == [BLOCK]


def test_a_file_is_known_again_until_something_happens_to_it(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(b"a" * 4096)
    known = identity(str(path))
    path.read_bytes()
    assert changed_since(str(path), known) == ""
    os.utime(path, ns=(1, known["mtime_ns"] + 1))
    assert changed_since(str(path), known) == "was written since"
    with open(path, "ab") as file:
        file.write(b"b")
    assert changed_since(str(path), known) == "has 4097 bytes and not 4096 as then"
    other = tmp_path / "other"
    other.write_bytes(b"a" * 4096)
    os.replace(other, path)
    assert changed_since(str(path), known) == "was written since"
    path.unlink()
    assert "cannot be opened (No such file" in changed_since(str(path), known)
