"""Bare-metal guests that drive virtio devices themselves, on both transports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vmm import layout
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.outcome import Outcome

    GuestPath = Callable[[str], str]

PASSED = 0x10  # guests/lib/guest.h
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
    """Run a guest to its end, 20 seconds at most; what it said."""
    with machine(path, transport, append, **fields) as made:
        return assert_passed(made.run(timeout=20))


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
