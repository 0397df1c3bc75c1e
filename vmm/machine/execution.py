"""Running a machine: one thread per vCPU, each inside one native call; the caller's thread controls. Nothing polls."""

from __future__ import annotations

import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from vmm._ffi import check, lib
from vmm.errors import StateError
from vmm.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.console import Console
    from vmm.cpu.vcpu import Vcpu
    from vmm.machine.vm import Vm
    from vmm.observe.samples import Sample
    from vmm.observe.watch import Watch
    from vmm.outcome import Outcome

    MakeOutcome = Callable[[float, bool, BaseException | None], Outcome]


class Execution:
    """The vCPU threads from a start to an end, and the outcome.

    ``load`` puts the image into memory before the first start. ``make_outcome(seconds, migrated, failure)`` describes
    the end once no vCPU runs: how long it ran, whether the machine went on elsewhere, and what code of a device raised.
    """

    def __init__(
        self,
        vm: Vm,
        vcpus: Sequence[Vcpu],
        console: Console,
        load: Callable[[], object],
        make_outcome: MakeOutcome,
    ) -> None:
        self.outcome: Outcome | None = None
        self.samples: list[list[Sample]] = []
        self._vm = vm
        self._vcpus = vcpus
        self._console = console
        self._load = load
        self._make_outcome = make_outcome
        self._starters: list[Callable[[], object]] = []
        self._stoppers: list[Callable[[], object]] = []
        self._runners: list[Runner] = []  # a thread for each vCPU, kept from run to run
        self._threads: list[Runner] = []  # the same while the machine runs, else none
        self._inside = 0  # vCPU threads that have not left their run loop
        self._failure: BaseException | None = None  # the first exception that code of a device or hook raised
        self._migrated = False
        self._started_at = 0.0
        self._lock = threading.Lock()
        self._ending = threading.Lock()  # not _lock: a vCPU thread may take that one while it is joined

    @property
    def running(self) -> bool:
        """Whether vCPU threads run (or are paused)."""
        return bool(self._threads)

    @property
    def ended(self) -> Outcome | None:
        """The outcome if the machine has stopped, without waiting for that."""
        if self._threads and select.select([self._vm.stop_fd], [], [], 0)[0]:
            self._end()
        return self.outcome

    # ---- from start to end ----

    def on_start(self, starter: Callable[[], object]) -> None:
        """Have ``starter()`` called before the vCPUs run."""
        self._starters.append(starter)

    def on_stop(self, stopper: Callable[[], object]) -> None:
        """Have ``stopper()`` called once no vCPU runs any more."""
        self._stoppers.append(stopper)

    def start(self) -> None:
        """Load the image if that was not done, and let the vCPUs run. Returns at once."""
        vm = self._vm.handle
        with self._lock:
            if self._threads:
                raise StateError("the machine runs already")
            if self._migrated:
                raise StateError("the machine has moved: it runs elsewhere")
            self._load()
            if self.outcome is not None:
                self._vm.rearm()
                self._console.reopen()
                self.outcome = None
            self.samples.clear()
            self._started_at = time.monotonic()
            if not self._runners:
                self._runners = [Runner(f"vcpu{vcpu.number}") for vcpu in self._vcpus]
            self._threads = list(self._runners)
            self._inside = len(self._threads)
            for starter in self._starters:
                starter()
            for vcpu, thread in zip(self._vcpus, self._threads, strict=True):
                thread.start(partial(self._run_vcpu, vcpu))
            check(lib.vmm_vm_watch_halt(vm))

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        lib.vmm_vcpu_run(vcpu.native)
        with self._lock:
            self._inside -= 1
            last = self._inside == 0
        if last:
            self._console.close()  # waiters for output learn at once that there is no more

    def wait(self, limits: Watch | None) -> Outcome:
        """Wait for the end, which ``limits`` may bring about. Raises what code of a device or hook raised."""
        self.refuse_own_thread()
        self._refuse_unstarted()
        while self._threads and not select.select([self._vm.stop_fd], [], [], limits.left if limits else None)[0]:
            if limits and (code := limits.due()):
                self.interrupt(code)
                break
        return self._finish()

    async def wait_async(self, limits: Watch | None) -> Outcome:
        """:meth:`wait` for asyncio: the event loop goes on meanwhile. Cancelling it leaves the machine running."""
        from vmm import aio

        while self._threads and not await aio.readable(self._vm.stop_fd, limits.left if limits else None):
            if limits and (code := limits.due()):
                self.interrupt(code)
                break
        return self.wait(None)

    def stop(self, code: int) -> Outcome:
        """End the run now, if it has not ended, and return the outcome."""
        self.refuse_own_thread()
        self._refuse_unstarted()
        if self._threads:
            self.interrupt(code)
        return self._finish()

    def interrupt(self, code: int) -> None:
        """Ask for the end without waiting; ``code`` is a key of :data:`vmm.machine.stop_reasons.HOST_REASONS`."""
        self._vm.stop(lib.VMM_STOP_HOST, code)

    def fail(self, error: BaseException) -> None:
        """Stop the machine for an exception that code of a device or hook raised; :meth:`wait` raises the first."""
        with self._lock:
            if self._failure is None:
                self._failure = error
        self._vm.stop(lib.VMM_STOP_CALLBACK)

    def end_migrated(self) -> None:
        """End here, wherever the guest stands: it goes on elsewhere, and cannot be started again."""
        self._migrated = True
        self.interrupt(0)

    def processor_seconds(self, vcpu: int) -> float:
        """Return the processor time that a vCPU's thread has had, in seconds, of this and earlier runs."""
        return self._runners[vcpu].processor_seconds if self._runners else 0.0

    def refuse_own_thread(self) -> None:
        """Raise :class:`~vmm.errors.StateError` on a vCPU's thread, which cannot wait for its own end."""
        if any(thread.current for thread in self._threads):
            raise StateError("a device's own code cannot wait for the end: ask for it with interrupt()")

    def ask_end(self) -> None:
        """:meth:`interrupt`, of a machine that runs. Idempotent."""
        if self._threads:
            self.interrupt(0)

    def close(self) -> None:
        """Stop the machine if it runs, and end the threads. Idempotent."""
        self.ask_end()
        if self._threads:
            self._end()
        for runner in self._runners:
            runner.close()

    # ---- the end ----

    def _refuse_unstarted(self) -> None:
        if not self._threads and self.outcome is None:
            raise StateError("the machine was not started")

    def _end(self) -> Outcome:
        """Join the vCPU threads and make the outcome; a second caller gets the same one."""
        with self._ending:
            for thread in self._threads:
                thread.join()
            for stopper in self._stoppers if self._threads else ():
                stopper()
            if self.outcome is None:
                seconds = time.monotonic() - self._started_at
                self.outcome = self._make_outcome(seconds, self._migrated, self._failure)
            self._threads = []
            return self.outcome

    def _finish(self) -> Outcome:
        outcome = self._end()
        with self._lock:
            error, self._failure = self._failure, None
        if error is not None:
            raise error
        return outcome
