"""Breakpoints, watchpoints and single-step, with Python callables: the debugger of a machine.

Native code owns the debug registers and stops every vCPU at an event (``native/include/vmmdebug.h``); one thread here,
started with the first :class:`Debugger`, takes the events, asks the callables, and lets the machine go on.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING, NamedTuple

from vmm._ffi import check, ffi, lib
from vmm.cpu.paging import PageFault
from vmm.cpu.vcpu import named, operand_bits
from vmm.errors import ConfigError, HostError, LinearMemoryError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmm._ffi import vmm_vm
    from vmm.cpu.vcpu import Vcpu
    from vmm.memory import GuestMemory

KINDS: dict[int, str] = {
    lib.VMM_DEBUG_SOFTWARE: "breakpoint",
    lib.VMM_DEBUG_EXECUTE: "hardware",
    lib.VMM_DEBUG_WRITE: "write",
    lib.VMM_DEBUG_ACCESS: "access",
    lib.VMM_DEBUG_STEP: "step",
    lib.VMM_DEBUG_COUNT: "count",
}
NATIVE_KINDS = {name: number for number, name in KINDS.items()}


class Point:
    """A breakpoint or watchpoint that is set: ``kind`` (a value of :data:`KINDS`), linear ``address``, ``size``."""

    __slots__ = ("_remove", "address", "callback", "gpa", "kind", "size", "slot")

    def __init__(
        self,
        kind: str,
        address: int,
        size: int,
        callback: Callable[[Stop], object] | None,
        remove: Callable[[Point], None],
    ) -> None:
        self._remove = remove
        self.kind = kind
        self.address = address
        self.size = size
        self.callback = callback
        self.gpa = self.slot = -1  # one of them says where it is set

    @property
    def place(self) -> tuple[int, int]:
        """The place where it is set, which points may share: a byte, or a debug register."""
        return self.gpa, self.slot

    def remove(self) -> None:
        """Remove the point. Idempotent."""
        self._remove(self)

    def __repr__(self) -> str:
        return f"<Point {self.kind} at {self.address:#x}>"


class Followed(NamedTuple):
    """A vCPU's state before the latest instruction it began: ``registers`` as from ``Vcpu.registers()``, operand size
    ``bits``, and the number of ``steps`` before it."""

    registers: dict[str, int]
    bits: int
    steps: int


class Stop:
    """A stop of the machine: the ``vcpu``, the ``kind`` of point (or "step", "count"), its linear ``address`` (for a
    step: the next instruction's), and the ``points`` that are set there."""

    __slots__ = ("address", "kind", "points", "vcpu")

    def __init__(self, vcpu: Vcpu, kind: str, address: int, points: list[Point]) -> None:
        self.vcpu = vcpu
        self.kind = kind
        self.address = address
        self.points = points

    def __repr__(self) -> str:
        return f"<Stop {self.kind} at {self.address:#x} on vCPU {self.vcpu.number}>"


class Debugger:
    """The debugger of one machine; :attr:`vmm.machine.Machine.debug` creates it on first use.

    ``pause`` and ``resume`` are the machine's (they nest); ``stop_fd`` is readable once it has ended; ``failed`` is
    called with an exception of a callable, and stops the machine; ``emulated`` tells that the host's KVM emulates CPL 0
    code (``host.Findings``): there, watchpoints stop at writes only and step every instruction, and CPL 3 code is not
    stopped. ``unstopped`` are the kinds of points at which KVM does not stop: they are refused.
    """

    def __init__(
        self,
        vm: vmm_vm,
        vcpus: Sequence[Vcpu],
        ram: GuestMemory,
        *,
        pause: Callable[[], None],
        resume: Callable[[], None],
        failed: Callable[[BaseException], None],
        stop_fd: int,
        emulated: bool,
        unstopped: Sequence[str] = (),
    ) -> None:
        from queue import SimpleQueue

        self.vcpus = vcpus
        self.points: list[Point] = []
        self.on_stop: Callable[[Stop], None] | None = None
        self._vm = vm
        self._ram = ram
        self._pause = pause
        self._resume = resume
        self._failed = failed
        self._stop_fd = stop_fd
        self._unstopped = unstopped
        self._stops: SimpleQueue[Stop | None] = SimpleQueue()
        self._before: dict[Vcpu, int] = {}  # vCPU that must not pass a breakpoint yet -> its address
        self._turn = threading.RLock()  # held by a thread that takes events or resumes vCPUs
        self._setting = threading.RLock()  # guards the points; not _turn, which is held during a step
        with self._standing():
            check(lib.vmm_debug_open(vm, lib.VMM_DEBUG_WATCH_BY_STEP if emulated else 0))
        self.slots = int(lib.vmm_debug_slots(vm))
        self._event_fd = int(lib.vmm_debug_fd(vm))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._serve, name="debugger", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def _standing(self) -> Iterator[None]:
        self._pause()
        try:
            with self._setting:
                yield
        finally:
            self._resume()

    # ---- points ----

    def breakpoint(
        self,
        address: int,
        callback: Callable[[Stop], object] | None = None,
        *,
        hardware: bool = False,
        vcpu: Vcpu | None = None,
    ) -> Point:
        """Stop before the instruction at linear ``address``, on any vCPU.

        ``callback(stop)`` is called while the machine is paused; it may read and change registers and memory. If it
        returns ``False`` the machine stays paused until :meth:`go`, otherwise it continues. Without a callback
        :meth:`wait` returns the stop. A software breakpoint is planted in the physical page that ``vcpu`` (default: the
        first) maps at ``address`` now; where nothing is mapped yet use a ``hardware`` one, of which there are
        :attr:`slots`.

        Raises :class:`~vmm.errors.LinearMemoryError` if nothing is mapped, :class:`~vmm.errors.ConfigError` if no debug
        register is free, :class:`~vmm.errors.HostError` if this host's KVM does not stop at such a point.
        """
        point = Point("hardware" if hardware else "breakpoint", address, 1, callback, self.remove)
        return self._set(point, vcpu or self.vcpus[0])

    def watch(
        self, address: int, size: int = 8, callback: Callable[[Stop], object] | None = None, *, reads: bool = False
    ) -> Point:
        """Stop after an instruction that has written (with ``reads``: or read) the ``size`` bytes, 1, 2, 4 or 8, at
        linear ``address``, a multiple of ``size``. ``callback`` is as in :meth:`breakpoint`.
        """
        if size not in (1, 2, 4, 8) or address % size:
            raise ConfigError(f"a watchpoint is 1, 2, 4 or 8 bytes at a multiple of that, not {size} at {address:#x}")
        point = Point("access" if reads else "write", address, size, callback, self.remove)
        return self._set(point, self.vcpus[0])

    def _set(self, point: Point, vcpu: Vcpu) -> Point:
        if not 0 <= point.address < 1 << 64:
            raise ConfigError(f"{point.address:#x} is not a 64-bit address")
        self._refuse_unstopped("write" if point.kind == "access" else point.kind)
        with self._standing():
            if point.kind == "breakpoint":
                found = vcpu.memory.walk(point.address)
                if isinstance(found, PageFault):
                    raise LinearMemoryError(point.address, f"no breakpoint can be planted: {found.sentence}")
                point.gpa = found.gpa
            else:
                point.slot = self._slot_for(point)
            self._install(point)
            self.points.append(point)
        return point

    def _refuse_unstopped(self, kind: str) -> None:
        """Refuse a point at which KVM does not stop: the guest would execute a planted INT3 itself, and might die."""
        if kind not in self._unstopped:
            return
        what = {"breakpoint": "software breakpoints", "hardware": "hardware breakpoints", "write": "watchpoints"}
        others = [name for name in what if name not in self._unstopped]
        instead = f"set {' or '.join(what[name] for name in others)} instead" if others else "single steps work"
        raise HostError(
            f"this host's KVM does not stop a guest at {what[kind]} (pyvmm doctor says what was seen): {instead}"
        )

    def _slot_for(self, point: Point) -> int:
        for other in self.points:
            if (other.kind, other.address, other.size) == (point.kind, point.address, point.size):
                return other.slot
        free = set(range(self.slots)) - {other.slot for other in self.points}
        if not free:
            raise ConfigError(
                f"all {self.slots} debug registers are in use: remove a watchpoint or hardware breakpoint"
            )
        return min(free)

    def _install(self, point: Point) -> None:
        """Set the point's place in native code, unless another point has set it."""
        if point.slot >= 0:
            check(lib.vmm_debug_set_point(self._vm, point.slot, NATIVE_KINDS[point.kind], point.address, point.size))
        elif point.gpa not in self._ram.planted:
            original = ffi.new("uint8_t *")
            check(lib.vmm_debug_plant(self._vm, point.gpa, original))
            self._ram.planted[point.gpa] = int(original[0])

    def _uninstall(self, point: Point) -> None:
        if point.slot >= 0:
            check(lib.vmm_debug_set_point(self._vm, point.slot, 0, 0, 0))
        elif point.gpa in self._ram.planted:
            check(lib.vmm_debug_lift(self._vm, point.gpa, self._ram.planted.pop(point.gpa)))

    def remove(self, point: Point) -> None:
        """Remove a point. Idempotent."""
        with self._standing():
            if point not in self.points:
                return
            self.points.remove(point)
            if not any(other.place == point.place for other in self.points):
                self._uninstall(point)

    def _here(self, address: int) -> list[Point]:
        return [point for point in self.points if point.address == address and point.kind in ("breakpoint", "hardware")]

    @contextlib.contextmanager
    def _lifted(self, address: int) -> Iterator[None]:
        """Remove breakpoints at a linear address for the block; the machine is paused at its start and end."""
        with self._setting:
            for point in self._here(address):
                self._uninstall(point)
        try:
            yield
        finally:
            with self._setting:
                for point in self._here(address):  # some may have been removed meanwhile
                    self._install(point)

    # ---- continuing ----

    def go(self, *, step: Sequence[Vcpu] = (), hold: Sequence[Vcpu] = ()) -> None:
        """Undo the pause of a stop: ``step`` vCPUs for one instruction, ``hold`` not at all, the others run.

        Raises :class:`~vmm.errors.HostError`, the machine still paused, when a vCPU cannot be stepped.
        """
        with self._turn:
            before, self._before = self._before, {}
            for vcpu in self.vcpus:
                here = vcpu.linear_rip() if vcpu in step or vcpu in before else None
                if here is None or vcpu in hold or not self._here(here) or (vcpu not in step and before[vcpu] != here):
                    continue
                stop = self._one_step(vcpu, None)
                if stop and (stop.kind != "step" or vcpu in step):
                    self._deliver(stop)
                    return
            try:
                self._roles(step, hold)
            except HostError:
                self._roles()
                raise
            self._resume()

    def forget(self, stop: Stop) -> None:
        """Drop a stop that was not reported: its vCPU meets the breakpoint again."""
        with self._turn:
            self._before.pop(stop.vcpu, None)

    def _roles(self, step: Sequence[Vcpu] = (), hold: Sequence[Vcpu] = ()) -> None:
        for vcpu in self.vcpus:
            check(lib.vmm_debug_hold(vcpu.native, vcpu in hold))
            check(lib.vmm_debug_step(vcpu.native, vcpu in step))

    def step(self, vcpu: Vcpu, timeout: float | None = 10) -> Stop:
        """Execute one instruction on one vCPU of the paused machine, the others waiting; it is paused again afterwards.

        Raises :class:`~vmm.errors.StateError` if the step does not complete (the machine ended, or the instruction
        takes longer than ``timeout`` seconds), :class:`~vmm.errors.HostError` if the host cannot step.
        """
        with self._turn:
            self._before.pop(vcpu, None)
            stop = self._one_step(vcpu, timeout)
        if stop is None:
            raise StateError(f"vCPU {vcpu.number} did not finish its step")
        return stop

    def _one_step(self, vcpu: Vcpu, timeout: float | None) -> Stop | None:
        with self._lifted(vcpu.linear_rip()):
            self._roles([vcpu], [other for other in self.vcpus if other is not vcpu])
            return self._until_stop(timeout)

    # ---- running on the caller's thread ----

    def run(self, timeout: float, *, vcpu: Vcpu | None = None, exits: int = 0) -> Stop | None:
        """Run the paused machine to its next stop, and return that; ``None`` if it ended or ``timeout`` seconds passed.
        It is paused again afterwards.

        With ``vcpu`` and ``exits`` it also stops (kind "count") when that vCPU has recorded so many exits in total.
        """
        with self._turn:
            for each in self.vcpus:
                check(lib.vmm_debug_follow(each.native, 0))
                check(lib.vmm_debug_stop_at(each.native, exits if each is vcpu else 0))
            self._before.clear()
            self._roles()
            return self._until_stop(timeout)

    def follow(self, vcpu: Vcpu, steps: int, timeout: float) -> Followed:
        """Step one vCPU of the paused machine ``steps`` times while the others run, for at most ``timeout`` seconds or
        to its end. Interrupts and exceptions are delivered; their handlers are not stepped. The machine is paused
        again afterwards.

        Raises :class:`~vmm.errors.HostError` if the host cannot step.
        """
        with self._turn:
            self._before.clear()
            self._roles()
            check(lib.vmm_debug_follow(vcpu.native, steps))
            self._until_stop(timeout)
            regs, sregs, made = ffi.new("vmm_regs *"), ffi.new("vmm_sregs *"), ffi.new("uint64_t *")
            check(lib.vmm_debug_followed(vcpu.native, regs, sregs, made))
            return Followed(named(regs, sregs), operand_bits(sregs), int(made[0]))

    def _until_stop(self, timeout: float | None) -> Stop | None:
        self._resume()
        select.select([self._event_fd, self._stop_fd], [], [], timeout)
        self._pause()
        return self._take()

    # ---- stops ----

    def wait(self, timeout: float | None = None) -> Stop:
        """Wait for the next stop without a callback, and return it; the machine stays paused until :meth:`go`.

        Raises ``TimeoutError``, and :class:`~vmm.errors.StateError` if the debugger is closed meanwhile.
        """
        from queue import Empty

        try:
            stop = self._stops.get(timeout=timeout)
        except Empty:
            raise TimeoutError(f"the guest came to no breakpoint within {timeout} s") from None
        if stop is None:
            raise StateError("the debugger was closed: its machine is gone")
        return stop

    def _serve(self) -> None:
        while not select.select([self._event_fd, self._wake], [], [])[0].count(self._wake):
            with self._turn:
                self._pause()
                stop = self._take()
                if stop is None:  # another thread's step took the event
                    self._resume()
                else:
                    self._answer(stop)

    def _take(self) -> Stop | None:
        """Take the pending event, and end the roles of a step; the machine is paused."""
        event = ffi.new("vmm_debug_event *")
        found = check(lib.vmm_debug_take(self._vm, event))
        self._roles()
        if not found:
            return None
        vcpu, kind = self.vcpus[event.vcpu], KINDS[event.kind]
        address = vcpu.linear_rip() if kind in ("step", "count") else int(event.address)
        stop = Stop(vcpu, kind, address, [point for point in self.points if point.kind == kind])
        if kind == "breakpoint":
            walked = vcpu.memory.walk(address)
            gpa = None if isinstance(walked, PageFault) else walked.gpa
            stop.points = [point for point in stop.points if point.gpa == gpa]
        else:
            stop.points = [point for point in stop.points if point.address == address]
        if kind in ("breakpoint", "hardware"):
            self._before[vcpu] = address
        return stop

    def _answer(self, stop: Stop) -> None:
        """Call the callbacks. If a point has none, :meth:`wait` returns the stop; its caller resumes the machine."""
        try:
            answers = [point.callback(stop) for point in stop.points if point.callback]
            if stop.kind == "step" or len(answers) < len(stop.points):
                self._deliver(stop)
            elif not any(answer is False for answer in answers):
                self.go()  # also if the point was removed meanwhile
        except BaseException as error:  # must not be lost: the machine's wait() raises it
            self._failed(error)
            self._resume()

    def _deliver(self, stop: Stop) -> None:
        if self.on_stop:
            self.on_stop(stop)
        else:
            self._stops.put(stop)

    def close(self) -> None:
        """Remove all points and end the thread. The machine must not run again afterwards."""
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for point in list(self.points):
            self.remove(point)
        with self._standing():
            check(lib.vmm_debug_close(self._vm))
        self._stops.put(None)
        os.close(self._wake)
