"""isa-debug-exit: a port that ends the run with a number of the guest's choosing.

======  ==================================================================================
offset  register
======  ==================================================================================
0..3    write ``v``: end the run; the exit status is ``(v << 1) | 1``, so it is never 0
======  ==================================================================================

Source: QEMU's ``isa-debug-exit`` with ``iosize=4``, customarily at port 0xf4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State


class DebugExit(Device):
    """Call ``on_exit(v)`` with the value written; the exit status of the run is ``(v << 1) | 1``."""

    name = "debug-exit"
    registers = {0: "exit"}

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Reads as zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run."""
        self._on_exit(value)

    def save(self) -> State:
        """It remembers nothing."""
        return {"version": 1}

    def load(self, state: State) -> None:
        """Take a version 1 state. Raises ``ValueError`` for anything else."""
        checked(self.name, state, {})
