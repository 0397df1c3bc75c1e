"""Machines that move with their disks: the guest writes all along, checks what it reads, and the image there is the one
that it wrote."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from effort import PATIENCE
from test_migrate import Arriving

from vmm import migrate
from vmm.devices.virtio.blk import Blk
from vmm.errors import ConfigError, HostError, MigrationError, StateError
from vmm.machine import Machine
from vmm.migrate import mirror, precopy
from vmm.parts import Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 8 << 20
PASSED = 16
WORDS = f"sectors={SIZE // 512} event_idx=1 rounds=0"
FAR = 6 << 20  # where the guest never writes


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        file.seek(FAR)
        file.write(b"far from all that is written")
    return path


@pytest.fixture
def writing(guest: Callable[[str], str]) -> Iterator[Callable[..., Machine]]:
    """Makes a machine whose guest writes its disk and reads it back until it is told to end."""
    with contextlib.ExitStack() as stack:

        def make(disk: Disk | str, words: str = WORDS, **fields: Any) -> Machine:
            machine = stack.enter_context(
                Machine(**{"kernel": guest("blk_rw"), "memory": "16M", "append": words, "disks": [disk], **fields})
            )
            machine.start()
            machine.console.expect(rb"round 0\n", PATIENCE)
            return machine

        yield make


def final_round(machine: Machine) -> int:
    """Tell the guest to end; which round was its last, once it has found everything right."""
    machine.console.expect(rb"round \d+\n", PATIENCE)  # it writes here too
    machine.console.send(b"q")
    assert machine.wait(PATIENCE).code == PASSED, machine.console.tail()
    return int(machine.console.tail().rpartition(b"round ")[2].split()[0])


def written_in(round_: int) -> bytes:
    """The guest's part of the disk after it, every third block of 256."""
    blocks = []
    for block in range(256):
        word = round_ << 48 | block << 32
        blocks.append(struct.pack("<512Q", *range(word, word + 512)) if block % 3 == 0 else bytes(4096))
    return b"".join(blocks)


def is_what_was_written(path: Path, round_: int) -> bool:
    data = path.read_bytes()
    return (
        len(data) == SIZE
        and data[: 1 << 20] == written_in(round_)
        and data[FAR : FAR + 8] == b"far from"
        and not data[1 << 20 : FAR].strip(b"\0")
    )


def into(tmp_path: Path, n: int = 0) -> Path:
    directory = tmp_path / f"there{n}"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("postcopy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_disk_that_is_written_all_along_goes_from_place_to_place(
    writing: Callable[..., Machine], image: Path, tmp_path: Path, postcopy: bool
) -> None:
    machine = writing(f"{image}")
    for n in range(8):
        there = Arriving(f"unix:{tmp_path}/{n}", disks_in=into(tmp_path, n))
        moved = machine.migrate(there.address, mirror=True, postcopy=postcopy)
        assert moved.rounds >= 1 and moved.bytes > 86 * 4096
        machine.close()
        image.unlink()  # nobody needs it
        machine, image = there.machine(), tmp_path / f"there{n}" / "disk0.img"
    with machine:
        assert is_what_was_written(image, final_round(machine))
        assert image.stat().st_blocks * 512 < 4 << 20  # holes stay holes


