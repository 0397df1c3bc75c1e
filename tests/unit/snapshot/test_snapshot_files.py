"""Snapshots as directories: what was written is what is read, or nothing is."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from guest_memory import LAYOUT, PAGE, STATE, Memory, content_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import snapshot
from vmm._ffi import ffi, lib
from vmm.errors import HostError, SnapshotError
from vmm.snapshot import records
from vmm.snapshot.regions import pages_in
from vmm.snapshot.replacement import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    memory.scatter(1, 40)
    memory.dirty.clear()
    yield memory
    memory.close()


def write(path: Path, memory: Memory, **more: Any) -> snapshot.Snapshot:
    return snapshot.write(path, more.pop("state", STATE), memory.ram, **more)


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(PARTIAL)]


def test_a_full_snapshot_is_read_as_it_was_written(memory: Memory, tmp_path: Path) -> None:
    before = memory.allocated()
    write(tmp_path / "full", memory).close()
    assert memory.allocated() == before, "memory that was never touched was not touched"
    with snapshot.read(tmp_path / "full") as found:
        found.check()
        assert found.state == STATE
        assert [(region.gpa, region.size) for region in found.regions] == LAYOUT
        assert sum(region.pages_held for region in found.regions) == 40
        assert content_of(found) == memory.content()
        assert found.parent is None


def test_pages_of_zeros_are_holes(memory: Memory, tmp_path: Path) -> None:
    memory.write(0x100000, bytes(64 * PAGE))
    with write(tmp_path / "full", memory) as found:
        assert os.fstat(found.memory_fd).st_blocks * 512 <= 41 * PAGE
        assert os.fstat(found.memory_fd).st_size == sum(size for _, size in LAYOUT)


def test_memory_without_a_file_is_searched_for_zeros(tmp_path: Path) -> None:
    content = bytearray(64 * PAGE)
    content[5 * PAGE + 17] = 1
    with snapshot.write(tmp_path / "full", {}, [snapshot.Ram(0, len(content), memoryview(content))]) as found:
        assert found.regions[0].pages_held == 1
        assert content_of(found) == content


def test_a_chain_is_one_memory_and_merges_into_one_file(memory: Memory, tmp_path: Path) -> None:
    chain = write(tmp_path / "0", memory)
    for n in range(1, 5):
        memory.dirty.clear()
        memory.scatter(n, 30)
        memory.write(LAYOUT[1][0], bytes(3 * PAGE))  # zeros over what may have been none
        chain = write(tmp_path / str(n), memory, state={"n": n}, parent=chain, dirty=sorted(set(memory.dirty)))
        if n == 4:
            assert sum(region.pages_held for region in chain.regions) <= 33
    chain.check()
    assert content_of(chain) == memory.content()
    assert [layer.state for layer in chain.layers] == [STATE, *({"n": n} for n in range(1, 5))]
    with snapshot.merge(chain, tmp_path / "whole") as whole:
        whole.check()
        assert (whole.parent, whole.state) == (None, {"n": 4})
        assert content_of(whole) == memory.content()
        assert whole.id != chain.id
    with snapshot.merge(chain, tmp_path / "4") as whole:  # in its own place
        assert whole.parent is None
        assert content_of(whole) == memory.content()
    assert leftovers(tmp_path) == []


def test_a_restored_machine_that_wrote_privately_is_snapshot_whole(memory: Memory, tmp_path: Path) -> None:
    import mmap

    with write(tmp_path / "full", memory) as first:
        mapped = memoryview(mmap.mmap(first.memory_fd, first.size, mmap.MAP_PRIVATE))
        mapped[0x20123:0x20127] = b"more"
        mapped[-1:] = b"!"
        ram = [
            snapshot.Ram(r.gpa, r.size, mapped[r.offset : r.offset + r.size], first.memory_fd, r.offset, private=True)
            for r in first.regions
        ]
        with snapshot.write(tmp_path / "second", STATE, ram) as second:
            assert content_of(second) == mapped
        assert os.fstat(first.memory_fd).st_blocks * 512 <= 41 * PAGE


def test_other_files_are_kept_and_copied_by_a_merge(memory: Memory, tmp_path: Path) -> None:
    def disk(folder: str) -> None:
        with open(os.path.join(folder, "disk0"), "wb") as file:
            file.truncate(100_000_001)
            file.seek(50_000_000)
            file.write(b"in the midst")

    with write(tmp_path / "one", memory, extra_files=disk) as one, snapshot.merge(one, tmp_path / "two") as two:
        for found in (one, two):
            found.check()
            assert found.files["disk0"].size == 100_000_001
            with open(found.file_path("disk0"), "rb") as file:
                file.seek(50_000_000)
                assert file.read(12) == b"in the midst"


def test_the_checksum_of_a_file_is_that_of_its_bytes_holes_too(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(300_001)
        file.seek(123_456)
        file.write(b"abc" * 5000)
        file.flush()
        crc = ffi.new("uint32_t *")
        assert lib.vmm_file_crc32c(file.fileno(), crc) == 0
        file.seek(0)
        content = file.read()
    assert crc[0] == lib.vmm_crc32c(0, content, len(content))


@given(st.binary(max_size=9000), st.integers(0, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=examples(100), deadline=None)
def test_the_instruction_and_the_table_agree(content: bytes, skip: int, crc: int) -> None:
    content = content[skip:] * 3
    assert lib.vmm_crc32c(crc, content, len(content)) == lib.vmm_crc32c_portable(crc, content, len(content))
    zeros = bytes(len(content))
    assert lib.vmm_crc32c_zeros(crc, len(zeros)) == lib.vmm_crc32c(crc, zeros, len(zeros))


def test_the_checksum_is_the_castagnoli_one() -> None:
    assert lib.vmm_crc32c(0, b"123456789", 9) == 0xE3069283  # the check value of the polynomial
    assert lib.vmm_crc32c(0, bytes(32), 32) == 0x8A9136AA  # RFC 3720, B.4


RUNS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 90)), max_size=8)


@given(RUNS, st.integers(1, 150))
@settings(max_examples=examples(200), deadline=None)
def test_runs_become_the_pages_they_touch(runs: list[tuple[int, int]], pages: int) -> None:
    gpa = 40 * PAGE
    bitmap = pages_in(gpa, pages * PAGE, [(first * PAGE + 5, count * PAGE - 5) for first, count in runs if count])
    wanted = {page for first, count in runs for page in range(first, first + count)}
    assert len(bitmap) == (pages + 63) // 64 * 8
    found = {40 + n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1}
    assert found == wanted & set(range(40, 40 + pages))


# ---- damage


def damaged(path: Path, change: Callable[[bytearray], None], name: str) -> None:
    """Change a file's content, keeping its holes."""
    os.chmod(path / name, 0o600)
    content = bytearray((path / name).read_bytes())
    change(content)
    with open(path / name, "r+b") as file:
        at = 0
        for at in range(0, len(content), PAGE):
            file.seek(at)
            if file.read(PAGE) != content[at : at + PAGE]:
                file.seek(at)
                file.write(content[at : at + PAGE])
        file.truncate(len(content))


