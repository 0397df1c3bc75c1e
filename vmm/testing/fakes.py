"""Test doubles for a device's surroundings: a recording interrupt line, a console in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeLine:
    """An interrupt line that records its levels: ``levels`` is the history, ``level`` the present one."""

    def __init__(self) -> None:
        self.level = 0
        self.levels: list[int] = []

    def raise_(self) -> None:
        """Record 1."""
        self.level = 1
        self.levels.append(1)

    def lower(self) -> None:
        """Record 0."""
        self.level = 0
        self.levels.append(0)

    def pulse(self) -> None:
        """Record 1, then 0."""
        self.raise_()
        self.lower()

    @property
    def edges(self) -> int:
        """Number of rising edges."""
        return sum(now > before for before, now in zip([0, *self.levels], self.levels, strict=False))


class FakeConsole:
    """A :class:`vmm.devices.uart.SerialConsole` in memory.

    ``output`` has all bytes the guest sent. ``put`` returns false once ``room`` bytes were stored since the last
    :meth:`make_room` (``None``: it never refuses).
    """

    def __init__(self, room: int | None = None) -> None:
        self.output = bytearray()
        self.input = bytearray()
        self.room = room
        self._held = 0
        self._refused = False
        self._on_input: Callable[[], None] = lambda: None
        self._on_room: Callable[[], None] = lambda: None

    # -- host side --------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Queue bytes for the guest."""
        self.input += data
        self._on_input()

    def make_room(self) -> None:
        """Accept ``room`` further bytes, and call the listener."""
        self._held = 0
        if self._refused:
            self._refused = False
            self._on_room()

    # -- device side ------------------------------------------------------------------------------------------

    def put(self, byte: int) -> bool:
        """Append to ``output`` if there is room."""
        if self.room is not None and self._held >= self.room:
            self._refused = True
            return False
        self._held += 1
        self.output.append(byte)
        return True

    def get(self) -> int | None:
        """Remove and return the first byte of ``input``, or ``None``."""
        return self.input.pop(0) if self.input else None

    def unget(self, data: bytes) -> None:
        """Put bytes back before ``input``."""
        self.input[:0] = data

    def listen(self, on_input: Callable[[], None], on_room: Callable[[], None]) -> None:
        """Set the callbacks for new input and new room."""
        self._on_input, self._on_room = on_input, on_room