@pytest.mark.parametrize(
    "fields",
    [{"overlay": "over.ovl"}, {"temporary": True}, {"cache": "none"}, {"overlay": "over.ovl", "cache": "none"}],
    ids=str,
)
def test_what_the_guest_sees_goes_over_whatever_the_disk_is_made_of(
    writing: Callable[..., Machine], image: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    before = image.read_bytes()
    fields = {**fields, **({"overlay": str(tmp_path / fields["overlay"])} if "overlay" in fields else {})}
    machine = writing(Disk(str(image), serial="root", **fields))
    there = Arriving(f"unix:{tmp_path}/socket", disks_in=into(tmp_path))
    machine.migrate(there.address, mirror=True)
    machine.close()
    new = tmp_path / "there0" / "disk0.img"
    with there.machine() as moved:
        disk = moved.config.disks[0]
        assert disk == Disk(str(new), serial="root", cache=fields.get("cache", "writeback"))
        assert is_what_was_written(new, final_round(moved))
    if "overlay" in fields or "temporary" in fields:
        assert image.read_bytes() == before


def test_a_guest_that_writes_faster_than_the_link_is_held_back(
    writing: Callable[..., Machine], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precopy, "ROUNDS_MAX", 6)
    machine = writing(f"{image}")
    there = Arriving(f"unix:{tmp_path}/socket", disks_in=into(tmp_path))
    seen: list[migrate.Progress] = []
    moved = machine.migrate(there.address, mirror=True, bandwidth=1 << 20, downtime=0.06, progress=seen.append)
    assert moved.rounds == 6 and seen[-1].share < 1
    with there.machine() as machine:
        assert is_what_was_written(tmp_path / "there0" / "disk0.img", final_round(machine))


def test_one_disk_goes_along_and_another_is_where_the_destination_says(
    guest: Callable[[str], str], image: Path, tmp_path: Path
) -> None:
    shared, copied = tmp_path / "shared.img", tmp_path / "copied.img"
    shared.write_bytes(b"shared" + bytes(4090))
    copied.write_bytes(b"copied" + bytes(4090))
    disks = [str(image), str(shared), f"{copied},ro"]
    with Machine(kernel=guest("blk_rw"), memory="16M", append=WORDS, disks=disks) as machine:
        machine.start()
        machine.console.expect(rb"round 0\n", PATIENCE)
        with pytest.raises(ConfigError, match="has no disk 3 to go along: its 3 are numbered from 0"):
            machine.migrate(f"unix:{tmp_path}/socket", mirror=[3])
        there = Arriving(f"unix:{tmp_path}/socket", disks_in=into(tmp_path), disks=[str(shared)])
        machine.migrate(there.address, mirror=[2, 0])
        with there.machine() as moved:
            directory = tmp_path / "there0"
            assert sorted(os.listdir(directory)) == ["disk0.img", "disk2.img"]
            assert (directory / "disk2.img").read_bytes() == copied.read_bytes()
            assert [disk.path for disk in moved.config.disks] == [
                str(directory / "disk0.img"), str(shared), str(directory / "disk2.img"),
            ]  # fmt: skip
            assert moved.config.disks[2].readonly
            with pytest.raises(ConfigError, match="in use"):
                Machine(memory="16M", disks=[str(shared)])
            assert is_what_was_written(directory / "disk0.img", final_round(moved))


def test_over_tcp_files_can_be_named_one_by_one(writing: Callable[..., Machine], image: Path, tmp_path: Path) -> None:
    machine = writing(f"{image}")
    there = Arriving("tcp:127.0.0.1:0", disks=[f"{tmp_path}/new.img,serial=mine"])
    machine.migrate(there.address, mirror=True)
    with there.machine() as moved:
        assert is_what_was_written(tmp_path / "new.img", final_round(moved))


# ---- what cannot be ----


def refused(machine: Machine, tmp_path: Path, why: str, mirrored: bool = True, **how: Any) -> None:
    """The machine does not get there, for this reason, which both sides know, and runs here."""

    def give_up(reason: str) -> None:
        raise MigrationError(reason)

    there = Arriving(f"unix:{tmp_path}/socket-{len(os.listdir(tmp_path))}", on_refused=give_up, **how)
    with pytest.raises(MigrationError, match=why):
        machine.migrate(there.address, mirror=mirrored)
    came = there.result()
    assert isinstance(came, MigrationError) and re.search(why.removeprefix("other side says: "), str(came))
    assert machine.running and not machine.paused


def test_a_place_that_cannot_be_is_refused_and_nothing_is_written_over(
    writing: Callable[..., Machine], image: Path, tmp_path: Path
) -> None:
    machine = writing(f"{image}")
    directory = into(tmp_path)
    there = directory / "disk0.img"
    there.write_bytes(b"somebody's")
    refused(machine, tmp_path, r"disk .*there0/disk0.img is here already, and nothing is written", disks_in=directory)
    assert there.read_bytes() == b"somebody's"
    there.unlink()
    there.symlink_to(tmp_path / "elsewhere.img")
    refused(machine, tmp_path, "is here already", disks_in=directory)
    assert there.is_symlink() and not (tmp_path / "elsewhere.img").exists()
    there.unlink()
    refused(machine, tmp_path, r"cannot be made \(No such file or directory\)", disks_in=tmp_path / "nowhere")
    refused(machine, tmp_path, "disk 0 needs a file here, and its record says no place: give --disk FILE")
    refused(machine, tmp_path, "disk 0 does not come along", mirrored=False, disks_in=directory)
    refused(machine, tmp_path, "leave out overlay= and temporary", disks=[f"{there},temporary"])
    assert os.listdir(directory) == []
    refused(
        machine,
        tmp_path,
        "--disk is given 2 times, for 1: give one for each, or none",
        disks_in=directory,
        disks=["x", "y"],
    )
    assert is_what_was_written(image, final_round(machine))


def test_a_destination_that_is_full_says_so_and_leaves_nothing(
    writing: Callable[..., Machine], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = writing(f"{image}")
    directory = into(tmp_path)
    left = 300 << 10
    pwrite = os.pwrite

    def filling(fd: int, data: Any, at: int) -> int:
        nonlocal left
        left -= len(data) if os.readlink(f"/proc/self/fd/{fd}").startswith(str(directory)) else 0
        if left < 0 and len(data) >= 4096:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, at)

    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", filling)
        why = r"other side says: disk .*disk0.img cannot be written \(No space left on device\): make room"
        refused(machine, tmp_path, why, disks_in=directory)
    assert os.listdir(directory) == []
    assert is_what_was_written(image, final_round(machine))


def test_a_source_that_cannot_read_its_disk_stays(
    writing: Callable[..., Machine], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = writing(f"{image}")
    directory = into(tmp_path)
    read = Blk.read

    def cut_short(blk: Blk, at: int, buffer: memoryview) -> None:
        os.truncate(image, FAR)
        read(blk, at, buffer)

    there = Arriving(f"unix:{tmp_path}/socket", disks_in=directory)
    with monkeypatch.context() as patched:
        patched.setattr(Blk, "read", lambda blk, at, buffer: (cut_short if at >= FAR else read)(blk, at, buffer))
        with pytest.raises(HostError, match=r"reading .*disk.img at byte 6291456: the file ends before it"):
            machine.migrate(there.address, mirror=True)
    assert isinstance(there.result(), MigrationError)
    assert os.listdir(directory) == []
    os.truncate(image, SIZE)
    assert final_round(machine)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cancelled_machine_goes_on_here_and_leaves_nothing_there(
    writing: Callable[..., Machine], image: Path, tmp_path: Path, share: float
) -> None:
    with open(image, "r+b") as file:
        file.seek(2 << 20)
        file.write(os.urandom(2 << 20))
    machine = writing(f"{image}")
    directory = into(tmp_path)
    there = Arriving(f"unix:{tmp_path}/socket", disks_in=directory)

    def cancel(progress: migrate.Progress) -> None:
        assert os.listdir(directory) == ["disk0.img"]
        with pytest.raises(StateError, match="a migration holds the disk at its size"):
            machine.disks[0].resize()
        if progress.sent > share * (2 << 20):
            assert machine.migration is not None
            threading.Thread(target=machine.migration.cancel).start()

    with pytest.raises(MigrationError, match="cancelled"):
        machine.migrate(there.address, mirror=True, bandwidth=8 << 20, downtime=0.001, progress=cancel)
    assert isinstance(there.result(), MigrationError)
    assert os.listdir(directory) == []
    assert machine.disks[0].resize() == SIZE
    assert machine.running and not machine.paused
    round_ = final_round(machine)
    assert image.read_bytes()[: 1 << 20] == written_in(round_)


def test_a_file_that_somebody_put_there_meanwhile_is_not_removed(tmp_path: Path) -> None:
    images = mirror.Images([Disk(str(tmp_path / "new.img"))], [4096])
    (tmp_path / "new.img").unlink()
    (tmp_path / "new.img").write_bytes(b"another")
    images.remove()
    assert (tmp_path / "new.img").read_bytes() == b"another"


def test_a_second_file_that_cannot_be_takes_the_first_with_it(tmp_path: Path) -> None:
    (tmp_path / "b.img").write_bytes(b"here")
    with pytest.raises(ConfigError, match="is here already"):
        mirror.Images([Disk(str(tmp_path / "a.img")), Disk(str(tmp_path / "b.img"))], [4096, 4096])
    with pytest.raises(ConfigError, match="not whole sectors"):
        mirror.Images([Disk(str(tmp_path / "a.img"))], [4097])
    with pytest.raises(HostError, match="cannot be made as large"):
        mirror.Images([Disk(str(tmp_path / "a.img"))], [mirror.SIZE_MAX // 512 * 512])
    assert os.listdir(tmp_path) == ["b.img"]
    with pytest.raises(ConfigError, match="in use by another"):
        images = mirror.Images([Disk(str(tmp_path / "c.img"))], [4096])
        try:
            Machine(memory="16M", disks=[str(tmp_path / "c.img")])
        finally:
            images.remove()


def test_a_kept_file_stays(tmp_path: Path) -> None:
    images = mirror.Images([Disk(str(tmp_path / "a.img"))], [8192])
    images.finish()
    images.keep()
    images.remove()
    assert (tmp_path / "a.img").read_bytes() == bytes(8192)