def copies(path: Path, n: int) -> Iterator[Path]:
    """Copies that share nothing."""
    for i in range(n):
        copy = path.with_name(f"copy{i}")
        shutil.copytree(path, copy)
        yield copy
        shutil.rmtree(copy)


def refused(path: Path) -> bool:
    try:
        with snapshot.read(path) as found:
            found.check()
    except SnapshotError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


@pytest.fixture
def small(tmp_path: Path) -> Path:
    memory = Memory([(0, 64 * PAGE), (1 << 32, 20 * PAGE)])
    memory.scatter(3, 20)

    def disk(folder: str) -> None:
        with open(os.path.join(folder, "disk0"), "wb") as file:
            file.write(random.Random(5).randbytes(10_000))
            file.truncate(50_000)

    write(tmp_path / "small", memory, extra_files=disk).close()
    memory.close()
    assert not refused(tmp_path / "small")
    return tmp_path / "small"


def test_a_flipped_bit_anywhere_is_refused(small: Path) -> None:
    chance = random.Random(20)
    for n, copy in enumerate(copies(small, 240)):
        name = ["snapshot.pyvmm", "memory", "disk0"][n % 3]
        at, bit = chance.randrange(os.path.getsize(copy / name)), 1 << chance.randrange(8)

        def flip(content: bytearray, at: int = at, bit: int = bit) -> None:
            content[at] ^= bit

        damaged(copy, flip, name)
        assert refused(copy), f"bit {bit:#x} of byte {at} of {name}"


