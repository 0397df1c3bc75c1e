"""Hooks and breakpoints of one machine: made at the first use, closed with it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from vmm.cpu.debug import Debugger
    from vmm.cpu.vcpu import Vcpu
    from vmm.hooks import Hooks
    from vmm.host import Remedies
    from vmm.machine.execution import Execution
    from vmm.machine.firmware import Firmware
    from vmm.machine.vm import Vm
    from vmm.memory import GuestMemory


class Interception:
    """Owns the hooks and the debugger. ``closing`` runs once the native machine is gone."""

    def __init__(
        self,
        vm: Vm,
        execution: Execution,
        firmware: Firmware,
        vcpus: Sequence[Vcpu],
        memory: GuestMemory,
        remedies: Remedies,
        closing: ExitStack,
    ) -> None:
        self._vm = vm
        self._execution = execution
        self._firmware = firmware
        self._vcpus = vcpus
        self._memory = memory
        self._remedies = remedies
        self._closing = closing
        self._hooks: Hooks | None = None
        self._debugger: Debugger | None = None
        self._lock = threading.Lock()

    @property
    def hooked(self) -> bool:
        """Whether there are hooks."""
        return bool(self._hooks)

    @property
    def hooks(self) -> Hooks:
        """The machine's hooks."""
        vm = self._vm.handle
        with self._lock:
            if self._hooks is None:
                from vmm.hooks import Hooks

                self._hooks = Hooks(vm, self._execution.fail)
                self._closing.callback(self._hooks.close)
            return self._hooks

    @property
    def debugger(self) -> Debugger:
        """The machine's debugger. The image is loaded first."""
        if self._debugger is None:
            from vmm.cpu.debug import Debugger

            vm = self._vm.handle
            self._firmware.load()
            self._debugger = Debugger(
                vm,
                self._vcpus,
                self._memory,
                pause=self._vm.pause,
                resume=self._vm.resume,
                failed=self._execution.fail,
                stop_fd=self._vm.stop_fd,
                emulated=self._remedies.emulated,
                unstopped=self._remedies.unstopped,
            )
        return self._debugger

    def close(self) -> None:
        """Close the debugger, which takes its breakpoints out. Idempotent."""
        debugger, self._debugger = self._debugger, None
        if debugger is not None:
            debugger.close()
