"""A virtio device's state: saved in one machine, taken up in another, nothing lost and nothing done twice."""

from __future__ import annotations

from typing import Any

import pytest

from vmm import Machine
from vmm.testing.ring import VirtioDriver

ARENA = (8 << 20, 16 << 20)


def transport_of(machine: Machine, device: Any) -> Any:
    """The device on the bus that carries ``device``."""
    return next(a.device for a in machine.bus.attachments.values() if getattr(a.device, "device", None) is device)


def save(machine: Machine, device: Any) -> list[Any]:
    """The host of the transport, if there is one, and the transport."""
    host = [machine.pci.save()] if machine.pci else []
    return [*host, transport_of(machine, device).save()]


def load(machine: Machine, device: Any, states: list[Any]) -> None:
    """The same way round."""
    if machine.pci:
        machine.pci.load(states[0])
    transport_of(machine, device).load(states[-1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_another_device_goes_on_where_the_saved_one_stood(transport: str, packed: bool) -> None:
    with Machine(memory="16M", virtio=transport) as one, Machine(memory="16M", virtio=transport) as two:
        rng = one.virtio[0]
        driver = VirtioDriver.of(one, rng, arena=ARENA)
        driver.start(packed=packed)
        for _ in range(70):  # once around the ring
            assert driver.request(0, room=[16]).written == 16
        states = save(one, rng)
        two.memory.write(ARENA[0], one.memory.read(ARENA[0], ARENA[1] - ARENA[0]))
        load(two, two.virtio[0], states)
        assert save(two, two.virtio[0]) == states
        driver.memory, driver.transport.bus = two.memory, two.bus  # type: ignore[attr-defined]
        for ring in driver.rings.values():
            ring.memory = two.memory
        for _ in range(70):
            assert driver.request(0, room=[16]).written == 16