def test_a_file_cut_short_or_made_longer_is_refused(small: Path) -> None:
    chance = random.Random(21)
    for n, copy in enumerate(copies(small, 120)):
        name = ["snapshot.pyvmm", "memory", "disk0"][n % 3]
        size = os.path.getsize(copy / name)
        to = chance.randrange(size) if n % 2 else size + chance.randrange(1, 10000)
        os.chmod(copy / name, 0o600)
        os.truncate(copy / name, to)
        assert refused(copy), f"{name} of {size} bytes made {to}"


@pytest.mark.parametrize("name", ["snapshot.pyvmm", "memory", "disk0"])
def test_a_file_that_is_gone_is_named(small: Path, name: str) -> None:
    os.unlink(small / name)
    with pytest.raises(SnapshotError, match=name), snapshot.read(small) as found:
        found.check()


def test_holes_that_were_filled_with_zeros_by_a_copy_are_no_damage(small: Path) -> None:
    content = (small / "memory").read_bytes()
    os.unlink(small / "memory")
    (small / "memory").write_bytes(content)
    assert not refused(small)


def test_another_format_version_is_refused_with_both_numbers(small: Path) -> None:
    def newer(content: bytearray) -> None:
        content[8] = 3
        content[-32:] = records.digest(bytes(content[:-32]))

    damaged(small, newer, "snapshot.pyvmm")
    with pytest.raises(SnapshotError, match="format version 3, and this pyvmm reads 1 and 2"):
        snapshot.read(small)


NUMBERS = st.sampled_from([-1, 0, 1, 4095, 4096, 1 << 32, 1 << 52, 1 << 64, 1 << 70])
ODD: st.SearchStrategy[Any] = (
    NUMBERS | st.none() | st.binary(max_size=40) | st.lists(NUMBERS, max_size=3) | st.just({}) | st.text(max_size=3)
)


@given(st.data())
@settings(max_examples=examples(150), deadline=None)
def test_records_with_a_right_digest_and_wrong_content_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("hostile") / "snapshot"
    memory = Memory([(0, 3 * PAGE), (1 << 32, 70 * PAGE)])
    memory.scatter(3, 5)
    write(folder, memory).close()
    memory.close()
    content, _ = records.unpack("", (folder / "snapshot.pyvmm").read_bytes())
    where = data.draw(st.sampled_from(["memory", "files", "parent", "region", "region", "region"]))
    if where == "region":
        region = data.draw(st.sampled_from(content["memory"]))
        field = data.draw(st.sampled_from([*region]))
        before, region[field] = region[field], data.draw(ODD)
        same = type(before) is type(region[field]) and before == region[field]
    else:
        before, content[where] = content[where], data.draw(ODD)
        same = before == content[where]
    os.chmod(folder / "snapshot.pyvmm", 0o600)
    (folder / "snapshot.pyvmm").write_bytes(records.pack(content))
    assert same or refused(folder) or (where == "region" and field == "gpa")  # memory may well lie elsewhere
    shutil.rmtree(folder.parent)


# ---- parents


def test_a_parent_that_was_replaced_is_refused(memory: Memory, tmp_path: Path) -> None:
    with write(tmp_path / "base", memory) as base:
        write(tmp_path / "diff", memory, parent=base, dirty=[(0, PAGE)]).close()
    write(tmp_path / "base", memory).close()
    with pytest.raises(SnapshotError, match=r"diff is a differential .* [0-9a-f]{16}, which was replaced"):
        snapshot.read(tmp_path / "diff")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(SnapshotError, match="differential snapshot without its parent"):
        snapshot.read(tmp_path / "diff")


