"""What every image kind is given: the image, the guest memory to put it in, and what to tell the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import e820, places
from vmm.boot.claims import Claims
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmm.boot.claims import GuestRam
    from vmm.boot.image import Image


class Request:
    """One boot. ``cmdline`` is encoded, ``memory_map`` is (address, size, e820 type) and ascending."""

    __slots__ = ("acpi_rsdp", "claims", "cmdline", "image", "initrds", "memory_map", "notes")

    def __init__(
        self,
        memory: GuestRam,
        image: Image,
        cmdline: str,
        initrds: Sequence[Image],
        acpi_rsdp: int,
        reserved: Iterable[tuple[int, int, int]],
        fresh: bool,
    ) -> None:
        self.image = image
        self.claims = Claims(memory, image.name, fresh)
        self.cmdline = cmdline.encode("utf-8", "surrogateescape")
        if b"\0" in self.cmdline:
            raise ConfigError("the kernel command line contains a NUL character; remove it")
        self.initrds = initrds
        self.acpi_rsdp = acpi_rsdp
        reserved = list(reserved)
        self.memory_map = e820.memory_map(memory.regions, reserved)
        for gpa, size, _ in reserved:
            # Only what lies in RAM can be overwritten by an image; windows outside it are just announced.
            if any(start <= gpa and gpa + size <= start + length for start, length in memory.regions):
                self.claims.claim(gpa, size, "reserved memory")
        self.notes: list[str] = []

    def put_cmdline(self, text: bytes, limit: int) -> int:
        """Write the command line and a NUL; returns its address. ConfigError: longer than ``limit`` bytes."""
        limit = min(limit, places.CMDLINE_ROOM - 1)
        if len(text) > limit:
            raise ConfigError(
                f"the kernel command line is {len(text)} bytes long, more than the {limit} that "
                f"{self.image.name} takes; shorten it"
            )
        gpa = self.claims.place(places.CMDLINE, len(text) + 1, "the command line")
        self.claims.memory.write(gpa, text + b"\0")
        return gpa

    def place_start_info(self, what: str) -> tuple[int, int]:
        """Room for the start information of a boot protocol, a page, and after it for its tables; both addresses."""
        gpa = self.claims.place(places.START_INFO, places.START_TABLES_END - places.START_INFO, what)
        return gpa, gpa + places.START_TABLES - places.START_INFO
