"""Disks in snapshots and clones, seen by their guests' drivers: who sees what, and who writes where."""

from __future__ import annotations

import functools
import os
import shutil
import struct
from typing import TYPE_CHECKING

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overlay_reader import flattened

from vmm import Machine
from vmm.devices.virtio.blk import Blk
from vmm.errors import ConfigError, HostError, SnapshotError
from vmm.parts import Disk
from vmm.snapshot import disks
from vmm.snapshot.disks import FrozenDisks, restore_disks, save_disks
from vmm.snapshot.reading import RECORDS
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmm.devices.device import State

IN, OUT = 0, 1
SIZE = 64 << 10
KINDS = ["raw", "overlay", "temporary"]


class Guest:
    """A machine with these disks, and a driver of each; ``kernel`` never runs."""

    kernel: str

    def __init__(self, disks: Sequence[Disk], machine: Machine | None = None) -> None:
        self.disks = list(disks)
        self.machine = machine or Machine(
            memory="64M", rng=False, disks=self.disks, kernel=self.kernel, kind="flat", mode="long"
        )
        self.blks = [blk for blk in self.machine.virtio if isinstance(blk, Blk)]
        self.drivers = [
            VirtioDriver.of(self.machine, blk, arena=((2 + index) << 20, (3 + index) << 20))
            for index, blk in enumerate(self.blks)
        ]
        for driver in self.drivers:
            driver.start()

    @classmethod
    def restored(cls, path: Path) -> Guest:
        machine = Machine.restore(path)
        return cls(machine.config.disks, machine)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def write(self, sector: int, data: bytes, disk: int = 0) -> None:
        header = struct.pack("<IIQ", OUT, 0, sector)
        assert self.drivers[disk].request(0, [header, data], [1]).data == b"\0"

    def content(self, disk: int = 0) -> bytes:
        room = self.blks[disk].size
        answer = self.drivers[disk].request(0, [struct.pack("<IIQ", IN, 0, 0)], [room, 1]).data
        assert answer[-1:] == b"\0"
        return answer[:-1]

    def save(self, directory: Path) -> list[State]:
        directory.mkdir()
        return save_disks(self.disks, self.blks, str(directory))


