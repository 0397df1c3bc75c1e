"""Protocols of a machine as snapshots and clones use it. :class:`vmm.Machine` implements all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm._ffi import vmm_vm
    from vmm.boot.entry import Entry
    from vmm.config import MachineConfig
    from vmm.devices.device import State
    from vmm.devices.generation_id import GenerationId
    from vmm.devices.virtio.blk import Blk
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.memory import GuestMemory


class Bootable(Protocol):
    """How a machine was booted."""

    @property
    def kind(self) -> str: ...
    @property
    def merge_ticks(self) -> bool: ...
    @property
    def command_line(self) -> str: ...
    def load(self) -> Entry: ...


class Built(Protocol):
    """A machine with memory and disks, as its configuration has them."""

    @property
    def config(self) -> MachineConfig: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def disks(self) -> Sequence[Blk]: ...


class Stateful(Built, Protocol):
    """A machine whose state is taken; it is held meanwhile."""

    def describe(self) -> State: ...
    def save(self) -> State: ...


class Loadable(Protocol):
    """The part of a machine that loads a state."""

    def load(self, state: State, *, clock: str) -> None: ...


class Restorable(Built, Protocol):
    """A new machine that loads a state and does not run yet."""

    @property
    def virtio(self) -> Sequence[VirtioDevice]: ...
    @property
    def generation_id(self) -> GenerationId: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def native(self) -> vmm_vm: ...
    @property
    def timeline(self) -> Loadable: ...
    def close(self) -> None: ...


class BackgroundTask(Protocol):
    """A task with its own thread beside a machine."""

    def stop(self) -> None:
        """Stop and wait for the thread. Idempotent."""
        ...
