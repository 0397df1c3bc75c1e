"""A guest that writes its disk and reads it back, rolled back with its disk at any moment of that."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples

from vmm.machine import Machine
from vmm.parts import Disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmm.snapshot.checkpoint import Checkpoint

SIZE = 2 << 20
PASSED = 16
WRITES = 86  # of blk_rw, before it flushes and reads


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def writer(path: str, disk: Disk, **fields: Any) -> Machine:
    words = f"sectors={SIZE // 512} event_idx=1"
    return Machine(kernel=path, append=words, memory="16M", virtio="pci", disks=[disk], **fields)


def hold_in_its_writes(machine: Machine, start: Checkpoint, after: int) -> None:
    """Run it from ``start`` until the disk has taken ``after`` requests, and pause it before it has taken all writes.
    No roll-back takes counts back."""

    def taken() -> int:
        return machine.disks[0].queue_statistics()[0]["requests"]

    for _ in range(300):
        machine.rollback(start)
        before = taken()
        machine.start()
        while taken() < before + after:
            pass
        machine.pause()
        if taken() < before + WRITES:
            return
        machine.resume()  # it was quicker, and may be over
        assert machine.wait(120).code == PASSED
    raise AssertionError("the guest is always quicker than its observer")


def test_a_run_is_undone_with_its_disk_and_run_again(guest: Callable[[str], str], image: Path) -> None:
    with writer(guest("blk_rw"), Disk(str(image))) as machine:
        before = machine.checkpoint()
        for _ in range(examples(10)):
            assert image.read_bytes() == bytes(SIZE)
            assert machine.run(20).code == PASSED
            assert image.read_bytes() != bytes(SIZE)
            machine.rollback(before)
        assert image.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("fields", [{}, {"cache": "none"}], ids=str)
def test_a_guest_goes_on_from_any_moment_of_its_traffic(
    guest: Callable[[str], str], image: Path, fields: dict[str, str]
) -> None:
    draw = random.Random(5)
    with writer(guest("blk_rw"), Disk(str(image), **fields)) as machine:
        first = machine.checkpoint()
        assert machine.run(20).code == PASSED
        whole, moments = image.read_bytes(), []
        for _ in range(examples(5)):
            hold_in_its_writes(machine, first, draw.randrange(1, WRITES - 20))
            moments.append((machine.checkpoint(), image.read_bytes()))
            machine.resume()
            assert machine.wait(120).code == PASSED
        for checkpoint, then in draw.sample(moments, len(moments)) * 2:
            machine.rollback(first)
            machine.start()
            machine.pause()  # and its disk with it, which would go on with what is in its ring
            machine.rollback(checkpoint)
            assert image.read_bytes() == then != whole
            machine.resume()
            assert machine.wait(120).code == PASSED
            assert image.read_bytes() == whole


def test_clones_and_restored_machines_go_on_with_disks_of_their_own(
    guest: Callable[[str], str], image: Path, tmp_path: Path
) -> None:
    with writer(guest("blk_rw"), Disk(str(image))) as machine:
        hold_in_its_writes(machine, machine.checkpoint(), 10)
        then = image.read_bytes()
        machine.snapshot(tmp_path / "snapshot").close()
        clones = machine.clone(2)
        restored = Machine.restore(tmp_path / "snapshot")
        try:
            for other in (*clones, restored):
                assert other.run(20).code == PASSED
            assert image.read_bytes() == then
            machine.resume()
            assert machine.wait(120).code == PASSED
            assert image.read_bytes() != then
        finally:
            for other in (*clones, restored):
                other.close()
    assert (tmp_path / "snapshot" / "disk0-0.img").read_bytes() == then
