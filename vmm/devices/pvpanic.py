"""pvpanic: how a guest kernel says that it has panicked.

======  ===============================================================================
offset  register
======  ===============================================================================
0       read: events this device understands; write: events that have happened
======  ===============================================================================

Events: bit 0 panicked, bit 1 a crash kernel was loaded and will run, bit 2 orderly shutdown.
Source: QEMU's docs/specs/pvpanic; the ISA flavour, customarily at port 0x505.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

PANICKED, CRASH_LOADED, SHUTDOWN = 1, 2, 4


class Pvpanic(Device):
    """Calls ``on_event(bits)`` with the understood bits of each write; nothing when there are none."""

    name = "pvpanic"
    registers = {0: "events"}

    def __init__(self, on_event: Callable[[int], None], supported: int = PANICKED | CRASH_LOADED | SHUTDOWN) -> None:
        self._on_event = on_event
        self._supported = supported

    def read(self, offset: int, size: int) -> int:
        """The events understood."""
        return self._supported if offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Report events."""
        events = value & self._supported
        if offset == 0 and events:
            self._on_event(events)

    def save(self) -> State:
        """It remembers nothing: what a driver negotiates is in ``supported``, which is the machine's."""
        return {"version": 1}

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})
