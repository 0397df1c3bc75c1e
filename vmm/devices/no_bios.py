"""The port on which the stubs that stand where a BIOS would be say that one was called (vmm/boot/bios.py).

======  ==================================================================
offset  register
======  ==================================================================
0       write: the guest used a vector that it has not set
======  ==================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State


class NoBios(Device):
    """Calls ``on_call`` when a stub, or anything else, writes."""

    name = "no-bios"
    registers = {0: "called"}

    def __init__(self, on_call: Callable[[], None]) -> None:
        self._on_call = on_call

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run."""
        self._on_call()

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})
