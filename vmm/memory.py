"""Guest memory by guest-physical address: every access is checked once, against the regions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.errors import GuestMemoryError, HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

HUGE_2M = 1
DIRTY_LOG = 2
INT3 = 0xCC


class GuestMemory:
    """RAM of a machine: regions backed by memfds, mapped once into this process.

    ``regions`` lists ``(gpa, size)`` in bytes, ascending. All methods raise
    :class:`~vmm.errors.GuestMemoryError` for a range that is not inside one region.
    """

    def __init__(self, vm: Any, regions: Sequence[tuple[int, int]], *, huge_pages: bool = False) -> None:
        self.regions = list(regions)
        self.memfds: list[int] = []
        self._maps: list[tuple[int, int, memoryview]] = []
        self.planted: dict[int, int] = {}  # where a debugger put an INT3, and the guest's own byte
        host, memfd = ffi.new("void **"), ffi.new("int *")
        for gpa, size in self.regions:
            try:
                check(lib.vmm_vm_add_memory(vm, gpa, size, HUGE_2M if huge_pages else 0, host, memfd))
                if huge_pages:  # taken from the pool now: a fault that finds it empty is SIGBUS
                    os.posix_fallocate(memfd[0], 0, size)
            except (HostError, OSError) as error:
                hint = "reserve huge pages (vm.nr_hugepages) or leave them off" if huge_pages else "ask for less"
                raise HostError(f"cannot map {size >> 20} MiB of guest memory ({error}): {hint}") from error
            self.memfds.append(memfd[0])
            self._maps.append((gpa, gpa + size, memoryview(ffi.buffer(host[0], size)).cast("B")))

    @property
    def size(self) -> int:
        """Bytes of RAM in all."""
        return sum(size for _, size in self.regions)

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable view of ``size`` bytes at ``gpa``: the guest's memory itself, no copy.

        Valid until the machine is closed.
        """
        for start, end, mapped in self._maps:
            if start <= gpa < end and 0 <= size <= end - gpa:
                return mapped[gpa - start : gpa - start + size]
        raise GuestMemoryError(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of ``size`` bytes at ``gpa``, without the breakpoints a debugger has planted there."""
        found = self.view(gpa, size)
        if not self.planted:
            return bytes(found)
        data = bytearray(found)
        for at, byte in self.planted.items():
            if gpa <= at < gpa + size:
                data[at - gpa] = byte
        return bytes(data)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``. Breakpoints planted there stay."""
        self.view(gpa, len(data))[:] = data
        for at in self.planted:
            if gpa <= at < gpa + len(data):
                self.planted[at] = data[at - gpa]
                self.view(at, 1)[0] = INT3

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """Set ``size`` bytes at ``gpa`` to ``byte``."""
        self.view(gpa, size)[:] = bytes([byte]) * size

    def array(self, gpa: int, size: int, dtype: str = "u1") -> Any:
        """A numpy array over ``size`` bytes at ``gpa``, sharing the guest's memory."""
        import numpy

        return numpy.frombuffer(self.view(gpa, size), dtype=dtype)

    def search(self, pattern: bytes, start: int = 0, end: int | None = None) -> int | None:
        """The lowest gpa in ``[start, end)`` where ``pattern`` stands within one region, or ``None``."""
        import mmap

        for (gpa, size), memfd in zip(self.regions, self.memfds, strict=True):
            low = max(start, gpa) - gpa
            high = (size if end is None else min(end, gpa + size) - gpa) if low < size else 0
            if low >= high:
                continue
            with mmap.mmap(memfd, size, prot=mmap.PROT_READ) as mapped:
                at = mapped.find(pattern, low, high)
            if at >= 0:
                return gpa + at
        return None

    def close(self) -> None:
        """Drop the views; called by the machine before the mapping goes."""
        self._maps.clear()
