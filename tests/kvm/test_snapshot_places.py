"""Snapshots of somebody else's, edited by hand: nothing outside their directory is opened, made, or removed."""

from __future__ import annotations

import copy
import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from vmm import Machine
from vmm.errors import ConfigError, SnapshotError
from vmm.snapshot import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EXIT = bytes.fromhex("b010e6f4")  # mov al, 16; out 0xf4, al
SIZE = 1 << 20


class Evil:
    """A snapshot of a machine with a device of each kind, and a victim's files, which stay as they are."""

    def __init__(self, folder: Path, flat: Callable[..., Machine]) -> None:
        self.path = folder / "snapshot"
        self.file = self.path / "snapshot.pyvmm"
        (folder / "attacker").mkdir()
        (folder / "attacker" / "disk.img").write_bytes(bytes(SIZE))
        self.victim = folder / "victim"
        self.victim.mkdir()
        self.precious = self.victim / "precious.dat"
        self.precious.write_bytes(b"precious" + bytes(SIZE - 8))
        machine = flat(
            EXIT,
            rng=False,
            disks=[f"{folder}/attacker/disk.img"],
            nets=[f"socket={folder}/attacker/link"],
            vsock=f"{folder}/attacker/vsock",
        )
        machine.snapshot(self.path).close()
        machine.close()
        self.file.chmod(0o600)
        self.path.chmod(0o700)
        self.good, _ = records.unpack("", self.file.read_bytes())
        self._then = self._now()

    def _now(self) -> dict[str, Any]:
        return {path.name: (path.stat(follow_symlinks=False), path.read_bytes()) for path in self.victim.iterdir()}

    def write(self, edit: Callable[[dict[str, Any]], object]) -> None:
        content = copy.deepcopy(self.good)
        edit(content["state"])
        self.file.write_bytes(records.pack(content))

    def as_it_was(self) -> bool:
        now = self._now()
        return now.keys() == self._then.keys() and all(
            now[name][1] == data and now[name][0][:7] == status[:7] and now[name][0].st_mtime_ns == status.st_mtime_ns
            for name, (status, data) in self._then.items()
        )


@pytest.fixture
def evil(tmp_path: Path, flat: Callable[..., Machine]) -> Iterator[Evil]:
    made = Evil(tmp_path, flat)
    yield made
    assert made.as_it_was()


def _with_files(state: dict[str, Any], files: list[dict[str, Any]], version: int) -> None:
    state["disks"][0].update(files=files, version=version)


def given(evil: Evil, folder: Path) -> dict[str, Any]:
    return {"nets": [f"socket={folder}/mine"], "vsock": f"{folder}/v"}


def old(state: dict[str, Any], evil: Evil) -> dict[str, Any]:
    """The description as version 1 had it, naming the victim's file wherever something was named."""
    described = state["description"]
    path = str(evil.precious)
    places = {"path": path, "overlay": path, "layers": [path], "temporary": False}
    disks = [{**disk, **places} for disk in described["disks"]]
    nets = [{**net, "socket": path, "tap": path, "hostfwd": []} for net in described["nets"]]
    config = {
        **described["config"], "kernel": path, "initrd": [path], "huge_pages": False, "shares": [], "disks": disks,
        "nets": nets, "vsock": {**described["vsock"], "path": path},
    }  # fmt: skip
    rest = {name: described[name] for name in ("kind", "merge_ticks", "command_line", "mode", "cpuid")}
    state["description"] = {"version": 1, "config": config, "symbols": path, **rest}
    return state


def test_disks_without_records_are_not_opened_by_what_the_description_says(evil: Evil, tmp_path: Path) -> None:
    def edit(state: dict[str, Any]) -> None:
        old(state, evil)
        state["disks"] = []

    evil.write(edit)
    for more in ({}, given(evil, tmp_path)):
        with pytest.raises(SnapshotError, match="a record for each of its machine's disks"):
            Machine.restore(evil.path, check=False, **more)


