"""A guest that does its worst between a checkpoint and the way back to it: all is as it was, again and again."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples

from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmm import Machine
    from vmm.devices.device import State

COUNT = 0x200000
SPIN = bytes.fromhex("ff042500002000ebf7")  # again: inc dword [0x200000]; jmp again
ENDS = {
    "halts": "f4", "halts for good": "faf4", "dies of an exception": "0f0b", "breaks": "cc", "goes on": "ebfe",
    "resets": "66baf90cb006ee", "says something": "66baf803b041ee",
}  # fmt: skip
MIB = 1 << 20
RINGS = 8 * MIB
MEMORY = 32 * MIB


def steady(machine: Machine) -> State:
    """The machine's state but for what time makes of it."""
    state = machine.save()
    chips = state["processors"]["chips"]
    chips["clock"] = chips["realtime"] = 0
    for channel in chips["pit"]["channels"]:
        channel["count_load_time"] = 0
    for vcpu in state["processors"]["vcpus"]:
        vcpu["tsc"] = 0
    for clock in ("pm-timer", "rtc"):
        state["devices"].pop(clock, None)
    return state


class Mischief:
    """What any guest can do to its machine, at random: registers, rings, buffers, doorbells."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine = machine
        self.chance = random.Random(seed)
        self.drivers = []
        for n, device in enumerate(machine.virtio):
            arena = (RINGS + 2 * n * MIB, RINGS + (2 * n + 2) * MIB)
            self.drivers.append(VirtioDriver.of(machine, device, arena=arena))
            self.drivers[-1].start()

    def code(self) -> bytes:
        """Something to run: instructions at random, or the ways to end."""
        if self.chance.random() < 0.5:
            return self.chance.randbytes(64)
        return bytes.fromhex(self.chance.choice(list(ENDS.values())))

    def access(self) -> None:
        """A read or a write of some register, wherever its device is now."""
        machine, chance = self.machine, self.chance
        range_ = chance.choice(list(machine.bus.attachments.values()))
        size = chance.choice([1, 2, 4])
        offset = chance.randrange(chance.choice([min(range_.size, 64), range_.size]))
        if range_.size > MIB:  # ECAM: devices of the first bus, and their first registers
            offset = chance.randrange(8) << 15 | chance.randrange(256)
        if range_.base + offset >= 1 << 64:  # a BAR that is being sized
            return
        if chance.random() < 0.3:
            machine.bus.read(range_.space, range_.base + offset, size)
            return
        value = chance.choice([0, 1, 0xFF, 0xFFFFFFFF, chance.getrandbits(32), 1 << chance.randrange(32)])
        machine.bus.write(range_.space, range_.base + offset, size, value & ((1 << 8 * size) - 1))

    def spoil(self) -> None:
        """Bytes in the rings and buffers of some device."""
        at = RINGS + self.chance.randrange(len(self.drivers) * MIB) * 2
        self.machine.memory.write(at, self.chance.randbytes(self.chance.choice([2, 8, 64])))

    def kick(self) -> None:
        """Doorbells, also of queues that do not run any more."""
        for driver in self.drivers:
            for queue in driver.rings:
                driver.kick(queue, always=True)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_a_machine_is_what_it_was_after_any_mischief(
    flat: Callable[..., Machine], tmp_path: Path, transport: str
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(MIB))
    parts: dict[str, Any] = {"disks": [str(disk)], "nets": [f"socket={tmp_path}/net"], "vsock": f"{tmp_path}/vsock"}
    machine = flat(SPIN, memory="32M", cpus=2, virtio=transport, balloon=True, console_device="virtio", **parts)
    machine.load()
    guest = Mischief(machine, seed=5)
    entry = machine.vcpus[0].registers()["rip"]
    assert machine.memory.read(entry, len(SPIN)) == SPIN
    checkpoint = machine.checkpoint()
    state, memory, content = steady(machine), machine.memory.read(0, MEMORY), disk.read_bytes()
    for _ in range(examples(100)):
        if guest.chance.random() < 0.7:
            machine.memory.write(entry, guest.code())
            machine.start()
        for _ in range(guest.chance.randrange(20)):
            guest.access()
        for _ in range(guest.chance.randrange(6)):
            guest.spoil()
        if guest.chance.random() < 0.5:
            guest.kick()
        machine.rollback(checkpoint)  # while it runs, or has ended
        machine.pause()
        machine.rollback(checkpoint)
        assert steady(machine) == state
        assert machine.memory.read(0, MEMORY) == memory
        assert disk.read_bytes() == content
        machine.resume()
        if machine.running:
            machine.stop()
        machine.rollback(checkpoint)
    machine.start()
    deadline = time.monotonic() + 60
    while machine.memory.read(COUNT, 4) == bytes(4) and time.monotonic() < deadline:
        pass
    assert machine.memory.read(COUNT, 4) != bytes(4)
