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

SIZE = 2 << 20
PASSED = 16


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def writer(path: str, disk: Disk, **fields: Any) -> Machine:
    words = f"sectors={SIZE // 512} event_idx=1"
    return Machine(kernel=path, append=words, memory="16M", virtio="pci", disks=[disk], **fields)


def taken(machine: Machine) -> int:
    """Requests that were taken from the disk's ring since the start; no roll-back takes them back."""
    return machine.disks[0].queue_statistics()[0]["requests"]


def test_a_run_is_undone_with_its_disk_and_run_again(guest: Callable[[str], str], image: Path) -> None:
    with writer(guest("blk_rw"), Disk(str(image))) as machine:
        before = machine.checkpoint()
        for _ in range(examples(10)):
            assert image.read_bytes() == bytes(SIZE)
            assert machine.run(20).code == PASSED
            assert image.read_bytes() != bytes(SIZE)
            machine.rollback(before)
        assert image.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("fields", [{"iops": 400}, {"iops": 400, "cache": "none"}], ids=str)  # to be met on the way
def test_a_guest_goes_on_from_any_moment_of_its_traffic(
    guest: Callable[[str], str], image: Path, fields: dict[str, Any]
) -> None:
    draw = random.Random(5)
    with writer(guest("blk_rw"), Disk(str(image), **fields)) as machine:
        first = machine.checkpoint()
        assert machine.run(20).code == PASSED
        whole, requests = image.read_bytes(), taken(machine)
        moments = []
        for _ in range(examples(5)):
            machine.rollback(first)
            until = (began := taken(machine)) + draw.randrange(1, requests // 2)
            machine.start()
            while taken(machine) < until:
                pass
            machine.pause()
            if taken(machine) < began + requests:  # else it was quicker, and may be over
                moments.append((machine.checkpoint(), image.read_bytes()))
            machine.resume()
            assert machine.wait(20).code == PASSED
        for checkpoint, then in draw.sample(moments, len(moments)):
            machine.rollback(first)
            machine.start()
            machine.pause()  # and its disk with it, which would go on with what is in its ring
            machine.rollback(checkpoint)
            assert image.read_bytes() == then
            machine.resume()
            assert machine.wait(20).code == PASSED
            assert image.read_bytes() == whole
        assert len({then for _, then in moments}) > 1


def test_clones_and_restored_machines_go_on_with_disks_of_their_own(
    guest: Callable[[str], str], image: Path, tmp_path: Path
) -> None:
    with writer(guest("blk_rw"), Disk(str(image), iops=200)) as machine:
        machine.start()
        while taken(machine) < 10:
            pass
        machine.pause()
        then = image.read_bytes()
        machine.snapshot(tmp_path / "snapshot").close()
        clones = machine.clone(2)
        restored = Machine.restore(tmp_path / "snapshot")
        try:
            for other in (*clones, restored):
                assert other.run(20).code == PASSED
            assert image.read_bytes() == then
            machine.resume()
            assert machine.wait(20).code == PASSED
            assert image.read_bytes() != then
        finally:
            for other in (*clones, restored):
                other.close()
    assert (tmp_path / "snapshot" / "disk0-0.img").read_bytes() == then
