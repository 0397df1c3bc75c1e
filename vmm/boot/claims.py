"""Who has which piece of guest memory while an image is being loaded.

Everything the loader writes is claimed first, so that an image can neither leave RAM nor lie on the tables it
will be started with, whatever its headers say; the error names both parties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import places
from vmm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from vmm.boot.image import Image

    class GuestRam(Protocol):
        """What the loader asks of guest memory (vmm.memory.GuestMemory has it)."""

        @property
        def regions(self) -> Sequence[tuple[int, int]]: ...
        def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None: ...
        def fill(self, gpa: int, size: int, byte: int = 0, /) -> None: ...
        def view(self, gpa: int, size: int, /) -> memoryview: ...


def mib(size: int) -> str:
    """``size`` bytes, rounded up to what a person would put after ``--mem``."""
    return f"{-(-size // places.MIB)}M"


class Claims:
    """The ranges of one guest's memory that are spoken for.

    ``name`` is the image's, for errors. ``fresh`` says that the memory holds nothing but zeros.
    """

    def __init__(self, memory: GuestRam, name: str, fresh: bool = False) -> None:
        self.memory = memory
        self.name = name
        self._fresh = fresh
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
        taken = self._in_the_way(gpa, size)
        if taken is not None:
            start, stop, owner = taken
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

    def place(self, wanted: int, size: int, what: str) -> int:
        """Take ``size`` bytes for ``what``, which may lie anywhere: at ``wanted``, where the image is not there; else
        the highest free pages below 640 KiB, far from what an image has after its end; else the highest of low RAM.

        Returns the address. ImageError: no room.
        """
        gpa = wanted if self.is_free(wanted, size) else self._highest_free(size, places.PAGE, places.EBDA)
        if gpa is None:
            return self.claim_top(size, places.HOLE, what)
        self.claim(gpa, size, what)
        return gpa

    def _highest_free(self, size: int, low: int, high: int) -> int | None:
        """Return the highest unclaimed page-aligned range of low RAM in [low, high)."""
        gpa = (min(high, self.low_end) - size) & -places.PAGE
        while gpa >= low:  # each round goes below a claim that was above before, so it ends
            taken = self._in_the_way(gpa, size)
            if taken is None:
                return gpa
            gpa = (taken[0] - size) & -places.PAGE
        return None

    def _in_the_way(self, gpa: int, size: int) -> tuple[int, int, str] | None:
        return next((taken for taken in self._taken if gpa < taken[1] and taken[0] < gpa + size), None)

    def is_free(self, gpa: int, size: int) -> bool:
        """Whether nothing has been loaded there."""
        return self._in_the_way(gpa, size) is None

    def put(self, gpa: int, data: bytes | bytearray, what: str) -> None:
        """Claim and write."""
        self.claim(gpa, len(data), what)
        self.memory.write(gpa, data)

    def read(self, image: Image, offset: int, gpa: int, size: int) -> None:
        """Copy ``size`` bytes at ``offset`` of ``image`` to a claimed ``gpa``. ImageError: it ends before."""
        if size:
            image.read_into(offset, self.memory.view(gpa, size), zeroed=self._fresh)

    def clear(self, gpa: int, size: int) -> None:
        """Make claimed memory zero; memory that is, is not touched, and so costs nothing."""
        if size and not self._fresh:
            self.memory.fill(gpa, size, 0)

    def claim_top(self, size: int, limit: int, what: str) -> int:
        """Take the highest free page-aligned piece of low RAM from 1 MiB up that ends at or below ``limit``.

        Returns its address. ImageError: no room; says how much memory there would have to be.
        """
        gpa = self._highest_free(size, places.HIGH_RAM, limit)
        if gpa is not None:
            self.claim(gpa, size, what)
            return gpa
        needed = max(places.HIGH_RAM, *(stop for _, stop, _ in self._taken)) + size + places.PAGE
        advice = f"give the guest at least {mib(needed)}" if needed <= min(limit, places.HOLE) else "make it smaller"
        raise ImageError(
            f"{what} of {size} bytes ({mib(size)}) does not fit into guest memory beside what is loaded "
            f"already: RAM for it ends at {min(limit, self.low_end):#x}; {advice}"
        )

    def need_ram(self, gpa: int, size: int, what: str) -> None:
        """ImageError unless [gpa, gpa+size) is RAM."""
        end = gpa + size
        if size == 0 or any(start <= gpa and end <= stop for start, stop in self._regions):
            return
        where = f"{self.name}: {what} needs guest memory {gpa:#x}..{end:#x}"
        if end <= places.HOLE:
            raise ImageError(f"{where}, but RAM ends at {self.low_end:#x}; give the guest at least {mib(end)}")
        if end > 1 << 64:
            raise ImageError(f"{where}, which wraps around the address space; the image is damaged")
        raise ImageError(f"{where}, which is not RAM; link or load it inside 0..{self.low_end:#x}")
