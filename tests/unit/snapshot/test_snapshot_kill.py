"""A writer that dies at any moment, or finds the disk full, leaves the old snapshot or the new one whole."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from guest_memory import Memory, content_of

from vmm import snapshot
from vmm.errors import HostError
from vmm.snapshot.replacement import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TRIES = 110  # of each of the two


def killed(act: Callable[[], None], seconds: float) -> bool:
    """Run ``act`` in a child and kill it after so long. Whether it was still at it."""
    started, begin = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(begin, b"!")
            act()
        finally:
            os._exit(0)
    os.read(started, 1)
    os.close(started)
    os.close(begin)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


class Killer:
    """Kills at moments spread over all of an act, however long that takes on a host that is busy now and then."""

    def __init__(self, seed: int, act: Callable[[], None]) -> None:
        self._chance = random.Random(seed)
        start = time.monotonic()
        act()
        self._span = time.monotonic() - start

    def kill(self, act: Callable[[], None]) -> bool:
        """Whether it was still at it: about every other time."""
        still = killed(act, self._chance.uniform(0, self._span))
        self._span *= 1.1 if still else 0.9
        return still


def leftovers(folder: Path) -> int:
    return sum(name.endswith(PARTIAL) for name in os.listdir(folder))


def test_a_writer_killed_at_any_moment_leaves_one_whole_snapshot(tmp_path: Path) -> None:
    contents = []
    memories = [Memory(), Memory()]
    for n, memory in enumerate(memories):
        memory.scatter(n, 256)
        contents.append(memory.content())
    path = tmp_path / "name"

    def write(n: int) -> None:
        snapshot.write(path, n, memories[n].ram).close()

    killer = Killer(1, lambda: write(0))
    seen, during, left = set(), 0, 0
    for n in range(TRIES):
        before = _state(path)
        during += killer.kill(partial(write, 1 - before))
        left += leftovers(tmp_path)
        with snapshot.read(path) as found:
            found.check()
            assert content_of(found) == contents[found.state], f"try {n}"
            seen.add((before, found.state))
    assert during > TRIES // 4, "too few were killed while they wrote"
    assert left, "no writer was killed with its directory half full"
    assert {(0, 0), (0, 1)} <= seen, "both an old and a new snapshot were found afterwards"
    write(0)
    assert os.listdir(tmp_path) == ["name"], "what dead writers leave is removed by the next"
    for memory in memories:
        memory.close()


def _state(path: Path) -> int:
    with snapshot.read(path) as found:
        state: int = found.state
        return state


def test_a_merge_in_place_killed_at_any_moment_leaves_the_chain_or_the_whole(tmp_path: Path) -> None:
    memory = Memory()
    memory.scatter(0, 200)
    with snapshot.write(tmp_path / "base", "base", memory.ram) as base:
        memory.dirty.clear()
        memory.scatter(1, 100)

        def begin() -> None:
            snapshot.write(tmp_path / "top", "top", memory.ram, parent=base, dirty=memory.dirty).close()

        def merge() -> None:
            with snapshot.read(tmp_path / "top") as top:
                snapshot.merge(top, tmp_path / "top").close()

        begin()
        killer = Killer(2, merge)
        begin()
        seen = set()
        for n in range(TRIES):
            killer.kill(merge)
            with snapshot.read(tmp_path / "top") as found:
                found.check()
                assert (found.state, content_of(found)) == ("top", memory.content()), f"try {n}"
                seen.add(found.parent is None)
                merged = found.parent is None
            if merged:
                begin()
    assert seen == {True, False}
    memory.close()


def test_the_directory_of_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    memory = Memory()
    memory.scatter(0, 10)

    def another(folder: str) -> None:
        snapshot.write(tmp_path / "name", "inner", memory.ram).close()
        assert os.path.isdir(folder)

    snapshot.write(tmp_path / "name", "outer", memory.ram, extra_files=another).close()
    assert _named(tmp_path / "name") == "outer"
    assert os.listdir(tmp_path) == ["name"]
    memory.close()


def _named(path: Path) -> str:
    with snapshot.read(path) as found:
        found.check()
        state: str = found.state
        return state


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_snapshot_and_no_rest(small_disk: Path) -> None:
    memory = Memory()
    memory.scatter(0, 300)
    snapshot.write(small_disk / "name", "old", memory.ram).close()
    memory.scatter(1, 350)
    for _ in range(3):
        with pytest.raises(HostError, match=r"No space left on device.*make room or give another place") as caught:
            snapshot.write(small_disk / "name", "new", memory.ram)
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(small_disk) == ["name"]
        assert _named(small_disk / "name") == "old"
    memory.close()