def test_damage_in_a_parent_is_damage(memory: Memory, tmp_path: Path) -> None:
    with write(tmp_path / "base", memory) as base:
        write(tmp_path / "diff", memory, parent=base, dirty=[]).close()

    def flip(content: bytearray) -> None:
        content[-1] ^= 1

    damaged(tmp_path / "base", flip, "memory")
    with snapshot.read(tmp_path / "diff") as diff:
        with pytest.raises(SnapshotError, match="base is damaged"):
            diff.check()
        with pytest.raises(SnapshotError, match="base is damaged"):
            snapshot.merge(diff, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_chain_that_is_moved_as_a_whole_stays_one(memory: Memory, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with write(tmp_path / "here" / "base", memory) as base:
        write(tmp_path / "here" / "diff", memory, parent=base, dirty=[]).close()
    (tmp_path / "here").rename(tmp_path / "there")
    assert not refused(tmp_path / "there" / "diff")


def test_what_cannot_be_a_differential_is_refused(memory: Memory, tmp_path: Path) -> None:
    with write(tmp_path / "base", memory) as base:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"parent": base}, "both its parent"),
            ({"dirty": []}, "both its parent"),
            ({"parent": base, "dirty": [(1 << 40, PAGE)]}, "lies outside memory"),
        ]
        for more, why in cases:
            with pytest.raises(SnapshotError, match=why):
                write(tmp_path / "diff", memory, **more)
        with pytest.raises(SnapshotError, match="replace a snapshot that it is built on"):
            write(tmp_path / "base", memory, parent=base, dirty=[])
        other = Memory([(0, PAGE)])
        with pytest.raises(SnapshotError, match="other memory"):
            write(tmp_path / "diff", other, parent=base, dirty=[])
        other.close()
    assert os.listdir(tmp_path) == ["base"]


# ---- the name


def test_a_snapshot_replaces_another_and_nothing_else(memory: Memory, tmp_path: Path) -> None:
    write(tmp_path / "name", memory, state=1).close()
    with snapshot.read(tmp_path / "name") as old:
        write(tmp_path / "name", memory, state=2).close()
        old.check()  # open files stay
    with snapshot.read(tmp_path / "name") as new:
        assert new.state == 2
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"")
    for name in ("photos", "file"):
        with pytest.raises(SnapshotError, match="give the snapshot another name"):
            write(tmp_path / name, memory)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", memory).close()
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "name", "photos"]


def test_a_state_that_is_not_plain_leaves_nothing(memory: Memory, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"value\['state'\]\['rate'\] is a float"):
        write(tmp_path / "name", memory, state={"rate": 1.5})
    assert os.listdir(tmp_path) == []


def test_an_error_in_between_leaves_what_was(memory: Memory, tmp_path: Path) -> None:
    write(tmp_path / "name", memory, state=1).close()

    def fails(folder: str) -> None:
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write(tmp_path / "name", memory, extra_files=fails)
    assert os.listdir(tmp_path) == ["name"]
    with snapshot.read(tmp_path / "name") as found:
        assert found.state == 1


def test_only_its_owner_can_read_it(memory: Memory, tmp_path: Path) -> None:
    write(tmp_path / "name", memory).close()
    assert stat.S_IMODE(os.stat(tmp_path / "name").st_mode) == 0o700
    for name in os.listdir(tmp_path / "name"):
        assert stat.S_IMODE(os.stat(tmp_path / "name" / name).st_mode) == 0o400


def test_a_file_that_may_not_grow_leaves_what_was(memory: Memory, tmp_path: Path) -> None:
    import resource

    write(tmp_path / "name", memory, state=1).close()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(HostError, match="make room or give another place; nothing was replaced") as caught:
            write(tmp_path / "name", memory, state=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["name"]
    with snapshot.read(tmp_path / "name") as found:
        found.check()
        assert found.state == 1


def test_a_parent_is_found_by_its_id_alone(memory: Memory, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with write(tmp_path / "here" / "base", memory) as base:
        write(tmp_path / "here" / "diff", memory, parent=base, dirty=[]).close()
        with pytest.raises(SnapshotError, match="lies beside its parent"):
            write(tmp_path / "diff", memory, parent=base, dirty=[])
    (tmp_path / "here" / "base").rename(tmp_path / "here" / "renamed")
    assert not refused(tmp_path / "here" / "diff")
    (tmp_path / "here" / "renamed").rename(tmp_path / "away")
    assert refused(tmp_path / "here" / "diff")
    (tmp_path / "here" / "base").symlink_to(tmp_path / "away")  # the person's, who may put it where they like
    assert not refused(tmp_path / "here" / "diff")
