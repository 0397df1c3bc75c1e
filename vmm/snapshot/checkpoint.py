"""Checkpoints in process: keep a machine's state in memory, and roll back to it.

The cost of a roll-back is proportional to what changed since: written pages, states of vCPUs and devices, written disk
clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from vmm._ffi import vmm_vm
    from vmm.console import Console
    from vmm.devices.device import Device


NOTHING = {"version": 1}  # the state of a device that has none


class Checkpoint:
    """A checkpoint, as :meth:`vmm.Machine.checkpoint` returns it; :meth:`vmm.Machine.rollback` can use it repeatedly.

    It holds a copy of the memory that the guest had touched: :meth:`close` it, or use it as a context manager. It is
    closed with its machine. ``vm`` is the native machine, which is paused; :meth:`close` calls ``closed(checkpoint)``.
    """

    def __init__(
        self, vm: vmm_vm, devices: Sequence[Device], console: Console, *, closed: Callable[[Checkpoint], None]
    ) -> None:
        self._when_closed: Callable[[Checkpoint], None] | None = closed
        self._console = console
        self._native: Any = None
        self._disks: list[Any] = []
        self.pages = 0
        """Pages that the last roll-back copied."""
        try:
            # Quiescing devices completes requests, which writes memory: do it before anything is copied.
            states = [(device, device.capture()) for device in devices]
            self._states: list[tuple[Device, Any]] = [(device, state) for device, state in states if state != NOTHING]
            self._input = console.pending()
            self._disks = [undo for device in devices if (undo := device.checkpoint()) is not None]
            out = ffi.new("vmm_checkpoint **")
            check(lib.vmm_checkpoint_create(vm, out))
            self._native = out[0]
        except BaseException:
            self.close()
            raise

    def roll_back(self) -> None:
        """Restore the state into the machine, which must not run. For :meth:`vmm.Machine.rollback`."""
        if self._native is None:
            raise StateError("the checkpoint is closed: make another")
        # Reset devices first: requests in flight may still write memory. Load them before the chips: they drive lines.
        for device, state in self._states:
            device.roll_back(state)
        self.pages = check(lib.vmm_checkpoint_roll_back_memory(self._native))
        for undo in self._disks:
            undo.rollback()
        self._console.rewind(self._input)
        check(lib.vmm_checkpoint_roll_back_processors(self._native))

    @property
    def closed(self) -> bool:
        """Whether the checkpoint is closed."""
        return self._native is None

    def close(self) -> None:
        """Release the copy. Idempotent."""
        native, self._native = self._native, None
        if native is not None:
            lib.vmm_checkpoint_destroy(native)
        disks, self._disks = self._disks, []
        for undo in disks:
            undo.close()
        when_closed, self._when_closed = self._when_closed, None
        if when_closed is not None:
            when_closed(self)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