def test_the_places_in_a_snapshot_of_version_1_are_not_looked_at(evil: Evil, tmp_path: Path) -> None:
    def edit(state: dict[str, Any]) -> None:
        old(state, evil)
        state["disks"] = [{**state["disks"][0], "version": 1, "files": [{"file": "disk0-0.img"}]}]

    evil.write(edit)
    with pytest.raises(
        ConfigError, match="net 0 is a link to another machine, and its record says no place: give --net"
    ):
        Machine.restore(evil.path)
    with Machine.restore(evil.path, **given(evil, tmp_path)) as machine:
        assert [disk.path for disk in machine.config.disks] == [str(evil.path / "disk0-0.img")]
        assert machine.config.kernel is None and machine.config.initrd == () and machine.config.symbols is None
        assert not machine.symbols
        assert machine.run(timeout=120).code == 0x10


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ((), "symbols"),
        (("config",), "kernel"),
        (("config",), "control"),
        (("disks", 0), "path"),
        (("disks", 0), "overlay"),
        (("nets", 0), "socket"),
        (("nets", 0), "tap"),
        (("vsock",), "path"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_a_place_in_a_snapshot_is_refused(evil: Evil, tmp_path: Path, where: tuple[Any, ...], name: str) -> None:
    def edit(state: dict[str, Any]) -> None:
        at = state["description"]
        for step in where:
            at = at[step]
        at[name] = str(evil.precious)

    evil.write(edit)
    with pytest.raises(SnapshotError, match="describes no machine"):
        Machine.restore(evil.path, **given(evil, tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        [{"path": "PRECIOUS", "size": SIZE, "mtime_ns": 0}],
        [{"held": 0, "path": "PRECIOUS", "size": SIZE, "mtime_ns": 0}],
        [{"file": "../victim/precious.dat"}],
        [{"held": 0, "size": SIZE, "mtime_ns": 0}],
    ],
    ids=["path", "held path", "file", "no place"],
)
def test_a_record_of_a_disk_names_no_file(evil: Evil, tmp_path: Path, files: list[dict[str, Any]]) -> None:
    for file in files:
        if "path" in file:
            file["path"] = str(evil.precious)
    for version in (1, 2):
        evil.write(partial(_with_files, files=files, version=version))
        with pytest.raises(ConfigError):
            Machine.restore(evil.path, check=False, **given(evil, tmp_path))


@pytest.mark.parametrize("level", ["disk0-0.img", "memory", "snapshot.pyvmm", "working-set"])
def test_a_link_in_the_directory_is_not_followed(evil: Evil, tmp_path: Path, level: str) -> None:
    (evil.path / level).unlink(missing_ok=True)
    (evil.path / level).symlink_to(evil.precious)
    for check in (True, False):
        with pytest.raises(SnapshotError):
            Machine.restore(evil.path, check=check, later=level == "working-set", **given(evil, tmp_path))


def test_a_parent_is_not_looked_for_where_a_record_says(flat: Callable[..., Machine], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    machine = flat(EXIT)
    machine.snapshot(tmp_path / "here" / "base", differential=True).close()
    machine.snapshot(tmp_path / "here" / "diff", differential=True).close()
    with Machine.restore(tmp_path / "here" / "diff") as again:
        assert again.run(timeout=120).code == 0x10
    shutil.move(tmp_path / "here" / "base", tmp_path / "elsewhere")
    file = tmp_path / "here" / "diff" / "snapshot.pyvmm"
    content, _ = records.unpack("", file.read_bytes())
    assert content["parent"].keys() == {"id"}
    content["parent"]["path"] = "../elsewhere"
    file.chmod(0o600)
    file.write_bytes(records.pack(content))
    with pytest.raises(SnapshotError, match=r"without its parent, .*: put the two side by side"):
        Machine.restore(tmp_path / "here" / "diff")
    os.rename(tmp_path / "elsewhere", tmp_path / "here" / "another name")
    with Machine.restore(tmp_path / "here" / "diff") as again:
        assert again.run(timeout=120).code == 0x10


def test_a_series_in_another_directory_begins_with_a_full_one(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(EXIT)
    for folder, parents in (("a", [False, True]), ("b", [False, True])):
        (tmp_path / folder).mkdir()
        for number, has_parent in enumerate(parents):
            with machine.snapshot(tmp_path / folder / str(number), differential=True) as snapshot:
                assert (snapshot.parent is not None) == has_parent
