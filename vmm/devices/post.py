"""POST codes: the port firmware reports its progress on.

======  ================================================================================
offset  register
======  ================================================================================
0       write: a progress code; read: the last one (a spare DMA page register on PCs)
======  ================================================================================

Source: IBM PC/AT Technical Reference, "Manufacturing test port"; customarily port 0x80. Linux writes there too, as
an I/O delay that costs one bus cycle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State


class Post(Device):
    """Keeps the newest ``kept`` codes in :attr:`codes`, oldest first, and tells ``on_code`` each as it comes."""

    name = "post"
    registers = {0: "code"}

    def __init__(self, kept: int = 32, on_code: Callable[[int], None] | None = None) -> None:
        self.codes = bytearray()
        self._kept = kept
        self._on_code = on_code

    def read(self, offset: int, size: int) -> int:
        """The last code, or zero."""
        return self.codes[-1] if self.codes and offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Remember a code."""
        if offset != 0:
            return
        self.codes.append(value & 0xFF)
        del self.codes[: -self._kept]
        if self._on_code is not None:
            self._on_code(value & 0xFF)

    def reset(self) -> None:
        """Forget all codes."""
        self.codes.clear()

    def save(self) -> State:
        """The codes kept."""
        return {"version": 1, "codes": bytes(self.codes)}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for more codes than are kept."""
        self.roll_back(checked(self.name, state, {}, {"codes": self._kept})["codes"])

    def capture(self) -> Any:
        """The codes."""
        return bytes(self.codes)

    def roll_back(self, captured: Any) -> None:
        """Have them again."""
        self.codes = bytearray(captured)