@pytest.fixture(scope="module", autouse=True)
def kernel(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("kernel") / "halt.bin"
    path.write_bytes(b"\xf4")
    Guest.kernel = str(path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(n * 7 & 0xFF for n in range(4096)) * (SIZE // 4096))
    return path


def disk_of(kind: str, image: Path) -> Disk:
    fields = {"overlay": str(image.with_suffix(".ovl"))} if kind == "overlay" else {"temporary": kind == "temporary"}
    return Disk(str(image), serial="root", **fields)


def bases(kind: str, image: Path) -> list[str]:
    """What has to be given with a snapshot of such a disk."""
    return [] if kind == "raw" else [str(image)]


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_disk_is_the_saved_one_and_the_snapshot_stays_as_it_is(
    image: Path, tmp_path: Path, kind: str
) -> None:
    with Guest([disk_of(kind, image)]) as guest:
        guest.write(3, b"before" + bytes(506))
        then = guest.content()
        states = guest.save(tmp_path / "snapshot")
        guest.write(3, b"after!" + bytes(506))
        assert guest.content() != then
    held = everything(tmp_path / "snapshot")
    for round in range(2):  # twice: what the first wrote is not there for the second
        with Guest(restore_disks(states, str(tmp_path / "snapshot"), given=bases(kind, image))) as again:
            assert again.blks[0].info()["queues"] == 1 and again.disks[0].serial == "root"
            assert again.content() == then
            again.write(round, b"restored" + bytes(504))
    assert everything(tmp_path / "snapshot") == held
    if kind != "raw":
        assert image.read_bytes() == bytes(n * 7 & 0xFF for n in range(4096)) * (SIZE // 4096)


def test_what_a_restored_machine_writes_stays_in_the_directory_that_is_given(image: Path, tmp_path: Path) -> None:
    with Guest([disk_of("raw", image)]) as guest:
        states = guest.save(tmp_path / "snapshot")
    (tmp_path / "work").mkdir()
    for _ in range(2):
        restored = restore_disks(states, str(tmp_path / "snapshot"), str(tmp_path / "work"))
        assert restored[0].overlay == str(tmp_path / "work" / "disk0.ovl")
        with Guest(restored) as again:
            again.write(5, b"kept" + bytes(508))
            then = again.content()
    assert flattened(tmp_path / "snapshot" / "disk0-0.img", tmp_path / "work" / "disk0.ovl") == then


@settings(max_examples=examples(8), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(KINDS),
    st.lists(
        st.lists(st.tuples(st.integers(0, SIZE // 512 - 17), st.integers(1, 16), st.integers(1, 255)), max_size=5),
        min_size=2,
        max_size=4,
    ),
)
def test_generations_of_snapshots_read_as_the_model_does(
    image: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, generations: list[list[tuple[int, int, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("generations")
    base = folder / "disk.img"
    shutil.copy(image, base)
    model = bytearray(base.read_bytes())
    now, kept = [disk_of(kind, base)], []
    for number, writes in enumerate(generations):
        directory = folder / f"snapshot{number}"
        with Guest(now) as guest:
            assert guest.content() == model
            for sector, sectors, byte in writes:
                guest.write(sector, bytes([byte]) * sectors * 512)
                model[sector * 512 : (sector + sectors) * 512] = bytes([byte]) * sectors * 512
            assert guest.content() == model
            states = guest.save(directory)
            (directory / RECORDS).touch()  # by which it is known as a snapshot's
            guest.write(0, b"lost" + bytes(508))
        kept.append((states, directory, bytes(model)))
        now = restore_disks(states, str(directory), given=bases(kind, base))
    if kind == "raw":  # the first snapshot has a copy of its own
        base.unlink()
    for states, directory, then in kept:
        with Guest(restore_disks(states, str(directory), given=bases(kind, base))) as again:
            assert again.content() == then


def test_layers_and_what_lies_over_them_are_the_files_that_the_format_says(image: Path, tmp_path: Path) -> None:
    low, high = tmp_path / "low.ovl", tmp_path / "high.ovl"
    with Guest([Disk(str(image), overlay=str(low))]) as guest:
        guest.write(1, b"low" + bytes(509))
        assert guest.blks[0].resize(SIZE + 8192) == SIZE + 8192
        guest.write(SIZE // 512, b"grown" + bytes(507))
    with Guest([Disk(str(image), layers=[str(low)], overlay=str(high))]) as guest:
        guest.write(9, b"high" + bytes(508))
        then = guest.content()
        assert then[512:515] == b"low" and then[SIZE : SIZE + 5] == b"grown" and len(then) == SIZE + 8192
    assert flattened(image, low, high) == then
    with pytest.raises(ConfigError, match="made over another disk"):
        Machine(memory="64M", disks=[Disk(str(image), overlay=str(high))])
    with open(low, "r+b") as file:  # a layer that was written since
        file.seek(-100, os.SEEK_END)
        file.write(b"changed")
    with pytest.raises(ConfigError, match="made over another disk"):
        Machine(memory="64M", disks=[Disk(str(image), layers=[str(low)], overlay=str(high))])
    os.truncate(low, low.stat().st_size - 4096)
    with pytest.raises(ConfigError, match="was cut short"):
        Machine(memory="64M", disks=[Disk(str(image), layers=[str(low)], temporary=True)])


def test_a_read_only_disk_is_referred_to(image: Path, tmp_path: Path) -> None:
    with Guest([Disk(str(image), readonly=True)]) as guest:
        states = guest.save(tmp_path / "snapshot")
    assert everything(tmp_path / "snapshot") == {}
    with pytest.raises(ConfigError, match="not given"):
        restore_disks(states, str(tmp_path / "snapshot"))
    assert restore_disks(states, str(tmp_path / "snapshot"), given=[str(image)]) == [Disk(str(image), readonly=True)]


@pytest.mark.parametrize("fields", [{"readonly": True}, {"temporary": True}], ids=str)
def test_a_disk_that_is_referred_to_and_has_changed_is_refused_by_name(
    image: Path, tmp_path: Path, fields: dict[str, bool]
) -> None:
    with Guest([Disk(str(image), **fields)]) as guest:
        states = guest.save(tmp_path / "snapshot")
    os.utime(image, ns=(1, 1))
    with pytest.raises(
        SnapshotError, match=f"disk {image} was written since: the snapshot's disk 0 needs it as it was"
    ):
        restore_disks(states, str(tmp_path / "snapshot"), given=[str(image)])


def test_a_machine_goes_on_from_a_snapshot_with_its_disks(image: Path, tmp_path: Path) -> None:
    with Guest([disk_of("raw", image)]) as guest:
        guest.write(3, b"before" + bytes(506))
        then = guest.content()
        guest.machine.snapshot(tmp_path / "first").close()
    with Guest.restored(tmp_path / "first") as guest:
        assert guest.content() == then
        guest.write(4, b"second" + bytes(506))
        later = guest.content()
        guest.machine.snapshot(tmp_path / "second").close()
        with Guest.restored(tmp_path / "first") as beside:
            assert beside.content() == then
    shutil.rmtree(tmp_path / "first")  # each snapshot can go without the others
    image.unlink()
    with Guest.restored(tmp_path / "second") as guest:
        assert guest.content() == later


@settings(max_examples=examples(20), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_copy_with_any_bit_flipped_or_cut_anywhere_is_refused(
    image: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    kind = data.draw(st.sampled_from(KINDS))
    shutil.copy(image, folder / "disk.img")
    with Guest([disk_of(kind, folder / "disk.img")]) as guest:
        guest.write(7, b"x" * 4096)
        guest.machine.snapshot(folder / "snapshot").close()
    path = folder / "snapshot" / ("disk0-0.img" if kind == "raw" else "disk0-1.ovl")
    path.chmod(0o600)
    size = path.stat().st_size
    at = data.draw(st.integers(0, size - 1))
    if data.draw(st.booleans()):
        os.truncate(path, at)
    else:
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << data.draw(st.integers(0, 7))]))
    with pytest.raises(SnapshotError, match=f"is damaged: its {path.name} is not what was written"):
        Machine.restore(folder / "snapshot")
    path.unlink()
    for check in (True, False):
        with pytest.raises(SnapshotError, match="is missing"):
            Machine.restore(folder / "snapshot", check=check)


VALUE = st.recursive(st.none() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3))


def test_what_is_no_record_of_a_disk_is_refused(image: Path, tmp_path: Path) -> None:
    with Guest([disk_of("temporary", image)]) as guest:
        good = guest.save(tmp_path / "snapshot")[0]

    @settings(max_examples=examples(100), deadline=None)
    @given(st.sampled_from(sorted(good)), VALUE, st.booleans())
    def damaged(field: str, value: object, missing: bool) -> None:
        state = {**good, field: value}
        if missing:
            del state[field]
        elif (field, value) in (("version", 2), ("readonly", 0)):
            return
        with pytest.raises((ValueError, SnapshotError)):
            restore_disks([state], str(tmp_path / "snapshot"), given=[str(image)])

    damaged()
    assert restore_disks([good], str(tmp_path / "snapshot"), given=[str(image)])


def test_a_record_does_not_lead_out_of_its_snapshot(image: Path, tmp_path: Path) -> None:
    with Guest([disk_of("raw", image)]) as guest:
        states = guest.save(tmp_path / "snapshot")
    for file in ({"held": 1, "file": "../disk.img"}, {"file": "disk0-0.img"}, {"path": str(image)}):
        with pytest.raises(ValueError, match="other fields"):
            restore_disks([{**states[0], "files": [file]}], str(tmp_path / "snapshot"))
    with pytest.raises(ValueError, match="outside the snapshot"):
        restore_disks([{**states[0], "version": 1, "files": [{"file": "../disk.img"}]}], str(tmp_path / "snapshot"))


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_name_in_a_snapshot_that_leads_elsewhere_is_not_opened(image: Path, tmp_path: Path, kind: str) -> None:
    with Guest([disk_of("raw", image)]) as guest:
        guest.machine.snapshot(tmp_path / "snapshot").close()
    held = tmp_path / "snapshot" / "disk0-0.img"
    held.unlink()
    held.symlink_to(image) if kind == "link" else os.mkfifo(held)
    for check in (True, False):
        with pytest.raises(
            SnapshotError, match=r"disk0-0.img of the snapshot is no regular file|disk0-0.img cannot be"
        ):
            Machine.restore(tmp_path / "snapshot", check=check)


def test_a_file_that_is_exchanged_while_it_is_opened_is_refused(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Guest([disk_of("raw", image)]) as guest:
        guest.machine.snapshot(tmp_path / "snapshot").close()
    look = disks._look

    def look_and_exchange(folder: int, directory: str, name: str) -> os.stat_result:
        found = look(folder, directory, name)
        os.unlink(os.path.join(directory, name))
        os.symlink(image, os.path.join(directory, name))
        return found

    monkeypatch.setattr(disks, "_look", look_and_exchange)
    with pytest.raises(SnapshotError, match=r"disk0-0.img of the snapshot was replaced"):
        Machine.restore(tmp_path / "snapshot", check=False)


def test_of_several_disks_only_what_the_snapshot_does_not_hold_is_given(image: Path, tmp_path: Path) -> None:
    shared, base = tmp_path / "shared.img", tmp_path / "base.img"
    for path in (shared, base):
        shutil.copy(image, path)
    made = [Disk(str(image)), Disk(str(shared), readonly=True, serial="cd"), Disk(str(base), temporary=True)]
    with Guest(made) as guest:
        guest.write(1, b"first" + bytes(507), 0)
        guest.write(2, b"third" + bytes(507), 2)
        then = [guest.content(number) for number in range(3)]
        guest.machine.snapshot(tmp_path / "snapshot").close()
    restore = functools.partial(Machine.restore, tmp_path / "snapshot")
    with pytest.raises(ConfigError, match=r"disk 1 is a file that is only read, of 65536 bytes, .*: give --disk"):
        restore()
    with pytest.raises(ConfigError, match=r"--disk is given 1 times, for 3: give one for each, or for 1, 2"):
        restore(disks=[str(shared)])
    for said in ([str(shared), str(base)], [f"{tmp_path}/other.img", str(shared), str(base)]):
        shutil.copy(image, tmp_path / "other.img")
        machine = restore(disks=said)
        with Guest(machine.config.disks, machine) as again:
            assert again.disks[1] == Disk(str(shared), readonly=True, serial="cd")
            assert [again.content(number) for number in (1, 2)] == then[1:]
            assert again.content(0) == (then[0] if len(said) == 2 else image.read_bytes())
    base.write_bytes(bytes(SIZE))
    with pytest.raises(SnapshotError, match=r"base.img was written since: the snapshot's disk 2"):
        restore(disks=[str(shared), str(base)])
    restore(disks=[f"{tmp_path}/other.img", str(shared), f"{base},temporary"]).close()  # another in its place


def test_a_snapshot_of_version_1_is_restored_without_its_paths(image: Path, tmp_path: Path) -> None:
    with Guest([disk_of("temporary", image)]) as guest:
        guest.write(3, b"before" + bytes(506))
        then = guest.content()
        states = guest.save(tmp_path / "snapshot")
    known = states[0]["files"][0]
    old = {"path": "/etc/passwd", "inode": 5, "size": known["size"], "mtime_ns": known["mtime_ns"]}
    states = [{**states[0], "version": 1, "files": [old, {"file": "disk0-1.ovl"}]}]
    with Guest(restore_disks(states, str(tmp_path / "snapshot"), given=[str(image)])) as again:
        assert again.content() == then


def test_a_full_host_while_saving_leaves_the_machine_as_it_is(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Guest([disk_of("raw", image)]) as guest:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            patched.setattr(os, "copy_file_range", full)
            with pytest.raises(HostError, match="No space left on device: make room"):
                guest.save(tmp_path / "snapshot")
        assert everything(tmp_path / "snapshot") == {}
        guest.write(0, b"goes on" + bytes(505))
        assert guest.content().startswith(b"goes on")


@pytest.mark.parametrize("kind", KINDS)
def test_clones_begin_alike_and_disturb_nobody(image: Path, tmp_path: Path, kind: str) -> None:
    shutil.copy(image, tmp_path / "shared.img")
    shared = Disk(str(tmp_path / "shared.img"), readonly=True)
    with Guest([disk_of(kind, image), shared]) as parent:
        parent.write(2, b"parent" + bytes(506))
        then, image_bytes = parent.content(), parent.content(1)
        with FrozenDisks(parent.disks, parent.blks) as frozen:
            clones = [Guest(frozen.disks) for _ in range(3)]
        parent.write(2, b"later!" + bytes(506))
        parents = parent.content()
        for index, clone in enumerate(clones):
            assert clone.content() == then
            assert clone.disks[1] == shared and clone.content(1) == image_bytes
            clone.write(4 + index, bytes([index + 1]) * 512)
        for index, clone in enumerate(clones):
            expected = bytearray(then)
            expected[(4 + index) * 512 : (5 + index) * 512] = bytes([index + 1]) * 512
            assert clone.content() == expected
        assert parent.content() == parents
        with FrozenDisks(clones[1].disks, clones[1].blks) as second, Guest(second.disks) as grandchild:
            assert grandchild.content() == clones[1].content()
        states = clones[2].save(tmp_path / "snapshot")
        then = clones[2].content()
        for clone in clones:
            clone.machine.close()
    paths = [*bases(kind, image), str(tmp_path / "shared.img")]
    with Guest(
        restore_disks(states, str(tmp_path / "snapshot"), given=paths)
    ) as restored:  # what had no name is in the snapshot
        assert restored.content() == then and restored.content(1) == image_bytes


def test_clones_leave_no_file_behind(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(os.listdir(tmp_path))
    with Guest([disk_of("raw", image)]) as parent, FrozenDisks(parent.disks, parent.blks) as frozen:
        with Guest(frozen.disks) as clone:
            clone.write(0, bytes(512))
            assert sorted(os.listdir(tmp_path)) == before
        with Guest(frozen.disks) as clone:
            frozen.close()
            assert clone.content() == parent.content()
    assert sorted(os.listdir(tmp_path)) == before
