"""Protocols of a machine as a migration uses it. :class:`vmm.Machine` implements all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vmm.snapshot.subject import Stateful

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._ffi import vmm_vm
    from vmm.devices.device import State
    from vmm.memory import GuestMemory
    from vmm.snapshot.subject import BackgroundTask


class Mover(Stateful, Protocol):
    """A machine at the source: it migrates, or a standby follows it."""

    @property
    def running(self) -> bool: ...
    @property
    def stop_fd(self) -> int: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def end_migrated(self) -> None: ...


class Arriving(Protocol):
    """A machine at the destination, built from what the source sends."""

    @property
    def memory(self) -> GuestMemory: ...
    @property
    def native(self) -> vmm_vm: ...
    def arrive(self, state: State) -> None: ...
    def run_beside(self, task: BackgroundTask) -> None: ...
    def on_close(self, closer: Callable[[], object]) -> None: ...
