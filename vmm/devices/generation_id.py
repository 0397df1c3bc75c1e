"""The virtual machine generation ID: 16 random bytes in guest memory that are others in every copy of a machine.

A guest that finds them changed knows that what it takes for its own exists twice: keys, random numbers to come,
transaction numbers. Linux (from 5.18, ``CONFIG_VMGENID``) reseeds its random number generator. It has no registers: the
guest is notified of a change by an edge of an interrupt line, on which ACPI's Generic Event Device notifies its driver.

Source: Microsoft, "Virtual Machine Generation ID" (2018); ACPI 6.5, 5.6.9.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from typing import Protocol

    from vmm.boot.acpi import Tables
    from vmm.devices.device import State

    class Memory(Protocol):
        """What the device asks of guest memory."""

        def read(self, gpa: int, size: int, /) -> bytes: ...
        def write(self, gpa: int, data: bytes, /) -> None: ...


SIZE = 16


class GenerationId(Device):
    """The ID at guest-physical ``address``, in a page that the guest uses for nothing else; ``gsi`` is its line's.

    The ID is a part of guest memory, and is saved and put back as that.
    """

    name = "generation-id"

    def __init__(self, memory: Memory, address: int, gsi: int) -> None:
        self._memory = memory
        self._address = address
        self._gsi = gsi

    @property
    def value(self) -> bytes:
        """The ID, 16 bytes."""
        return self._memory.read(self._address, SIZE)

    def place(self, value: bytes | None = None) -> None:
        """Put an ID there, by default a random one, for a guest that has not read one yet."""
        value = os.urandom(SIZE) if value is None else value
        if len(value) != SIZE:
            raise ValueError(f"a generation ID has {SIZE} bytes, not {len(value)}")
        self._memory.write(self._address, value)

    def renew(self, value: bytes | None = None) -> None:
        """Set another ID, by default a random one, and notify the guest."""
        self.place(value)
        self.line.pulse()

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})

    def describe(self, tables: Tables) -> None:
        """The ID's address, and what its line means."""
        tables.add_generation_id(self._address, self._gsi)
