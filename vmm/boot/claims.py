"""Who has which piece of guest memory while an image is being loaded.

Everything the loader writes is claimed first, so that an image can neither leave RAM nor lie on the tables it will
be started with, whatever its headers say; the error names both parties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import layout
from vmm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class GuestRam(Protocol):
        """What the loader asks of guest memory (vmm.memory.GuestMemory has it)."""

        @property
        def regions(self) -> Sequence[tuple[int, int]]: ...
        def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None: ...
        def fill(self, gpa: int, size: int, byte: int = 0, /) -> None: ...
        def view(self, gpa: int, size: int, /) -> memoryview: ...


def mib(size: int) -> str:
    """``size`` bytes, rounded up to what a person would put after ``--mem``."""
    return f"{-(-size // layout.MIB)}M"


class Claims:
    """The ranges of one guest's memory that are spoken for. ``name`` is the image's, for errors."""

    def __init__(self, memory: GuestRam, name: str) -> None:
        self.memory = memory
        self.name = name
        self._regions = [(gpa, gpa + size) for gpa, size in memory.regions if size]
        self._taken: list[tuple[int, int, str]] = []
        if not self._regions or self._regions[0][0] != 0:
            raise ConfigError("guest memory has no RAM at address 0: images cannot be loaded")

    @property
    def low_end(self) -> int:
        """End of the RAM that starts at 0: nothing is loaded above it but what asks for an address there."""
        return self._regions[0][1]

    def claim(self, gpa: int, size: int, what: str) -> None:
        """Take [gpa, gpa+size) for ``what``. ImageError: not RAM, or already taken."""
        self.need_ram(gpa, size, what)
        end = gpa + size
        for start, stop, owner in self._taken:
            if gpa < stop and start < end:
                raise ImageError(
                    f"{self.name}: {what} at {gpa:#x}..{end:#x} overlaps {owner} at {start:#x}..{stop:#x}; "
                    "link or load it elsewhere"
                )
        if size:
            self._taken.append((gpa, end, what))

    def keep_clear(self, gpa: int, size: int, what: str) -> None:
        """Keep initrds out of [gpa, gpa+size), which ``what`` will use once it runs. ImageError: not RAM."""
        self.need_ram(gpa, size, what)
        if size:
            self._taken.append((gpa, gpa + size, what))

    def put(self, gpa: int, data: bytes | bytearray, what: str) -> None:
        """Claim and write."""
        self.claim(gpa, len(data), what)
        self.memory.write(gpa, data)

    def claim_top(self, size: int, limit: int, what: str) -> int:
        """Take the highest free page-aligned ``size`` bytes of low RAM that end at or below ``limit``, from 1 MiB up.

        Returns the address. ImageError: no room; says how much memory there would have to be.
        """
        top = min(limit, self.low_end)
        room = 0
        for start, stop, _ in sorted(self._taken, reverse=True):
            gpa = (top - size) & -layout.PAGE
            if gpa >= max(stop, layout.HIGH_RAM):
                break
            room = max(room, top - max(stop, layout.HIGH_RAM))
            top = min(top, start)
        gpa = (top - size) & -layout.PAGE
        if gpa < layout.HIGH_RAM or any(gpa < stop and start < gpa + size for start, stop, _ in self._taken):
            used = max((stop for _, stop, _ in self._taken), default=layout.HIGH_RAM)
            needed = max(used, layout.HIGH_RAM) + size + layout.PAGE
            advice = f"give the guest at least {mib(needed)}" if needed <= limit else "make it smaller"
            raise ImageError(
                f"{what} of {size:#x} bytes ({mib(size)}) does not fit: {mib(max(room, 0))} are free in one piece "
                f"below {min(limit, self.low_end):#x}; {advice}"
            )
        self.claim(gpa, size, what)
        return gpa

    def need_ram(self, gpa: int, size: int, what: str) -> None:
        """ImageError unless [gpa, gpa+size) is RAM."""
        end = gpa + size
        if size == 0 or any(start <= gpa and end <= stop for start, stop in self._regions):
            return
        where = f"{self.name}: {what} needs guest memory {gpa:#x}..{end:#x}"
        if 0 <= gpa and end <= layout.HOLE:
            raise ImageError(
                f"{where}, but RAM ends at {self.low_end:#x}; give the guest at least {mib(end)}"
            )
        if end > 1 << 64:
            raise ImageError(f"{where}, which wraps around the address space; the image is damaged")
        raise ImageError(f"{where}, which is not RAM; link or load it inside 0..{self.low_end:#x}")
