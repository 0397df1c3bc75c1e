"""Time limit and signals of a run, which may have several boots."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from vmm import slow_reader
from vmm.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from vmm.machine import Machine
    from vmm.outcome import Outcome

LOOKING_LEAST = 10.0  # least number of seconds to examine a guest that has ended, even if the time limit is nearly over


class RunLimits:
    """Time limit of a run, and the signals that end it, across boots.

    A context manager: it handles signals from the first :meth:`of` to its end.
    """

    SIGNALS: ClassVar = {signal.SIGINT: 2, signal.SIGTERM: 3, signal.SIGHUP: 3}  # codes of Machine.interrupt

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._deadline: float | None = None
        self._code: int | None = None  # of the first signal
        self._over = False  # a boot has ended and is being examined
        self._machine: Machine | None = None
        self._before: dict[int, Any] = {}

    def of(self, machine: Machine) -> None:
        """Make signals end ``machine`` from now on; a signal that arrived before ends it at once."""
        self._machine = machine
        for number in self.SIGNALS if not self._before else ():
            self._before[number] = signal.signal(number, self._signalled)
        if self._code is not None:
            machine.interrupt(self._code)

    def left(self) -> float | None:
        """Return the seconds until the time limit, which starts at the first call; ``None`` without one."""
        if self._timeout is None:
            return None
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout
        return max(0.0, self._deadline - time.monotonic())

    def over(self) -> Outcome | None:
        """Return the outcome if the run ends here instead of booting again, else ``None``."""
        from vmm.machine import host_outcome

        return host_outcome(self._code) if self._code is not None else host_outcome(1) if self.left() == 0 else None

    @contextmanager
    def looking(self, machine: Machine) -> Iterator[None]:
        """Examine a machine that has ended, in a ``with`` block: a signal ends the command at once, and so does the
        time limit, but not before :data:`LOOKING_LEAST` seconds."""
        from vmm.observe.budget import Budget

        self._over = True
        left = self.left()
        try:
            self._leave()
            with machine.looking(Budget(within=None if left is None else max(left, LOOKING_LEAST))):
                yield
        finally:
            self._over = False  # closing the machine ends its child processes

    def _leave(self) -> None:
        if self._over and self._code is not None:
            from vmm.machine import host_outcome

            self._over = False
            outcome = host_outcome(self._code)
            slow_reader.report(f"pyvmm: {outcome.sentence}\n")
            raise SystemExit(outcome.status)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._code is None:
            self._code = self.SIGNALS[signal.Signals(number)]
        self._leave()
        if self._machine is not None:
            with suppress(StateError):  # closed: the next machine is interrupted
                self._machine.interrupt(self._code)

    def __enter__(self) -> RunLimits:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
