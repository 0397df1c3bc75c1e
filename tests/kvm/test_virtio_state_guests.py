"""Guests that drive virtio devices and check every answer and interrupt, through roll-backs and moves."""

from __future__ import annotations

import random
import select
import struct
import time
from typing import TYPE_CHECKING

import pytest
from test_virtio_guests import MIB, SECTOR, TRANSPORTS, assert_passed, machine

from vmm.machine import Machine
from vmm.parts import Disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    GuestPath = Callable[[str], str]

ROLL_BACKS = 15
INTERRUPTS = [("mmio", ""), ("mmio", "event_idx=1"), ("pci", ""), ("pci", "msix=1 event_idx=1")]


def answered(made: Machine, device: int = 0) -> int:
    """Requests of a device's first queue since the start; a roll-back does not take them back."""
    return made.virtio[device].queue_statistics()[0]["requests"]


def proceed(made: Machine, requests: int, device: int = 0) -> None:
    """Let the guest do some more, to its end at most: it may be quicker than who watches it."""
    goal, deadline = answered(made, device) + requests, time.monotonic() + 60
    while answered(made, device) < goal and not select.select([made.stop_fd], [], [], 0.0002)[0]:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(("transport", "words"), INTERRUPTS)
def test_no_interrupt_is_lost_or_doubled_by_a_roll_back(guest: GuestPath, transport: str, words: str) -> None:
    choose = random.Random(1)
    with machine(guest("virtio_irq"), transport, f"requests=2000 {words}") as made:
        made.start()
        proceed(made, choose.randrange(1, 40))
        with made.checkpoint() as checkpoint:
            for _ in range(ROLL_BACKS):
                proceed(made, choose.randrange(1, 40))
                made.rollback(checkpoint)
        assert_passed(made.wait(timeout=120))


@pytest.mark.parametrize(("transport", "words"), INTERRUPTS)
def test_no_interrupt_is_lost_or_doubled_by_a_move(
    guest: GuestPath, transport: str, words: str, tmp_path: Path
) -> None:
    choose = random.Random(2)
    made = machine(guest("virtio_irq"), transport, f"requests=2000 {words}")
    made.start()
    try:
        for move in range(4):
            proceed(made, choose.randrange(1, 20))
            made.pause()
            made.snapshot(tmp_path / str(move)).close()
            made.close()
            made = Machine.restore(tmp_path / str(move))
            made.start()
        assert_passed(made.wait(timeout=120))
    finally:
        made.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("cache", ["writeback", "none"])  # without the page cache most requests are under way
@pytest.mark.parametrize("rings", ["", "packed=1 indirect=1 event_idx=1"])
def test_a_disk_s_guest_finds_what_it_wrote_through_roll_backs(
    guest: GuestPath, tmp_path: Path, transport: str, rings: str, cache: str
) -> None:
    choose = random.Random(3)
    image = tmp_path / "disk"
    image.write_bytes(bytes(2 * MIB))
    words = f"sectors={2 * MIB // SECTOR} rounds=40 {rings}"
    with machine(guest("blk_rw"), transport, words, disks=Disk(image, cache=cache)) as made:
        disk = next(n for n, device in enumerate(made.virtio) if device.device_id == 2)
        made.start()
        proceed(made, choose.randrange(1, 30), disk)
        with made.checkpoint() as checkpoint:
            for _ in range(ROLL_BACKS):
                proceed(made, choose.randrange(1, 30), disk)
                made.rollback(checkpoint)
        assert_passed(made.wait(timeout=120))
    content = image.read_bytes()
    for number in range(0, 256, 3):
        block = content[number * 4096 : (number + 1) * 4096]
        assert block == struct.pack("<512Q", *(39 << 48 | number << 32 | index for index in range(512)))
