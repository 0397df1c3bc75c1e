"""A bytearray-backed guest memory: the contract of vmm.memory.GuestMemory, without a machine under it."""

from __future__ import annotations

from vmm.errors import GuestMemoryError

HOLE = 3 << 30
FOUR_GIB = 4 << 30


class FakeMemory:
    """RAM from 0 up to the 3 GiB hole, and ``high`` bytes of it from 4 GiB up."""

    def __init__(self, low: int, high: int = 0) -> None:
        self.regions = [(0, low)] + ([(FOUR_GIB, high)] if high else [])
        self._bytes = {gpa: bytearray(size) for gpa, size in self.regions}

    def view(self, gpa: int, size: int) -> memoryview:
        for start, length in self.regions:
            if start <= gpa and size >= 0 and gpa + size <= start + length:
                return memoryview(self._bytes[start])[gpa - start : gpa - start + size]
        raise GuestMemoryError(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.view(gpa, len(data))[:] = data

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        self.view(gpa, size)[:] = bytes([byte]) * size
