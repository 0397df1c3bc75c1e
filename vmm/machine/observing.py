"""Looking at a machine, and intercepting what its guest does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.bus import MMIO, PIO
from vmm.machine.running import RunnableMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from vmm.cpu.debug import Debugger, Point, Stop
    from vmm.cpu.vcpu import Exit
    from vmm.hooks import Access, Hook
    from vmm.observe.budget import Budget
    from vmm.observe.profile import Profile
    from vmm.observe.stack import Frame
    from vmm.observe.symbols import Symbols
    from vmm.observe.trace import Trace
    from vmm.observe.verdict import Diagnosis


class ObservableMachine(RunnableMachine):
    """A machine that can be looked at and intercepted."""

    # ---- looking ----

    @property
    def symbols(self) -> Symbols:
        """The guest's names: of the configured file, of the image, or of the running kernel's own tables.

        Found once they are there. A file that cannot be used after all, or of another kernel than the one that runs,
        is reported in :attr:`messages`, and so is a search that took too long.
        """
        return self.view.symbols

    def looking(self, budget: Budget | None = None) -> AbstractContextManager[Budget]:
        """Put one budget in force for all that looks at the guest meanwhile; see :mod:`vmm.observe.budget`."""
        return self.view.looking(budget)

    def screen(self) -> list[str] | None:
        """Return the lines of the text screen written to 0xb8000, where a VGA card would be; ``None`` without text."""
        from vmm.observe import screen

        self.vm.handle  # noqa: B018 - raises for a closed machine
        return screen.rows(self.memory)

    def stack(self, vcpu: int = 0) -> list[Frame]:
        """Return the call stack of a vCPU that does not run (paused or ended), innermost first; 64-bit guests."""
        return self.view.stack(vcpu)

    def diagnose(self) -> Diagnosis:
        """Return why the guest died or did not go on; kept in ``outcome``. After the run, before :meth:`close`."""
        return self.view.diagnose(self)

    def trace(self, *, capacity: int = 1 << 18, keep: int = 1 << 20, instructions: bool = True) -> Trace:
        """Trace every exit from now on, until :meth:`Trace.stop`; before the start or while it runs.

        Each vCPU and the I/O thread has a ring of ``capacity`` events (a power of two), and :class:`Trace` keeps the
        newest ``keep``. ``instructions``: see there. Raises :class:`~vmm.errors.StateError` while another trace is on.
        """
        return self.view.trace(self, capacity=capacity, keep=keep, instructions=instructions)

    def profile(self, hz: float = 100.0, *, stacks: bool = False) -> Profile:
        """Sample where the vCPUs are, ``hz`` times a second, until :meth:`Profile.stop`."""
        from vmm.observe.profile import Profile

        return Profile(self, hz, stacks=stacks)

    # ---- intercepting ----

    def on_port(self, port: int | range, callback: Callable[[Access], int | None]) -> Hook:
        """Have ``callback(access)`` called for every access to these ports, before a write or after a read.

        The device behind still acts. A number that the callback returns replaces the value: what the device is
        given, or what the guest reads. It runs on the vCPU's thread: it may look at registers and memory,
        :meth:`interrupt`, and remove hooks. An exception stops the machine and comes out of :meth:`wait`.
        """
        return self.interception.hooks.access(PIO, port, callback)

    def on_access(self, gpa: int | range, callback: Callable[[Access], int | None]) -> Hook:
        """:meth:`on_port` for guest-physical addresses outside RAM.

        Raises :class:`~vmm.errors.BusError` for RAM, whose accesses do not exit: :meth:`watch` it.
        """
        return self.interception.hooks.access(MMIO, gpa, callback)

    def on_exit(self, reasons: str | Iterable[str], callback: Callable[[int, Exit], object]) -> Hook:
        """Have ``callback(vcpu, exit)`` called, on the vCPU's thread, after exits for these reasons were handled.

        ``reasons`` are names of :data:`vmm.cpu.vcpu.EXIT_REASONS`, for example ``"io"`` or ``["shutdown", "hlt"]``.
        """
        return self.interception.hooks.exits(reasons, callback)

    @property
    def debug(self) -> Debugger:
        """The machine's debugger, made on first use (the image is loaded then): see :class:`vmm.cpu.debug.Debugger`."""
        return self.interception.debugger

    def breakpoint(
        self, address: int, callback: Callable[[Stop], object] | None = None, *, hardware: bool = False
    ) -> Point:
        """Call ``callback(stop)`` before the instruction at linear ``address``: ``debug.breakpoint``."""
        return self.debug.breakpoint(address, callback, hardware=hardware)

    def watch(self, address: int, size: int = 8, callback: Callable[[Stop], object] | None = None) -> Point:
        """Call ``callback(stop)`` behind a write to linear ``address``: ``debug.watch``."""
        return self.debug.watch(address, size, callback)
