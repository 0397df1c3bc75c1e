"""Checkpoints in process: a machine's state kept in memory, and the way back to it.

Going back costs what was changed since: the pages that were written, the processors' and devices' states, the clusters
of disks that were written.
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


NOTHING = {"version": 1}  # what a device has to say that remembers nothing


class Checkpoint:
    """What :meth:`vmm.Machine.checkpoint` answers; :meth:`vmm.Machine.rollback` goes back to it, any number of times.

    It holds a copy of the memory the guest had touched: :meth:`close` it, or use it as a context manager. It ends with
    its machine. ``vm`` is the native machine, which is held; ``closed(checkpoint)`` is called by :meth:`close`.
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
            # Devices finish what is in flight, and write memory for it: before anything else.
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
        """Put the machine, which does not run, back. For :meth:`vmm.Machine.rollback`."""
        if self._native is None:
            raise StateError("the checkpoint is closed: make another")
        # A device forgets what is in flight, which may still have written memory; it drives the lines of the chips.
        for device, state in self._states:
            device.roll_back(state)
        self.pages = check(lib.vmm_checkpoint_roll_back_memory(self._native))
        for undo in self._disks:
            undo.rollback()
        self._console.rewind(self._input)
        check(lib.vmm_checkpoint_roll_back_processors(self._native))

    @property
    def closed(self) -> bool:
        """Whether nothing can go back to it any more."""
        return self._native is None

    def close(self) -> None:
        """Give it up. Twice is fine."""
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
