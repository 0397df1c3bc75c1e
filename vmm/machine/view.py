"""Looking at the guest from outside: symbols, stacks, diagnosis, traces, under one budget."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmm.config import LINUX_KINDS
from vmm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm.config import MachineConfig
    from vmm.cpu.vcpu import Vcpu
    from vmm.machine.execution import Execution
    from vmm.machine.firmware import Firmware
    from vmm.machine.message_log import MessageLog
    from vmm.machine.vm import Vm
    from vmm.memory import GuestMemory
    from vmm.observe.budget import Budget
    from vmm.observe.stack import Frame
    from vmm.observe.subject import Ended, Traced
    from vmm.observe.symbols import Symbols
    from vmm.observe.trace import Trace
    from vmm.observe.verdict import Diagnosis
    from vmm.outcome import Outcome
    from vmm.trace_rings import TraceRings


class View:
    """What looks at one machine, and what it has found: symbols, and the trace rings."""

    def __init__(
        self,
        config: MachineConfig,
        vm: Vm,
        execution: Execution,
        firmware: Firmware,
        vcpus: Sequence[Vcpu],
        memory: GuestMemory,
        log: MessageLog,
    ) -> None:
        self._config = config
        self._vm = vm
        self._execution = execution
        self._firmware = firmware
        self._vcpus = vcpus
        self._memory = memory
        self._log = log
        self._symbols: Symbols | None = None
        self._searched_at: Outcome | None = None  # the end of the run at which symbols were last searched for
        self._budget: Budget | None = None  # in force: of the outermost caller that looks at the guest
        self._rings: TraceRings | None = None
        self._tracing: Trace | None = None

    @contextlib.contextmanager
    def looking(self, budget: Budget | None = None) -> Iterator[Budget]:
        """Put one budget in force for all that looks at the guest meanwhile; one that is in force stays."""
        from vmm.observe.budget import Budget

        outer = self._budget
        self._budget = outer or budget or Budget()
        try:
            yield self._budget
        finally:
            self._budget = outer

    @contextlib.contextmanager
    def looking_and_telling(self) -> Iterator[Budget]:
        """:meth:`looking`, for a caller without a budget of its own: what was cut short becomes a message."""
        outermost = self._budget is None
        with self.looking() as budget:
            yield budget
        for note in budget.notes if outermost else ():
            self._log.add(note)

    # ---- symbols ----

    @property
    def symbols(self) -> Symbols:
        """The guest's names: found once they are there, and searched for once more when the guest has ended."""
        ended = self._execution.outcome
        settled = ended is not None and ended is self._searched_at
        if self._symbols is None or not (self._symbols or settled):
            self._symbols = self._find_symbols()
            self._searched_at = self._execution.outcome
        return self._symbols

    @symbols.setter
    def symbols(self, symbols: Symbols) -> None:
        self._symbols = symbols

    def _find_symbols(self) -> Symbols:
        from vmm.observe.symbols import Symbols

        entry = self._firmware.entry
        with self.looking_and_telling() as budget:
            path = self._config.symbols or (entry.symbols if entry else None)
            found = None
            try:
                if path:
                    found = Symbols.open(path) if path == self._config.symbols else Symbols.of_elf(path, budget)
            except ConfigError as error:  # the diagnosis of a dead guest goes on without symbols
                self._log.add(str(error))
            if not found and self._firmware.kind in LINUX_KINDS and self._vm.is_open:
                found = Symbols.of_kernel(self._memory, budget)
            found = found or Symbols([], "nowhere")
            held = self._vm.is_open and self._vcpus and not self._execution.running
            if held and (other := found.mismatch(self._vcpus[0].memory)):
                self._log.add(other)
        return found

    # ---- stacks and causes ----

    def stack(self, number: int) -> list[Frame]:
        """Return the call stack of a vCPU that does not run, innermost frame first."""
        from vmm.cpu.paging import LinearMemory
        from vmm.observe import stack

        vcpu, ended = self._vcpus[number], self._execution.outcome
        registers, memory = vcpu.registers(), vcpu.memory
        if ended is not None and ended.replayed and ended.vcpu == number:
            paging = vcpu.paging(ended.registers)
            registers, memory = ended.registers, LinearMemory(self._memory, lambda: paging)
        with self.looking() as budget:
            return stack.walk(registers, memory, self.symbols, budget)

    def diagnose(self, machine: Ended) -> Diagnosis:
        """Return why the guest of ``machine``, whose view this is, died or did not go on; kept in its outcome."""
        from vmm.observe.diagnose import diagnose

        outcome = self._execution.outcome
        if outcome is None:
            raise StateError("there is nothing to diagnose before the machine has ended: wait() or stop() it first")
        self._vm.handle  # noqa: B018 - raises for a closed machine
        if outcome.diagnosis is None:
            with self.looking_and_telling():
                outcome.diagnosis = diagnose(machine, outcome)
        return outcome.diagnosis

    def aside(self) -> contextlib.AbstractContextManager[object]:
        """Stop the clock of the budget in force for the duration of a ``with`` block: a replay has its own limit."""
        return self._budget.aside() if self._budget is not None else contextlib.nullcontext()

    # ---- traces ----

    def trace(self, machine: Traced, *, capacity: int, keep: int, instructions: bool) -> Trace:
        """Trace every exit of ``machine``, whose view this is, from now on."""
        from vmm.observe.trace import Trace
        from vmm.trace_rings import TraceRings

        vm = self._vm.handle
        if self._tracing is not None and self._tracing.on:
            raise StateError("the machine is traced already: stop that trace first")
        self._rings = self._rings or TraceRings(vm, range(len(self._vcpus)))
        self._tracing = Trace(machine, self._rings, capacity=capacity, keep=keep, instructions=instructions)
        return self._tracing

    def close(self) -> None:
        """Take in the rest of a trace, whose rings go with the machine. Idempotent."""
        if self._tracing is not None:
            self._tracing.finish()
