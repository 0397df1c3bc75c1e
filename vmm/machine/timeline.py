"""A machine in time: its state as a value, checkpoints and roll-back in process, snapshots in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import StateError
from vmm.machine.course import Course, course_from

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from vmm.config import MachineConfig
    from vmm.console import Console
    from vmm.cpu.cpuid import CpuidTable
    from vmm.cpu.vcpu import Vcpu
    from vmm.devices.device import State
    from vmm.devices.virtio.blk import Blk
    from vmm.machine.board import Board
    from vmm.machine.firmware import Firmware
    from vmm.machine.hold import Hold
    from vmm.machine.vm import Vm
    from vmm.memory import GuestMemory
    from vmm.snapshot import Snapshot
    from vmm.snapshot.checkpoint import Checkpoint
    from vmm.snapshot.lazy import LazyMemory
    from vmm.snapshot.series import Series

_CONTINUED = (
    "it went on from a snapshot, a clone or a saved state: take a checkpoint, and it can be repeated from there"
)
_BROUGHT_BACK = "it was rolled back to a checkpoint that is closed"


class Timeline:
    """Saves and loads the state of one machine; ``restored``: it continues another machine, and was not booted."""

    def __init__(
        self,
        config: MachineConfig,
        vm: Vm,
        hold: Hold,
        firmware: Firmware,
        board: Board,
        cpuid: CpuidTable,
        vcpus: Sequence[Vcpu],
        memory: GuestMemory,
        console: Console,
        *,
        restored: bool,
    ) -> None:
        self.config = config
        self.memory = memory
        self.hold = hold
        self.course = Course(obstacle=_CONTINUED if restored else "")
        self.lazy: LazyMemory | None = None
        """Memory that was still to come when the machine was restored (``later``)."""
        self._from_boot: Course | None = None if restored else self.course
        self._vm = vm
        self._firmware = firmware
        self._board = board
        self._cpuid = cpuid
        self._vcpus = vcpus
        self._console = console
        self._checkpoints: list[Checkpoint] = []
        self._series: Series | None = None

    @property
    def disks(self) -> list[Blk]:
        """The disks, as the configuration has them."""
        from vmm.devices.virtio.blk import Blk

        return [device for device in self._board.virtio if isinstance(device, Blk)][: len(self.config.disks)]

    def complete_memory(self) -> None:
        """Wait until all lazy memory has arrived."""
        if self.lazy:
            self.lazy.complete()

    # ---- state as a value ----

    def describe(self) -> State:
        """Return what must be the same for the guest wherever the machine goes on, as a plain value."""
        from vmm.snapshot.origin import describe

        return describe(self.config, self._firmware, [disk.size for disk in self.disks], self._cpuid)

    def save(self) -> State:
        """Return everything but memory and the contents of disks, as a plain value. The machine is held meanwhile."""
        from vmm.cpu import processor_state

        with self.hold.still():
            self._firmware.load()
            # Quiesce devices first: completing requests raises interrupts, which are part of the vCPUs' state.
            devices = {device.name: device.save() for device in self._board.devices}
            return {
                "version": 1,
                "processors": processor_state.save(self._vm.handle, self._vcpus),
                "devices": devices,
                "input": self._console.pending(),
            }

    def load(self, state: State, *, clock: str) -> None:
        """Load what :meth:`save` returned; ``clock``: see :meth:`vmm.Machine.load_state`. Raises ``ValueError``."""
        from vmm.cpu import processor_state
        from vmm.snapshot.clock import advances

        ahead = advances(clock)
        if not isinstance(state, dict) or state.keys() != {"version", "processors", "devices", "input"}:
            raise ValueError("not the state of a machine")
        devices = {device.name: device for device in self._board.devices}
        if state["version"] != 1 or not isinstance(state["input"], bytes) or not isinstance(state["devices"], dict):
            raise ValueError("not the state of a machine of version 1")
        if odd := devices.keys() ^ state["devices"].keys():
            raise ValueError(f"the state is of a machine with other devices: {', '.join(sorted(map(str, odd)))}")
        with self.hold.still():
            self.course, self._from_boot = Course(obstacle=_CONTINUED), None
            for name, device in devices.items():
                device.load(state["devices"][name])
            self._console.rewind(state["input"])
            processor_state.load(self._vm.handle, self._vcpus, state["processors"], ahead=ahead)
            passed = processor_state.passed_since(state["processors"])
            if not ahead or passed < 0:  # the host's clock was set back: the guest's is not
                for device in devices.values():
                    device.set_back(passed)

    # ---- in process ----

    def checkpoint(self) -> Checkpoint:
        """Keep the machine's state, memory and disks as they are now, for :meth:`rollback`."""
        from vmm.snapshot.checkpoint import Checkpoint

        self.complete_memory()
        with self.hold.still():
            self._firmware.load()
            checkpoint = Checkpoint(self._vm.handle, self._board.devices, self._console, closed=self._closed)
            self._checkpoints.append(checkpoint)
            self.course = course_from(checkpoint, self._vcpus, self._console)
            return checkpoint

    def rollback(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of this machine. Raises :class:`~vmm.errors.StateError` for another one."""
        if checkpoint not in self._checkpoints:
            raise StateError("that is no checkpoint of this machine, or it was closed")
        with self.hold.still():
            checkpoint.roll_back()
            self.course, self._from_boot = course_from(checkpoint, self._vcpus, self._console), None

    def _closed(self, checkpoint: Checkpoint) -> None:
        if checkpoint in self._checkpoints:
            self._checkpoints.remove(checkpoint)
        if self.course.checkpoint is checkpoint:
            self.course = self._from_boot or Course(obstacle=_BROUGHT_BACK)

    # ---- in files ----

    def snapshot(self, path: str | os.PathLike[str], *, differential: bool, series: Series | None = None) -> Snapshot:
        """Write a snapshot: see :meth:`vmm.Machine.snapshot`."""
        from vmm.snapshot.series import Series

        self.complete_memory()
        with self.hold.still():
            self._series = self._series or Series(self)
            return (series or self._series).write(path, differential)

    # ---- the end ----

    def close(self) -> None:
        """Close the checkpoints and the log of what was written since the last snapshot. Idempotent."""
        for checkpoint in list(self._checkpoints):
            checkpoint.close()
        if self._series is not None:
            self._series.close()

    def give_up_lazy(self) -> None:
        """Let no thread wait for lazy memory any more; before threads are joined and devices are reset. Idempotent."""
        if self.lazy is not None:
            self.lazy.give_up()

    def close_lazy(self) -> None:
        """Stop filling lazy memory; after the devices were reset, which may still touch it. Idempotent."""
        if self.lazy is not None:
            self.lazy.close()
