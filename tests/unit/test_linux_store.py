"""The cache of long-made things: whole or absent, and one maker at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vmm.errors import HostError
from vmm.linux import store


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("PYVMM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert store.root() == Path("/h/.cache/pyvmm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert store.root() == Path("/x/pyvmm")
    monkeypatch.setenv("PYVMM_CACHE", "/p")
    assert store.root() == Path("/p")


def test_an_item_is_made_once(tmp_path: Path) -> None:
    calls = []

    def make(place: Path) -> None:
        calls.append(place)
        (place / "x").write_text("1")

    for _ in range(2):
        assert (store.made(tmp_path / "a/item", make) / "x").read_text() == "1"
    assert len(calls) == 1
    assert calls[0] != tmp_path / "a/item"


def test_a_maker_that_fails_leaves_nothing_and_may_be_followed(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.made(tmp_path / "item", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["item.lock"]
    assert store.made(tmp_path / "item", lambda place: None).is_dir()


def test_what_a_killed_maker_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "item.999999.tmp"
    left.mkdir()
    (left / "half").write_text("")
    store.made(tmp_path / "item", lambda place: None)
    assert not left.exists()


def test_makers_wait_for_each_other_and_the_second_finds_it_made(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from vmm.linux import store

        def make(place):
            print("making", flush=True)
            sys.stdin.readline()
            (place / "by").write_text("the first")

        store.made(Path(sys.argv[1]), make)
        """
    )
    item = tmp_path / "item"
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script, str(item)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "making\n"

        def progress(stage: str, done: int, total: int | None) -> None:
            # Only told once the lock was found held: now let the first one finish.
            assert "waiting" in stage
            assert first.stdin is not None
            first.stdin.write("\n")
            first.stdin.flush()

        def never(place: Path) -> None:
            raise AssertionError("made twice")

        assert (store.made(item, never, progress) / "by").read_text() == "the first"
    assert first.returncode == 0


def test_a_cache_that_cannot_be_written_is_said_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="set PYVMM_CACHE"):
        store.made(tmp_path / "file/below", lambda place: None)
