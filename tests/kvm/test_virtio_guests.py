"""Bare-metal guests that drive virtio devices themselves, on both transports."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from effort import PATIENCE

from vmm import layout
from vmm.machine import Machine
from vmm.parts import Disk, Net

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmm.outcome import Outcome

    GuestPath = Callable[[str], str]

PASSED = 0x10  # guests/lib/guest.h
MIB, SECTOR = 1 << 20, 512
TRANSPORTS = ("pci", "mmio")

# Where the devices may be: bare-metal guests read no ACPI names.
PLACES = " ".join(
    f"virtio_mmio.device=4K@{layout.VIRTIO_MMIO_START + slot * layout.VIRTIO_MMIO_STRIDE:#x}:{gsi}"
    for slot, gsi in enumerate(layout.VIRTIO_MMIO_GSIS)
)


def machine(path: str, transport: str, append: str = "", **fields: Any) -> Machine:
    """A machine for a guest that looks for virtio devices."""
    places = PLACES if transport == "mmio" else ""
    return Machine(kernel=path, append=f"{places} {append}", memory="16M", virtio=transport, **fields)


def assert_passed(outcome: Outcome) -> str:
    """The guest's own verdict is that every check held; what it said."""
    text = outcome.console.decode(errors="replace")
    assert (outcome.reason, outcome.code) == ("debug-exit", PASSED), f"{outcome!r}\n{text}"
    return text


def run(path: str, transport: str, append: str = "", **fields: Any) -> str:
    """Run a guest to its end; what it said."""
    with machine(path, transport, append, **fields) as made:
        return assert_passed(made.run(timeout=PATIENCE))


@pytest.mark.parametrize(
    ("transport", "words", "kind"),
    [
        ("mmio", "", "line"),
        ("mmio", "event_idx=1", "line"),
        ("pci", "", "INTx"),
        ("pci", "event_idx=1", "INTx"),
        ("pci", "msix=1 masked=1", "MSI-X"),
        ("pci", "msix=1 event_idx=1", "MSI-X"),
    ],
)
def test_each_request_interrupts_once(guest: GuestPath, transport: str, words: str, kind: str) -> None:
    assert run(guest("virtio_irq"), transport, words).startswith(f"{kind}\n")


# ---- disk ----


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(2 * MIB)
    return path


RINGS = ["", "event_idx=1", "indirect=1", "packed=1", "packed=1 event_idx=1", "packed=1 indirect=1 event_idx=1"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rings", RINGS)
def test_what_a_guest_writes_is_in_the_file_and_comes_back(
    guest: GuestPath, image: Path, transport: str, rings: str
) -> None:
    words = f"sectors={2 * MIB // SECTOR} {rings}"
    assert "id judge\n" in run(guest("blk_rw"), transport, words, disks=Disk(image, serial="judge"))
    content = image.read_bytes()
    for number in range(256):
        written = struct.pack("<512Q", *(number << 32 | index for index in range(512)))
        block = content[number * 4096 : (number + 1) * 4096]
        assert block == (bytes(4096) if number % 3 else written), number
    assert not any(content[256 * 4096 :])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_read_only_disk_says_so_and_refuses_writes(guest: GuestPath, image: Path, transport: str) -> None:
    words = f"sectors={2 * MIB // SECTOR} ro=1"
    run(guest("blk_rw"), transport, words, disks=Disk(image, readonly=True))
    assert image.read_bytes() == bytes(2 * MIB)


def test_a_disk_round_the_page_cache_is_the_same_disk(guest: GuestPath, image: Path) -> None:
    run(guest("blk_rw"), "pci", f"sectors={2 * MIB // SECTOR}", disks=Disk(image, cache="none"))
    assert image.read_bytes()[3 * 4096 : 3 * 4096 + 8] == struct.pack("<Q", 3 << 32)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("packed", [0, 1])
def test_each_broken_rule_of_the_rings_needs_a_reset_and_a_reset_mends_it(
    guest: GuestPath, image: Path, transport: str, packed: int
) -> None:
    said = run(guest("ring_abuse"), transport, f"packed={packed}", disks=Disk(image))
    assert ("a chain without an end" if packed else "a chain in a circle") in said


# ---- link ----


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("words", ["", "mergeable=1", "packed=1"])
def test_two_machines_on_a_link_exchange_frames(guest: GuestPath, tmp_path: Path, transport: str, words: str) -> None:
    path = guest("net_pair")
    net = Net("socket", socket=str(tmp_path / "link"))
    with (
        machine(path, transport, f"role=1 {words}", nets=net) as other,
        machine(path, transport, f"role=0 {words}", nets=net) as lead,
    ):
        other.start()
        lead.start()
        assert_passed(lead.wait(timeout=PATIENCE))
        assert_passed(other.wait(timeout=PATIENCE))
