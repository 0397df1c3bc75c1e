"""Guest memory by guest-physical address: every access is checked once, against the regions."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.errors import GuestMemoryError, HostError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmm._ffi import vmm_vm

INT3 = 0xCC
PAGE = 4096
_PIECE = 4 << 20  # bytes that are searched at once


class GuestMemory:
    """RAM of a machine: regions backed by memfds, mapped once into this process.

    ``regions`` lists ``(gpa, size)`` in bytes, ascending. ``files``, one ``(fd, offset)`` for each region, are mapped
    privately as their initial content; they are not written, and must not change. All methods raise
    :class:`~vmm.errors.GuestMemoryError` for a range that is not inside one region.
    """

    def __init__(
        self,
        vm: vmm_vm,
        regions: Sequence[tuple[int, int]],
        *,
        huge_pages: bool = False,
        files: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._vm: vmm_vm | None = vm
        self.regions = list(regions)
        self.memfds: list[int] = []
        self._maps: list[tuple[int, int, memoryview]] = []
        self.planted: dict[int, int] = {}  # address of each INT3 a debugger planted -> the guest's own byte
        self.private = files is not None
        """Whether the mapping is private, over files that other machines may share: no other process sees writes."""
        self._offsets = [offset for _, offset in files] if files else [0] * len(self.regions)
        for number, (gpa, size) in enumerate(self.regions):
            try:
                host = self._add_file(gpa, size, *files[number]) if files else self._add(gpa, size, huge_pages)
            except (HostError, OSError) as error:
                hint = "reserve huge pages (vm.nr_hugepages) or leave them off" if huge_pages else "ask for less"
                raise HostError(f"cannot map {size >> 20} MiB of guest memory ({error}): {hint}") from error
            self._maps.append((gpa, gpa + size, memoryview(ffi.buffer(host, size)).cast("B")))

    def _open_vm(self) -> vmm_vm:
        if self._vm is None:
            raise StateError("the machine is closed, and its memory with it: read it before that")
        return self._vm

    def _add(self, gpa: int, size: int, huge_pages: bool) -> Any:
        host, memfd = ffi.new("void **"), ffi.new("int *")
        check(
            lib.vmm_vm_add_memory(self._open_vm(), gpa, size, lib.VMM_MEMORY_HUGE_2M if huge_pages else 0, host, memfd)
        )
        if huge_pages:  # taken from the pool now: a later fault with the pool empty raises SIGBUS
            os.posix_fallocate(memfd[0], 0, size)
        self.memfds.append(memfd[0])
        return host[0]

    def _add_file(self, gpa: int, size: int, fd: int, offset: int) -> Any:
        host = ffi.new("void **")
        check(lib.vmm_vm_add_memory_file(self._open_vm(), gpa, size, fd, offset, 0, host))
        return host[0]

    def freeze(self) -> list[tuple[int, int]]:
        """Freeze the content of memory; return ``(fd, offset)`` of each region, for other machines' ``files``.

        This machine continues with private pages over them. Call it once, while the machine is paused, and not if its
        own memory came from files. The descriptors stay the machine's.
        """
        fds = ffi.new("int[]", len(self.regions))
        check(lib.vmm_vm_freeze_memory(self._open_vm(), fds))
        self.private = True
        return [(int(fd), 0) for fd in fds]

    def backing(self) -> list[tuple[int, int, memoryview, int, int, bool]]:
        """Return each region's gpa, size, view, backing file, offset in it, and whether the mapping is private."""
        return [
            (start, end - start, mapped, check(lib.vmm_vm_memory_fd(self._open_vm(), number)), offset, self.private)
            for number, ((start, end, mapped), offset) in enumerate(zip(self._maps, self._offsets, strict=True))
        ]

    @property
    def size(self) -> int:
        """Total bytes of RAM."""
        return sum(size for _, size in self.regions)

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a writable view of ``size`` bytes at ``gpa``: the guest's memory itself, no copy.

        It is valid until the machine is closed. The range is marked dirty now; call :meth:`wrote` after each later
        write through the view.
        """
        found = self._view(gpa, size)
        self.wrote(gpa, size)
        return found

    def _view(self, gpa: int, size: int) -> memoryview:
        for start, end, mapped in self._maps:
            if start <= gpa < end and 0 <= size <= end - gpa:
                return mapped[gpa - start : gpa - start + size]
        self._open_vm()
        raise GuestMemoryError(gpa, size)

    def wrote(self, gpa: int, size: int) -> None:
        """Mark the range as written in every dirty log; checkpoints, snapshots and migration depend on it."""
        lib.vmm_vm_dirty(self._open_vm(), gpa, size)

    def dirty_log(self) -> DirtyLog:
        """Open a log of the pages written from now on. Call it while the machine is paused or not started."""
        return DirtyLog(self._open_vm(), self.regions)

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of ``size`` bytes at ``gpa``, without the breakpoints a debugger has planted there."""
        found = self._view(gpa, size)
        if not self.planted:
            return bytes(found)
        data = bytearray(found)
        for at, byte in self.planted.items():
            if gpa <= at < gpa + size:
                data[at - gpa] = byte
        return bytes(data)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``. Breakpoints planted there stay."""
        self._view(gpa, len(data))[:] = data
        self.wrote(gpa, len(data))
        for at in self.planted:
            if gpa <= at < gpa + len(data):
                self.planted[at] = data[at - gpa]
                self.view(at, 1)[0] = INT3

    @contextlib.contextmanager
    def without_breakpoints(self) -> Iterator[None]:
        """Put the guest's own bytes back in place of planted breakpoints for the block; no vCPU may run meanwhile."""
        for gpa, byte in self.planted.items():
            self._view(gpa, 1)[0] = byte
            self.wrote(gpa, 1)
        try:
            yield
        finally:
            for gpa in self.planted:
                self.planted[gpa] = self._view(gpa, 1)[0]
                self._view(gpa, 1)[0] = INT3
                self.wrote(gpa, 1)

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """Set ``size`` bytes at ``gpa`` to ``byte``."""
        self._view(gpa, size)[:] = bytes([byte]) * size
        self.wrote(gpa, size)

    def array(self, gpa: int, size: int, dtype: str = "u1") -> Any:
        """Return a numpy array over ``size`` bytes at ``gpa`` that shares the guest's memory."""
        import numpy

        return numpy.frombuffer(self.view(gpa, size), dtype=dtype)

    def search(
        self, pattern: bytes, start: int = 0, end: int | None = None, *, spend: Callable[[int], object] | None = None
    ) -> int | None:
        """Return the lowest gpa in ``[start, end)`` where ``pattern`` lies within one region, or ``None``.

        ``spend(n)`` is called for each ``n`` bytes searched, and may end the search by raising.
        """
        import re

        compiled = re.compile(re.escape(pattern), re.DOTALL)
        for number in range(len(self.regions)):
            for gpa, size in self.in_use(number, start):
                low = max(start, gpa)
                high = gpa + size if end is None else min(end, gpa + size)
                while low < high:  # in pieces: a signal or a budget can end the search between two
                    n = min(_PIECE + len(pattern) - 1, high - low)
                    found = compiled.search(self._view(low, n))
                    if spend is not None:
                        spend(found.end() if found else n)
                    if found:
                        return low + found.start()
                    low += _PIECE
                if end is not None and high == end:
                    break
        return None

    def in_use(self, number: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(gpa, size)`` of the extents of a region that are not holes, from ``start`` (a gpa) on. Reading a
        hole would allocate its pages."""
        gpa, size = self.regions[number]
        at = max(0, (start - gpa) & ~(PAGE - 1))
        while at < size:
            try:
                first = at if self.private else os.lseek(self.memfds[number], at, os.SEEK_DATA)
            except OSError:  # ENXIO: no further extent
                return
            at = size if self.private else os.lseek(self.memfds[number], first, os.SEEK_HOLE)
            yield gpa + first, at - first

    def close(self) -> None:
        """Release the views; the machine calls it before it unmaps the memory."""
        self._maps.clear()
        self._vm = None


class DirtyLog:
    """Dirty log: the pages of guest memory written since it was opened, or since the last :meth:`take`.

    It has the writes of the guest, of devices, and of :class:`GuestMemory`'s methods. Raises
    :class:`~vmm.errors.HostError` where KVM refuses to log.
    """

    def __init__(self, vm: vmm_vm, regions: Sequence[tuple[int, int]]) -> None:
        self._regions = regions
        out = ffi.new("vmm_dirty **")
        check(lib.vmm_dirty_open(vm, out))
        self._log: Any = out[0]

    def collect(self) -> int:
        """Merge KVM's dirty bitmap and the VMM's own writes; return the number of pages in the log."""
        return check(lib.vmm_dirty_collect(self._log))

    def take(self) -> list[tuple[int, int]]:
        """Return the ranges ``(gpa, size)`` of pages in the log, ascending, and clear it. Does not merge: see
        :meth:`collect`."""
        ranges: list[tuple[int, int]] = []
        for number, (gpa, size) in enumerate(self._regions):
            words = (size // PAGE + 63) // 64
            bitmap = ffi.new("uint64_t[]", words)
            if check(lib.vmm_dirty_take(self._log, number, bitmap, words)):
                bits = int.from_bytes(ffi.buffer(bitmap), "little")
                ranges += [(gpa + first * PAGE, n * PAGE) for first, n in runs_of(bits)]
        return ranges

    def close(self) -> None:
        """Close the log, before the machine is closed. Idempotent."""
        if self._log is not None:
            lib.vmm_dirty_close(self._log)
            self._log = None


def runs_of(bits: int) -> Iterator[tuple[int, int]]:
    """Yield ``(first, length)`` of the runs of ones, from the lowest bit up."""
    text = f"{bits:b}"[::-1]
    at = text.find("1")
    while at >= 0:
        end = text.find("0", at)
        end = len(text) if end < 0 else end
        yield at, end - at
        at = text.find("1", end)
