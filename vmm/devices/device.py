"""The device contract.

A device implements reads and writes by ``(offset, size)``. It knows no address, no interrupt number and no machine:
the machine's layout attaches it to a range, gives it a :class:`Line`, and asks it to describe itself to the guest.
An empty subclass is legal: it reads as all-ones and ignores writes, as unclaimed space does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vmm.boot.acpi import Tables

State = dict[str, Any]
"""A versioned plain value: ints, bytes, strings, lists and dicts of them."""


class Undo(Protocol):
    """The way back for what a device holds outside its :meth:`Device.save`: the content of a disk."""

    def rollback(self) -> int:
        """Go back to when it was made, as often as wanted. Answers how much was changed, in the device's own unit;
        0: nothing. The machine is paused."""
        ...

    def close(self) -> None:
        """Give it up. A second close does nothing."""
        ...


class Line(Protocol):
    """An interrupt line: level-triggered by :meth:`raise_`/:meth:`lower`, edge by :meth:`pulse`."""

    def raise_(self) -> None: ...

    def lower(self) -> None: ...

    def pulse(self) -> None: ...


class Unconnected:
    """The line of a device that was given none: it goes nowhere."""

    def raise_(self) -> None:
        """Do nothing."""

    def lower(self) -> None:
        """Do nothing."""

    def pulse(self) -> None:
        """Do nothing."""


UNCONNECTED = Unconnected()


class Device:
    """One device model. Subclass and override what the device does."""

    name: str = "device"
    """Short name, unique in a machine; what traces and errors call it."""
    registers: dict[int, str] = {}
    """Offset -> register name, for traces."""
    line: Line = UNCONNECTED
    """The interrupt line, set when the device is attached."""

    def read(self, offset: int, size: int) -> int:
        """Answer a guest read of ``size`` bytes (1, 2, 4 or 8) at ``offset``; bits above ``size`` are dropped."""
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a guest write of ``size`` bytes (1, 2, 4 or 8) at ``offset``; ``0 <= value < 2**(8*size)``."""

    def reset(self) -> None:
        """Return to the power-on state."""

    def save(self) -> State:
        """Everything the device remembers, as a plain value with a ``version``."""
        return {"version": 1}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for a state no such device can be in."""

    def checkpoint(self) -> Undo | None:
        """A way back for what :meth:`save` does not hold; ``None``: there is nothing. The machine is paused."""
        return None

    def capture(self) -> Any:
        """Return the state in the fastest form, for :meth:`roll_back` of this same device."""
        return self.save()

    def roll_back(self, captured: Any) -> None:
        """Become what :meth:`capture` recorded, as often as one likes."""
        self.load(captured)

    def set_back(self, ns: int) -> None:
        """A clock that goes by the host's time of day shows that of ``ns`` nanoseconds ago from now on."""

    def describe(self, tables: Tables) -> None:
        """Tell the guest that this device exists: ACPI objects, kernel command line."""
