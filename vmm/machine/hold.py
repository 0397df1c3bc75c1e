"""Quiesce a machine while its state is saved or replaced."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.machine.execution import Execution
    from vmm.machine.vm import Vm
    from vmm.memory import GuestMemory


class Hold:
    """Quiesces vCPUs, the I/O thread and devices with threads of their own, and removes breakpoints from memory."""

    def __init__(self, vm: Vm, execution: Execution, memory: GuestMemory) -> None:
        self._vm = vm
        self._execution = execution
        self._memory = memory
        self._holders: list[tuple[Callable[[], object], Callable[[], object]]] = []

    def add(self, hold: Callable[[], object], release: Callable[[], object]) -> None:
        """Have ``hold()`` called before the machine's state is taken or replaced, and ``release()`` after it."""
        self._holders.append((hold, release))

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Hold everything for the duration of a ``with`` block. Raises StateError on a vCPU's own thread."""
        self._execution.refuse_own_thread()
        self._vm.pause()
        try:
            # Only now is it known whether the guest has ended: its outcome describes the state that it ended in.
            _ = self._execution.ended
            with contextlib.ExitStack() as held:
                for hold, release in self._holders:
                    hold()
                    held.callback(release)
                with self._memory.without_breakpoints():
                    yield
        finally:
            self._vm.resume()
