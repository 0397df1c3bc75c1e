"""Lazy guest memory, filled on demand through userfaultfd from a snapshot or from another process.

``native/include/vmmlazy.h`` describes the mechanism and the protocol of the socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib, wait
from vmm.errors import SnapshotError, StateError
from vmm.snapshot.regions import words

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from vmm._ffi import vmm_vm
    from vmm.memory import GuestMemory
    from vmm.snapshot.reading import Snapshot
    from vmm.snapshot.regions import Region

_STATES = {
    lib.VMM_LAZY_IDLE: "idle",
    lib.VMM_LAZY_SERVING: "serving",
    lib.VMM_LAZY_LOST: "lost",
    lib.VMM_LAZY_DONE: "done",
    lib.VMM_LAZY_ABANDONED: "abandoned",
}


class LazyMemory:
    """Lazy memory of one machine. It lives as long as the machine.

    Mark the missing pages (:meth:`want_snapshot`, :meth:`want`), call :meth:`start`, and let the machine run: a thread
    that touches a missing page waits for it. It may hold the GIL while it waits, so pages must be served by native
    code (as here) or by another process.

    ``vm`` is the native machine, ``memory`` its memory. Raises :class:`~vmm.errors.HostError` where the host forbids
    userfaultfd, with the fix, and for memory that is private or in huge pages.
    """

    def __init__(self, vm: vmm_vm, memory: GuestMemory) -> None:
        self._memory = memory
        out = ffi.new("vmm_lazy **")
        check(lib.vmm_lazy_create(vm, out))
        self._native: Any = out[0]
        self._touched: list[int] = []

    @property
    def native(self) -> Any:
        """The ``vmm_lazy``. Raises :class:`~vmm.errors.StateError` once the machine is closed."""
        if self._native is None:
            raise StateError("the machine is closed")
        return self._native

    def close(self) -> None:
        """Called by the machine before its native half goes."""
        self.touched()
        self._native = None

    def want_snapshot(self, snapshot: Snapshot) -> None:
        """Fill the memory from the file of ``snapshot`` on demand. Pages of differentials are copied at once."""
        layers = snapshot.layers
        for number, region in enumerate(layers[0].regions):
            later = int.from_bytes(region.held, "little")
            for layer in layers[1:]:
                later &= ~int.from_bytes(layer.regions[number].held, "little")
            self.want(number, region._replace(held=later.to_bytes(len(region.held), "little")))
            check(lib.vmm_lazy_from_file(self.native, number, layers[0].memory_fd, region.offset))
        snapshot.overlay(self._memory.view)

    def want(self, number: int, region: Region) -> None:
        """Mark the pages that ``region`` holds as missing in the machine's region of that number.

        Raises :class:`~vmm.errors.SnapshotError` if the two regions differ.
        """
        if self._memory.regions[number : number + 1] != [(region.gpa, region.size)]:
            raise SnapshotError(
                f"the machine has no memory {region.gpa:#x}+{region.size:#x}, of which pages would come"
            )
        check(lib.vmm_lazy_want(self.native, number, words(region.held)))

    def start(self) -> None:
        """Register with userfaultfd: from now on a thread that touches a missing page waits."""
        check(lib.vmm_lazy_start(self.native))

    def connect(self, source: socket.socket) -> None:
        """Fetch pages from a stream socket, also in place of a lost one. The caller keeps the socket."""
        check(lib.vmm_lazy_connect(self.native, source.fileno()))

    def prefetch(self, gpas: Sequence[int]) -> None:
        """Fetch these pages in this order, behind pages that a thread waits for."""
        from array import array

        check(lib.vmm_lazy_prefetch(self.native, ffi.from_buffer("uint64_t[]", array("Q", gpas)), len(gpas)))

    def fetch_rest(self) -> None:
        """Fetch all other pages afterwards."""
        lib.vmm_lazy_fetch_rest(self.native)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every page has arrived, at most ``timeout`` seconds; return whether it has.

        Raises :class:`~vmm.errors.StateError` when pages are missing for good.
        """
        found = wait(lambda milliseconds: int(lib.vmm_lazy_wait(self.native, milliseconds)), timeout)
        if found < 0:
            raise StateError("guest memory that was still to come will not: its source is gone, so end the machine")
        return bool(found)

    def complete(self) -> None:
        """Fetch all pages and wait. Raises :class:`~vmm.errors.StateError` if the source is gone."""
        self.fetch_rest()
        while not self.wait(0.1):
            if self.state == "lost":
                raise StateError("guest memory is still to come and its source is gone: connect it to another")

    def give_up(self) -> None:
        """Resolve pending faults to zero pages, silently: the machine is about to be closed. Idempotent.

        A device that waits for a page holds its lock, which a reset needs.
        """
        if self._native is not None:
            lib.vmm_lazy_abandon(self._native, ffi.NULL)

    def abandon(self, why: str) -> None:
        """Give up: stop the machine with the message ``why`` and the outcome ``memory-lost``."""
        lib.vmm_lazy_abandon(self.native, why.encode())

    @property
    def state(self) -> str:
        """``idle``, ``serving``, ``lost`` (the guest waits), ``done`` or ``abandoned``."""
        return _STATES[lib.vmm_lazy_state(self.native)]

    @property
    def fd(self) -> int:
        """An eventfd that is readable after each change of :attr:`state`."""
        return int(lib.vmm_lazy_fd(self.native))

    def touched(self) -> list[int]:
        """Return the addresses of pages that a thread waited for, in order. Works after the machine was closed."""
        if self._native is not None:
            count = lib.vmm_lazy_order(self._native, ffi.NULL, 0)
            gpas = ffi.new("uint64_t[]", count)
            self._touched = list(gpas[0 : min(count, lib.vmm_lazy_order(self._native, gpas, count))])
        return list(self._touched)

    def statistics(self) -> dict[str, int]:
        """Return counts: pages wanted, missing, unrequested, duplicate; faults, and nanoseconds spent on the file's."""
        stats = ffi.new("vmm_lazy_stats *")
        lib.vmm_lazy_get_stats(self.native, stats)
        return {name: int(getattr(stats, name)) for name, _ in ffi.typeof("vmm_lazy_stats").fields}
