"""The ports on which the stubs that stand where a BIOS would be report that one was called (vmm/boot/bios.py).

offset  register
======  ==================================================================
0       write: the guest used a vector that it has not set
======  ==================================================================
=======
======  =====  ==================================================================
offset  bytes  register
======  =====  ==================================================================
0       1      write: end the run
1       2      write: a call that returned with CF set; vector, and AH above it
======  =====  ==================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State

_CALLS_MAX = 16  # different ones kept: the guest chooses what it writes


class NoBios(Device):
    """Calls ``on_call`` when the guest, in a stub or elsewhere, writes to register 0.

    ``calls`` are the calls that returned, each (vector, AH) once, in order. They are not part of the device's state.
    """

    name = "no-bios"
    registers = {0: "called", 1: "call"}

    def __init__(self, on_call: Callable[[], None]) -> None:
        self._on_call = on_call
        self.calls: list[tuple[int, int]] = []

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run, or keep the call."""
        if offset == 0:
            self._on_call()
        elif (offset, size) == (1, 2):
            call = (value & 0xFF, value >> 8)
            if call not in self.calls and len(self.calls) < _CALLS_MAX:
                self.calls.append(call)

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})
