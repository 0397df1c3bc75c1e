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

    ``regions`` lists ``(gpa, size)`` in bytes, ascending. ``files``, one ``(fd, offset)`` for each region, is where
    their content comes from, when it is first looked at; the files are not written, and must not change. All methods
    raise :class:`~vmm.errors.GuestMemoryError` for a range that is not inside one region.
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
        self.planted: dict[int, int] = {}  # where a debugger put an INT3, and the guest's own byte
        self.private = files is not None
        """Whether no other process sees what the guest writes: it is on files that others may share."""
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
        if huge_pages:  # taken from the pool now: a fault that finds it empty is SIGBUS
            os.posix_fallocate(memfd[0], 0, size)
        self.memfds.append(memfd[0])
        return host[0]

    def _add_file(self, gpa: int, size: int, fd: int, offset: int) -> Any:
        host = ffi.new("void **")
        check(lib.vmm_vm_add_memory_file(self._open_vm(), gpa, size, fd, offset, 0, host))
        return host[0]

    def freeze(self) -> list[tuple[int, int]]:
        """Freeze the memory as it is: files that other machines may start from (``files`` above).

        This machine goes on with private pages over them. While it is paused, once, and not where memory came from
        files. The files are the machine's.
        """
        fds = ffi.new("int[]", len(self.regions))
        check(lib.vmm_vm_freeze_memory(self._open_vm(), fds))
        self.private = True
        return [(int(fd), 0) for fd in fds]

    def backing(self) -> list[tuple[int, int, memoryview, int, int, bool]]:
        """Each region's gpa, size, memory, file behind it, offset in that, and whether what is written stays here."""
        return [
            (start, end - start, mapped, check(lib.vmm_vm_memory_fd(self._open_vm(), number)), offset, self.private)
            for number, ((start, end, mapped), offset) in enumerate(zip(self._maps, self._offsets, strict=True))
        ]

    @property
    def size(self) -> int:
        """Bytes of RAM in all."""
        return sum(size for _, size in self.regions)

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable view of ``size`` bytes at ``gpa``: the guest's memory itself, no copy.

        Valid until the machine is closed. It counts as written now (:meth:`wrote`); say so again of what is written
        through it later.
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
        """Have these bytes in the logs of what changed: checkpoints, snapshots and migration go by them."""
        lib.vmm_vm_dirty(self._open_vm(), gpa, size)

    def dirty_log(self) -> DirtyLog:
        """A log of the pages that change from now on. While the machine is paused or not started."""
        return DirtyLog(self._open_vm(), self.regions)

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of ``size`` bytes at ``gpa``, without the breakpoints a debugger has planted there."""
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
        """The guest's own bytes where a debugger has planted breakpoints, for as long as nothing runs."""
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
        """A numpy array over ``size`` bytes at ``gpa``, sharing the guest's memory."""
        import numpy

        return numpy.frombuffer(self.view(gpa, size), dtype=dtype)

    def search(
        self, pattern: bytes, start: int = 0, end: int | None = None, *, spend: Callable[[int], object] | None = None
    ) -> int | None:
        """The lowest gpa in ``[start, end)`` where ``pattern`` stands within one region, or ``None``.

        ``spend(n)`` is called for each ``n`` bytes that were looked at, and may end the search by raising.
        """
        import re

        compiled = re.compile(re.escape(pattern), re.DOTALL)
        for number in range(len(self.regions)):
            for gpa, size in self.in_use(number, start):
                low = max(start, gpa)
                high = gpa + size if end is None else min(end, gpa + size)
                while low < high:  # piece by piece: a signal or a budget ends it between two
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
        """The parts of a region that are not known to be zero, those behind ``start`` (a gpa), which may lie in the
        first: looking at the others would give them pages."""
        gpa, size = self.regions[number]
        at = max(0, (start - gpa) & ~(PAGE - 1))
        while at < size:
            try:
                first = at if self.private else os.lseek(self.memfds[number], at, os.SEEK_DATA)
            except OSError:  # ENXIO: no more
                return
            at = size if self.private else os.lseek(self.memfds[number], first, os.SEEK_HOLE)
            yield gpa + first, at - first

    def close(self) -> None:
        """Drop the views; called by the machine before the mapping goes."""
        self._maps.clear()
        self._vm = None


class DirtyLog:
    """The pages of guest memory that were written since the log was opened, or since :meth:`take`.

    By the guest, by devices, by :class:`GuestMemory`'s methods. Raises :class:`~vmm.errors.HostError` where KVM
    refuses to log.
    """

    def __init__(self, vm: vmm_vm, regions: Sequence[tuple[int, int]]) -> None:
        self._regions = regions
        out = ffi.new("vmm_dirty **")
        check(lib.vmm_dirty_open(vm, out))
        self._log: Any = out[0]

    def collect(self) -> int:
        """Fetch what was written meanwhile; answers how many pages are in the log now."""
        return check(lib.vmm_dirty_collect(self._log))

    def take(self) -> list[tuple[int, int]]:
        """The ranges ``(gpa, size)`` of pages in the log, ascending; it has them clean from now on. Fetches nothing."""
        ranges: list[tuple[int, int]] = []
        for number, (gpa, size) in enumerate(self._regions):
            words = (size // PAGE + 63) // 64
            bitmap = ffi.new("uint64_t[]", words)
            if check(lib.vmm_dirty_take(self._log, number, bitmap, words)):
                bits = int.from_bytes(ffi.buffer(bitmap), "little")
                ranges += [(gpa + first * PAGE, n * PAGE) for first, n in runs_of(bits)]
        return ranges

    def close(self) -> None:
        """Give it up, before the machine is closed. Twice is fine."""
        if self._log is not None:
            lib.vmm_dirty_close(self._log)
            self._log = None


def runs_of(bits: int) -> Iterator[tuple[int, int]]:
    """``(first, length)`` of the runs of ones, from the lowest bit up."""
    text = f"{bits:b}"[::-1]
    at = text.find("1")
    while at >= 0:
        end = text.find("0", at)
        end = len(text) if end < 0 else end
        yield at, end - at
        at = text.find("1", end)
