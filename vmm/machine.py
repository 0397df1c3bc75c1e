"""The composition root: a configuration becomes a running machine, and ends in an Outcome.

Booting is the list :data:`BOOT_STEPS`; the rest is life cycle. Threads: one per vCPU, each inside one native call;
the caller's thread controls. Nothing here polls.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from vmm import layout
from vmm._ffi import PYTHON_SAY, check, ffi, lib, pause
from vmm.bus import MMIO, PIO, Bus
from vmm.config import LINUX_KINDS, MachineConfig
from vmm.console import Console
from vmm.errors import ConfigError, HostError, StateError, kvm_refused
from vmm.irq import GsiLine
from vmm.memory import GuestMemory
from vmm.outcome import KVM_EMULATION, Outcome
from vmm.printable import printable
from vmm.runner import Runner
from vmm.snapshot.replica import Course

if TYPE_CHECKING:
    import os
    import socket
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from vmm.boot import Entry
    from vmm.bus import Attachment
    from vmm.cpu.debug import Debugger, Point, Stop
    from vmm.cpu.vcpu import Exit
    from vmm.devices.device import Device, State
    from vmm.devices.generation_id import GenerationId
    from vmm.devices.pci import PciHost
    from vmm.devices.virtio.blk import Blk
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.hooks import Access, Hook, Hooks
    from vmm.migrate.source import Migrated, Migration
    from vmm.migrate.standby import Shadow
    from vmm.observe.budget import Budget
    from vmm.observe.diagnose import Diagnosis
    from vmm.observe.profile import Profile
    from vmm.observe.replay import Replayed
    from vmm.observe.stack import Frame
    from vmm.observe.symbols import Symbols
    from vmm.observe.trace import Trace
    from vmm.observe.watch import Sample, Watch
    from vmm.snapshot import Snapshot
    from vmm.snapshot.checkpoint import Checkpoint
    from vmm.snapshot.keeping import Keeper
    from vmm.snapshot.lazy import LazyMemory
    from vmm.snapshot.origin import Origin
    from vmm.snapshot.series import Series
    from vmm.trace_rings import TraceRings

KVM_PATH = "/dev/kvm"
IRQCHIP, PIT = 1, 2

# enum vmm_stop_reason -> vmm.outcome.REASONS; VMM_STOP_HOST is told apart by its code.
_REASONS = {
    2: "power-off", 3: "reset", 4: "debug-exit", 5: "panic", 6: "triple-fault", 7: "emulation-failure",
    8: "entry-failure", 9: "halt", 10: "reset", 11: "unknown-exit", 12: "host-failure", 14: "debug",
    15: "memory-lost", 16: "no-bios",
}  # fmt: skip
_STOP_HOST, _STOP_POWEROFF, _STOP_RESET, _STOP_DEBUG_EXIT, _STOP_PANIC, _STOP_CALLBACK = 1, 2, 3, 4, 5, 13
_HOST_REASONS = {0: "stopped", 1: "timeout", 2: "interrupted", 3: "terminated", 4: "stalled"}

_MESSAGES_MAX = 1000  # a guest can cause them: more are counted by nobody
_MESSAGE_MAX = 1000  # characters of one

_WENT_ON = "it went on from a snapshot, a clone or a saved state: take a checkpoint, and it can be repeated from there"
_BROUGHT_BACK = "it was rolled back to a checkpoint that is closed"

_PANIC_MARK = b"Kernel panic - not syncing"


def host_outcome(code: int) -> Outcome:
    """How a run ends that the host ends between two machines: the codes are those of :meth:`Machine.interrupt`."""
    return Outcome(_HOST_REASONS[code], code)


class Attendant(Protocol):
    """Who does something beside a machine, on a thread of its own."""

    def stop(self) -> None:
        """No more; returns when that is so. Twice is fine."""
        ...


class Machine:
    """A virtual machine: ``Machine(kernel="bzImage", memory="512M")``, or from a :class:`MachineConfig`.

    A context manager; leaving it stops and frees everything. Keyword fields are those of
    :data:`vmm.config.FIELDS`. With ``origin`` it is not booted, but goes on from there. Raises
    :class:`~vmm.errors.ConfigError` for a request that cannot be, :class:`~vmm.errors.HostError` where the host
    refuses.
    """

    memory: GuestMemory
    bus: Bus
    console: Console
    generation_id: GenerationId

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        kvm: str = KVM_PATH,
        origin: Origin | None = None,
        **fields: Any,
    ) -> None:
        self._origin = origin
        self.config = config.with_(**fields) if config else MachineConfig(**fields)
        self.vcpus: list[Any] = []
        self.devices: list[Device] = []
        self.virtio: list[VirtioDevice] = []
        self.pci: PciHost | None = None
        self.messages: list[str] = []
        self.on_message: Callable[[str], object] | None = None
        self.entry: Entry | None = None
        self._symbols: Symbols | None = None
        self._symbols_settled = False  # searched for in a machine that had ended
        self._budget: Budget | None = None  # what whoever looks at the guest now may spend
        self.outcome: Outcome | None = None
        self.notes: list[str] = []
        self.command_line = ""
        self._pauses = 0
        self.samples: list[list[Sample]] = []
        self.kvm_path = kvm
        self._vm: Any = None
        self._debugger: Debugger | None = None
        self._hooks: Hooks | None = None
        self._starters: list[Any] = []
        self._stoppers: list[Any] = []
        self._holders: list[Any] = []
        self._closers: list[Any] = []
        self._runners: list[Runner] = []  # a thread for each vCPU
        self._threads: list[Runner] = []  # the same while it runs, else none
        self._inside = 0  # vCPU threads that have not left their run loop
        self._exception: BaseException | None = None
        self._rings: TraceRings | None = None
        self._tracing: Trace | None = None
        self._started_at = 0.0
        self._checkpoints: list[Checkpoint] = []
        self.course = Course(obstacle=_WENT_ON if origin else "")
        """Where what it does now began."""
        self._from_boot: Course | None = None if origin else self.course
        self._series: Series | None = None
        self.lazy: LazyMemory | None = None
        """Memory that was still to come when the machine was restored (``later``)."""
        self.migration: Migration | None = None
        """The one under way, to be cancelled."""
        self._left = False
        self._later: Sequence[Callable[[Machine], None]] = []
        self.attendants: list[Attendant] = []
        """Who does something beside the machine, on a thread, and is stopped before it is closed."""
        self._lock = threading.Lock()
        self._ending = threading.Lock()  # not _lock: a vCPU thread may take that one while it is joined
        try:
            for step in self._boot_steps():
                step(self)
        except BaseException:
            self.close()
            raise

    def _boot_steps(self) -> Sequence[Callable[[Machine], None]]:
        """All there are; of a machine that moves here, what does not wait for the source to let go of a disk or tap."""
        config = self.config
        if self._origin is None or not self._origin.arriving:
            return BOOT_STEPS
        from vmm.cpu import state  # noqa: F401 - its import takes longer than loading one, while nobody runs

        held = bool(config.disks or config.nets or config.shares or config.vsock)
        at = BOOT_STEPS.index(Machine._create_devices if held else Machine._go_on)
        self._later = BOOT_STEPS[at:]
        return BOOT_STEPS[:at]

    # ---- boot steps, in order ----

    def _open_image(self) -> None:
        from vmm import boot

        if self._origin is not None:
            self.kind = self._origin.kind
            return
        if self.config.symbols is not None:
            from vmm.observe.symbols import Symbols

            Symbols.check(self.config.symbols)  # not when the guest has died and its end is to be told
        self.kind = self.config.kind
        if self.config.kernel is not None:
            self.image = boot.Image.open(self.config.kernel)
            self.on_close(self.image.close)
            if self.kind == "auto" and self.config.address is None:
                self.kind = boot.identify(self.image)

    def _open_kvm(self) -> None:
        from vmm import host

        self.host = host.check(self.kvm_path, self.config)
        # Where a tick costs milliseconds of emulation, a Linux guest gets a PIT of ours, which merges them.
        self.merge_ticks = self.host.emulated and self.kind in LINUX_KINDS
        if self._origin is not None:
            self.merge_ticks = self._origin.merge_ticks  # a device the guest knows
        out = ffi.new("vmm_vm **")
        flags = IRQCHIP if self.merge_ticks else IRQCHIP | PIT
        code = lib.vmm_vm_create(self.kvm_path.encode(), flags, out)
        if code < 0:
            raise kvm_refused(self.kvm_path, code, ffi.string(lib.vmm_error_text()).decode())
        self._vm = out[0]
        self._say = ffi.new_handle(self._message)
        lib.vmm_vm_on_message(self._vm, PYTHON_SAY, self._say)
        host.require_capabilities(self._vm)
        self.bus = Bus(self._vm, self._callback_failed)

    def _map_memory(self) -> None:
        regions = layout.ram_regions(self.config.memory)
        files = self._origin.files if self._origin is not None else None
        self.memory = GuestMemory(self._vm, regions, huge_pages=self.config.huge_pages, files=files)

    def _remedy_host(self) -> None:
        if self.host.remedies:
            check(lib.vmm_compat_enable(self._vm, self.host.remedies))

    def _create_devices(self) -> None:
        self.console = Console()
        from vmm.platform import create_devices

        create_devices(self)

    def _choose_cpuid(self) -> None:
        from vmm.cpu.cpuid import CpuidTable

        limit = int(lib.vmm_vm_check_extension(self._vm, 66)) or 1  # KVM_CAP_MAX_VCPUS
        if self.config.cpus > limit:
            raise ConfigError(f"{self.config.cpus} vCPUs are more than this host allows: give --cpus 1 to {limit}")
        self.cpuid = CpuidTable(self._vm, self.config.cpus, hypercalls=not self.host.vmcall_loops)
        if self._origin is not None:
            self.cpuid.become(self._origin.cpuid)

    def _create_vcpus(self) -> None:
        from vmm.cpu.vcpu import Vcpu

        for number in range(self.config.cpus):
            self.vcpus.append(Vcpu(self._vm, number, self.memory, self.cpuid))

    def _go_on(self) -> None:
        origin, self._origin = self._origin, None
        if origin is None:
            return
        from vmm.boot.entry import Entry

        self.entry = Entry(origin.mode, origin.kind, 0)
        self.entry.symbols = origin.symbols
        self.command_line = origin.command_line
        if origin.state is not None:
            self.load_state(origin.state, clock=origin.clock)

    def arrive(self, state: State) -> None:
        """The rest of a machine that was made from an ``arriving`` :class:`~vmm.snapshot.origin.Origin`, once its
        memory is there: devices and processors, with this state."""
        if self._origin is None or not self._origin.arriving:
            raise StateError("this machine is not on its way here")
        self._origin.state = state
        for step in self._later:
            step(self)
        self._announce()

    def _announce(self) -> None:
        """Tell networks where this machine is now, as it is the one that was elsewhere: not of a copy of it."""
        for device in self.virtio:  # behind the processors' state, which has the interrupts
            device.announce()

    # ---- composing ----

    @property
    def native(self) -> Any:
        """The native machine, for the constructors of devices whose model is C."""
        return self._open_vm()

    @property
    def disks(self) -> list[Blk]:
        """Its disks, as the configuration has them."""
        from vmm.devices.virtio.blk import Blk

        return [device for device in self.virtio if isinstance(device, Blk)][: len(self.config.disks)]

    def line(self, gsi: int) -> GsiLine:
        """The wire of a global system interrupt into the irqchip."""
        return GsiLine(self._vm, gsi)

    def attach(
        self,
        device: Device,
        *,
        port: int | None = None,
        address: int | None = None,
        size: int,
        gsi: int | None = None,
        first: int = 0,
    ) -> Attachment:
        """Put a device on ``size`` ports from ``port``, or bytes from guest-physical ``address``.

        ``gsi`` connects its line; ``first`` is the device's offset at the start of the range. Raises
        :class:`~vmm.errors.BusError` when the range is taken.
        """
        if (port is None) == (address is None):
            raise ConfigError(f"attach {device.name} to a port or to an address: give one of the two")
        if gsi is not None:
            device.line = self.line(gsi)
        space, base = (PIO, port) if port is not None else (MMIO, address)
        assert base is not None
        attachment = self.bus.attach(device, space, base, size, first=first)
        if device not in self.devices:
            self.devices.append(device)
        return attachment

    def add(self, device: VirtioDevice) -> VirtioDevice:
        """Give the guest a virtio device, on the configured transport. Before :meth:`load`."""
        from vmm.platform import add_virtio

        if self.entry is not None:
            raise StateError(f"{device.name} comes too late: add devices before the image is loaded")
        device.connect(self._open_vm(), self._callback_failed)
        self.virtio.append(device)
        try:
            add_virtio(self, device)
        except BaseException:
            self.on_close(device.destroy)  # no transport will
            raise
        return device

    def load(self) -> Entry:
        """Load the image and point vCPU 0 at it; done by :meth:`start` when it was not done before."""
        if self.entry is None:
            from vmm.cpu import modes
            from vmm.platform import load_image

            self.entry = load_image(self)
            self.notes += self.entry.notes
            modes.enter(self.vcpus[0].native, self.entry)
        return self.entry

    def stop_callback(self, reason: int) -> Any:
        """A function for a device that ends the machine: called with the code, on the vCPU's thread."""
        vm = self._vm
        stop = lib.vmm_vm_stop
        return lambda code=0: stop(vm, reason, code)

    # ---- looking ----

    @property
    def symbols(self) -> Symbols:
        """The guest's names: of the configured file, of the image, or of the running kernel's own tables.

        Found once they are there. A file that cannot be used after all, or of another kernel than the one that runs,
        is said in :attr:`messages`, and so is a search that took too long.
        """
        if self._symbols is None or not (self._symbols or self._symbols_settled):
            self._symbols = self._find_symbols()
            self._symbols_settled = self.outcome is not None
        return self._symbols

    def _find_symbols(self) -> Symbols:
        from vmm.observe.symbols import Symbols

        alone = self._budget is None
        with self.looking() as budget:
            path = self.config.symbols or (self.entry.symbols if self.entry else None)
            found = None
            try:
                if path:
                    found = Symbols.open(path) if path == self.config.symbols else Symbols.of_elf(path, budget)
            except ConfigError as error:  # no reason to say nothing else of a guest that died
                self._message(str(error))
            if not found and self.kind in LINUX_KINDS and self._vm is not None:
                found = Symbols.of_kernel(self.memory, budget)
            found = found or Symbols([], "nowhere")
            if (
                self._vm is not None
                and self.vcpus
                and not self.running
                and (other := found.mismatch(self.vcpus[0].memory))
            ):
                self._message(other)
            for note in budget.notes if alone else ():
                self._message(note)
        return found

    @contextlib.contextmanager
    def looking(self, budget: Budget | None = None) -> Iterator[Budget]:
        """One budget for everything that looks at the guest meanwhile: see :mod:`vmm.observe.budget`. One that is in
        force stays."""
        from vmm.observe.budget import Budget

        outer = self._budget
        self._budget = outer or budget or Budget()
        try:
            yield self._budget
        finally:
            self._budget = outer

    def screen(self) -> list[str] | None:
        """The lines of the text screen that the guest has written to 0xb8000, where a VGA card would be; ``None``: no
        text is there."""
        from vmm.observe import screen

        self._open_vm()
        return screen.rows(self.memory)

    def stack(self, vcpu: int = 0) -> list[Frame]:
        """The call stack of a vCPU that does not run (paused or ended), innermost frame first; 64-bit guests."""
        from vmm.cpu.paging import LinearMemory
        from vmm.observe import stack

        looked, ended = self.vcpus[vcpu], self.outcome
        registers, memory = looked.registers(), looked.memory
        if ended is not None and ended.replayed and ended.vcpu == vcpu:
            paging = looked.paging(ended.registers)
            registers, memory = ended.registers, LinearMemory(self.memory, lambda: paging)
        with self.looking() as budget:
            return stack.walk(registers, memory, self.symbols, budget)

    def diagnose(self) -> Diagnosis:
        """Why the guest died or did not go on; kept in ``outcome.diagnosis``. After the run, before :meth:`close`."""
        from vmm.observe.diagnose import diagnose

        if self.outcome is None:
            raise StateError("there is nothing to diagnose before the machine has ended: wait() or stop() it first")
        self._open_vm()
        if self.outcome.diagnosis is None:
            alone = self._budget is None
            with self.looking() as budget:
                self.outcome.diagnosis = diagnose(self, self.outcome)
            for note in budget.notes if alone else ():
                self._message(note)
        return self.outcome.diagnosis

    def replay(self) -> Replayed:
        """Run a second machine from where the ended one began, to the instruction it died of in a triple fault.

        For hosts whose KVM resets a vCPU before it reports the fault (AMD's SVM): ``outcome.registers`` and a diagnosis
        ask for it there. It takes a few times as long as the run did, 30 to 120 seconds at most. What it finds or why
        it finds nothing, ``docs/debug-a-boot.md``.
        """
        if self.outcome is None:
            raise StateError("there is nothing to replay before the machine has ended: wait() or stop() it first")
        return self.replay_of(self.outcome)()

    def replay_of(self, outcome: Outcome) -> Callable[[], Replayed]:
        """What repeats the run that ended so, also after :meth:`close` if it began at the boot."""
        from vmm.observe.replay import Death, Replayed, find
        from vmm.snapshot.replica import replica

        number, began = outcome.vcpu or 0, self.course
        before = began.exits[number] if began.exits else 0
        exits = self.vcpus[number].recorded - before

        def look() -> Replayed:
            if self.course is not began or self.running:
                return Replayed(why="the machine has gone on since, or its checkpoint is closed")
            ram = self.memory if self._vm is not None else None
            death = Death(number, exits, outcome.last_exits, outcome.seconds, ram)
            with self._budget.aside() if self._budget is not None else contextlib.nullcontext():
                return find(death, lambda: replica(self))

        return look

    def trace(self, *, capacity: int = 1 << 18, keep: int = 1 << 20, instructions: bool = True) -> Trace:
        """Trace every exit from now on, until :meth:`Trace.stop`; before the start or while it runs.

        Each vCPU and the I/O thread has a ring of ``capacity`` events (a power of two), and :class:`Trace` keeps the
        newest ``keep``. ``instructions``: see there. Raises :class:`~vmm.errors.StateError` while another trace is on.
        """
        from vmm.observe.trace import Trace
        from vmm.trace_rings import TraceRings

        vm = self._open_vm()
        if self._tracing is not None and self._tracing.on:
            raise StateError("the machine is traced already: stop that trace first")
        self._rings = self._rings or TraceRings(vm, range(len(self.vcpus)))
        self._tracing = Trace(self, self._rings, capacity=capacity, keep=keep, instructions=instructions)
        return self._tracing

    def profile(self, hz: float = 100.0, *, stacks: bool = False) -> Profile:
        """Sample where the vCPUs are, ``hz`` times a second, until :meth:`Profile.stop`."""
        from vmm.observe.profile import Profile

        return Profile(self, hz, stacks=stacks)

    # ---- running ----

    @property
    def running(self) -> bool:
        """Whether vCPU threads are running (or paused)."""
        return bool(self._threads)

    @property
    def ended(self) -> Outcome | None:
        """How it ended, if it has, without waiting for that."""
        if self._threads and select.select([self.stop_fd], [], [], 0)[0]:
            self._end()
        return self.outcome

    def _open_vm(self) -> Any:
        if self._vm is None:
            raise StateError("the machine is closed: make a new one")
        return self._vm

    def start(self) -> None:
        """Load the image if that was not done, and let the vCPUs run. Returns at once."""
        self._open_vm()
        with self._lock:
            if self._threads:
                raise StateError("the machine runs already")
            if self._left:
                raise StateError("the machine has moved: it runs elsewhere")
            self.load()
            if self.outcome is not None:
                check(lib.vmm_vm_rearm(self._vm))
                self.console.reopen()
                self.outcome = None
                self._symbols_settled = False
            self.samples.clear()
            self._started_at = time.monotonic()
            if not self._runners:
                self._runners = [Runner(f"vcpu{vcpu.number}") for vcpu in self.vcpus]
            self._threads = list(self._runners)
            self._inside = len(self._threads)
            for starter in self._starters:
                starter()
            for vcpu, thread in zip(self.vcpus, self._threads, strict=True):
                thread.start(partial(self._run_vcpu, vcpu))
            check(lib.vmm_vm_watch_halt(self._vm))

    def _run_vcpu(self, vcpu: Any) -> None:
        lib.vmm_vcpu_run(vcpu.native)
        with self._lock:
            self._inside -= 1
            last = self._inside == 0
        if last:
            self.console.close()  # who expects output is told at once that there is no more

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the end. After ``timeout`` seconds the machine is stopped and the outcome is ``timeout``.

        An exception raised in a device's or hook's own code comes out of here as itself; the machine is then
        stopped and can be looked at.
        """
        self._refuse_own_thread()
        if not self._threads and self.outcome is None:
            raise StateError("the machine was not started")
        limits = self.limits(timeout)
        while self._threads and not select.select([self.stop_fd], [], [], limits.left if limits else None)[0]:
            if limits and (code := limits.due()):
                lib.vmm_vm_stop(self._vm, _STOP_HOST, code)
                break
        return self._finish()

    async def wait_async(self, timeout: float | None = None) -> Outcome:
        """:meth:`wait` for asyncio: the event loop goes on meanwhile. Cancelling it leaves the machine running."""
        from vmm import aio

        limits = self.limits(timeout)
        while self._threads and not await aio.readable(self.stop_fd, limits.left if limits else None):
            if limits and (code := limits.due()):
                self.interrupt(code)
                break
        return self.wait()

    def processor_seconds(self, vcpu: int) -> float:
        """How much processor time the thread of a vCPU has had, of this and earlier runs."""
        return self._runners[vcpu].processor_seconds if self._runners else 0.0

    def limits(self, timeout: float | None = None) -> Watch | None:
        """Who tells when ``timeout`` seconds have passed, or the guest has stalled as the configuration has it;
        ``None`` where there is neither. For loops that wait for the end."""
        if timeout is None and self.config.stall is None:
            return None
        from vmm.observe.watch import Watch

        return Watch(self, timeout, self.config.stall)

    def run(self, timeout: float | None = None) -> Outcome:
        """:meth:`start`, then :meth:`wait` (default: the configuration's timeout)."""
        self.start()
        return self.wait(self.config.timeout if timeout is None else timeout)

    def stop(self, code: int = 0) -> Outcome:
        """End the run now; the outcome is ``stopped`` unless the guest ended first."""
        self._refuse_own_thread()
        if not self._threads and self.outcome is None:
            raise StateError("the machine was not started")
        if self._threads:
            lib.vmm_vm_stop(self._vm, _STOP_HOST, code)
        return self._finish()

    def interrupt(self, code: int) -> None:
        """Ask for the end without waiting: 0 stopped, 1 timeout, 2 interrupted, 3 terminated, 4 stalled."""
        lib.vmm_vm_stop(self._open_vm(), _STOP_HOST, code)

    def pause(self) -> None:
        """Hold every vCPU between two instructions; registers and memory are then consistent. Nests."""
        pause(self._open_vm())
        with self._lock:
            self._pauses += 1

    def resume(self) -> None:
        """Undo one :meth:`pause`."""
        check(lib.vmm_vm_resume(self._open_vm()))
        with self._lock:
            self._pauses -= 1

    @property
    def paused(self) -> bool:
        """Whether a :meth:`pause` is in force: somebody's who looks at the guest, or a debugger's."""
        return self._pauses > 0

    # ---- time: states, checkpoints ----

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """Held, its I/O thread also if no vCPU runs; no debugger's breakpoint in memory."""
        self._open_vm()
        self._refuse_own_thread()
        self.pause()
        try:
            # Only now is it known whether the guest has ended: its outcome is of the state that it ended in.
            _ = self.ended
            with contextlib.ExitStack() as held:
                for hold, release in self._holders:
                    hold()
                    held.callback(release)
                with self.memory.without_breakpoints():
                    yield
        finally:
            self.resume()

    def _have_all_memory(self) -> None:
        if self.lazy:
            self.lazy.complete()

    def save(self) -> State:
        """Everything but memory and the contents of disks, as a plain value. The machine is held meanwhile."""
        from vmm.cpu import state as processors

        with self._still():
            self.load()
            # Devices finish what is in flight: they interrupt, which is a part of the processors' state.
            devices = {device.name: device.save() for device in self.devices}
            return {
                "version": 1,
                "processors": processors.save(self._vm, self.vcpus),
                "devices": devices,
                "input": self.console.pending(),
            }

    def load_state(self, state: State, *, clock: str = "advanced") -> None:
        """Become what :meth:`save` gave, on a machine of the same configuration whose memory is that of then.

        ``clock``: ``"advanced"``, the guest's clocks are as far as they would be if they had gone on with the host's
        since then, or ``"kept"``, they go on from where they stood (``docs/snapshots.md``).

        Raises ``ValueError`` for a state that is not one of such a machine; it is of no use then, but to be loaded
        again.
        """
        from vmm.cpu import state as processors
        from vmm.snapshot.clock import advances

        ahead = advances(clock)
        if not isinstance(state, dict) or state.keys() != {"version", "processors", "devices", "input"}:
            raise ValueError("not the state of a machine")
        devices = {device.name: device for device in self.devices}
        if state["version"] != 1 or not isinstance(state["input"], bytes) or not isinstance(state["devices"], dict):
            raise ValueError("not the state of a machine of version 1")
        if odd := devices.keys() ^ state["devices"].keys():
            raise ValueError(f"the state is of a machine with other devices: {', '.join(sorted(map(str, odd)))}")
        with self._still():
            self.course, self._from_boot = Course(obstacle=_WENT_ON), None
            for name, device in devices.items():
                device.load(state["devices"][name])
            self.console.rewind(state["input"])
            processors.load(self._vm, self.vcpus, state["processors"], ahead=ahead)
            passed = processors.passed_since(state["processors"])
            if not ahead or passed < 0:  # a host whose clock was set back: the guest's does not follow
                for device in devices.values():
                    device.set_back(passed)

    def snapshot(
        self, path: str | os.PathLike[str], *, differential: bool = False, series: Series | None = None
    ) -> Snapshot:
        """Write the machine into the directory ``path``, and answer the snapshot, open. It is held meanwhile.

        ``differential``: only the memory written since the last snapshot of this machine that is still there; that
        one is its parent. ``series``: of one's own, whose last one it is. Disks that can be written are copied into
        the directory. A snapshot of that name is replaced when the new one is whole. See ``docs/snapshots.md``.
        Raises :class:`~vmm.errors.SnapshotError` for what cannot be asked, :class:`~vmm.errors.HostError` for what
        the host refuses (a full disk): the machine goes on.
        """
        from vmm.snapshot.series import Series

        self._have_all_memory()
        with self._still():
            self._series = self._series or Series(self)
            return (series or self._series).write(path, differential)

    @classmethod
    def restore(
        cls,
        source: str | os.PathLike[str] | socket.socket,
        *,
        identity: str = "new",
        clock: str = "advanced",
        check: bool = True,
        later: bool = False,
        kvm: str = KVM_PATH,
        **fields: Any,
    ) -> Machine:
        """A new machine that goes on from a snapshot: :meth:`start` it.

        Its memory is the snapshot's, read when it is looked at, until the guest writes it; the snapshot is not
        changed, and may be restored again. ``check`` compares every byte with its checksum first. ``fields`` say anew
        how the machine is used, and where what the snapshot does not hold is: ``docs/snapshots.md``. ``identity``:
        ``"new"``, another machine than the one that was saved (``docs/clones.md``), or ``"same"``, that one, of which
        there is no other then. ``clock``: ``"advanced"``, what the host's clock says has passed has passed for the
        guest, or ``"kept"``.

        ``later``: memory is the machine's own, and pages come by userfaultfd when they are touched, before that those
        of the recorded working set (:attr:`lazy`, :mod:`vmm.snapshot.working_set`). They come over a socket if
        ``source`` is ``"unix:PATH"``, where ``pyvmm serve`` is, which is looked for again when it is lost; or a socket,
        connected to a :class:`vmm.snapshot.serving.PageServer`, which stays the caller's.

        Raises :class:`~vmm.errors.ConfigError` naming the field that is missing,
        :class:`~vmm.errors.SnapshotError` when it is damaged or of another version,
        :class:`~vmm.errors.HostError` when this host lacks what the guest was told it has, or userfaultfd.
        """
        from vmm.snapshot import clock as clocks
        from vmm.snapshot import identity as identities
        from vmm.snapshot.restoring import prepare

        renewed = identities.asked(identity)
        clocks.advances(clock)
        if fields.get("huge_pages"):
            raise ConfigError("a restored machine's memory is a snapshot's file: leave out --huge-pages (huge_pages)")
        with prepare(source, check=check, later=later) as prepared:
            config = prepared.config(fields)
            if renewed:
                config = identities.another(config, fields)
            machine = cls(config, kvm=kvm, origin=prepared.origin)
            machine.lazy = prepared.finish(machine, clock)
            if attendant := prepared.attend(machine.lazy, machine._message):
                machine.attendants.append(attendant)
            if renewed:
                identities.renew(machine)
            else:
                machine._announce()
            return machine

    def clone(
        self,
        n: int = 1,
        *,
        prepare: Callable[[Machine, int], object] | None = None,
        fields: Callable[[int], dict[str, Any]] | None = None,
        clock: str = "advanced",
    ) -> list[Machine]:
        """``n`` new machines that go on from where this one is: :meth:`start` them. This one is held meanwhile.

        They share its memory and the contents of its disks until somebody writes, and outlive it. What a clone writes
        to disks goes with it. Each has an identity of its own: ``docs/clones.md``. ``fields(index)`` may say anew how
        a clone is used and where its networks are, which is needed for taps and sockets; ``prepare(clone, index)`` is
        called before it runs. ``clock``: as of :meth:`load_state`.

        Raises :class:`~vmm.errors.ConfigError` for a network that cannot be there twice,
        :class:`~vmm.errors.StateError` for a machine with a share or on huge pages; there is no clone then.
        """
        from vmm.snapshot.clones import Mould, make_together

        self._have_all_memory()
        with self._still():
            mould = Mould(self, n, clock)
        with mould:
            configs = [mould.config(fields(index) if fields else {}) for index in range(n)]

            def make(index: int) -> Machine:
                clone = type(self)(configs[index], kvm=self.kvm_path, origin=mould.origin)
                mould.finish(clone)
                return clone

            clones = make_together(make, n)
        try:
            for index, clone in enumerate(clones):
                if prepare:
                    prepare(clone, index)
        except BaseException:
            for clone in clones:
                clone.close()
            raise
        return clones

    def checkpoint(self) -> Checkpoint:
        """Keep the machine's state, memory and disks as they are now, for :meth:`rollback`.

        It may run, be paused, or not have started (its image is loaded then). The guest's view of time stands still in
        a checkpoint. Raises :class:`~vmm.errors.StateError` where a device cannot be held: a share, whose server is
        another process.
        """
        from vmm.snapshot import replica
        from vmm.snapshot.checkpoint import Checkpoint

        self._have_all_memory()
        with self._still():
            self.load()
            checkpoint = Checkpoint(self)
            self._checkpoints.append(checkpoint)
            self.course = replica.course(self, checkpoint)
            return checkpoint

    def rollback(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of this machine; any number of times, and to any of several.

        Its clocks go back with it, the one of the day too: kvmclock, TSC and RTC go on from where they stood.

        A machine that runs (or is paused) goes on from there; one that has ended can be started again. The console's
        transcript keeps what was printed meanwhile, but :meth:`Console.expect` looks behind it.
        """
        if checkpoint not in self._checkpoints:
            raise StateError("that is no checkpoint of this machine, or it was closed")
        from vmm.snapshot import replica

        with self._still():
            checkpoint.restore()
            self.course, self._from_boot = replica.course(self, checkpoint), None

    def migrate(self, destination: str, **how: Any) -> Migrated:
        """Move to another process, ``"unix:PATH"`` or ``"tcp:HOST:PORT"``, where :func:`vmm.migrate.receive` waits.

        ``how`` is what :class:`vmm.migrate.Migration` takes. The machine ends here, with the outcome ``migrated``.
        Raises :class:`~vmm.errors.MigrationError` when it does not get there.
        """
        from vmm.migrate.source import Migration

        with self._lock:
            if self.migration is not None:
                raise StateError("the machine is on its way already: cancel that first")
            self.migration = Migration(self, destination, **how)
        try:
            return self.migration.run()
        finally:
            self.migration = None

    def keep(self, directory: str | os.PathLike[str], *, every: float = 60.0, retain: int = 8) -> Keeper:
        """Write a snapshot into ``directory`` every so many seconds; the last ``retain`` of them can be restored.

        See :mod:`vmm.snapshot.keeping`. It goes on until the machine is closed, or :meth:`Keeper.stop`.
        """
        from vmm.snapshot.keeping import Keeper

        self._open_vm()
        keeper = Keeper(self, directory, every, retain, tell=self._message)
        self.attendants.append(keeper)
        return keeper

    def standby(self, address: str, *, every: float = 1.0, **how: Any) -> Shadow:
        """Have a second process at ``address`` follow, every so many seconds, and take over when this one dies.

        See :class:`vmm.migrate.standby.Shadow`, which also takes ``how``, and :meth:`vmm.migrate.Receiver.stand_by`.
        """
        from vmm.migrate.standby import Shadow

        if not self.running:
            raise StateError("a machine that does not run has nothing to follow: start it first")
        shadow = Shadow(self, address, every, tell=self._message, **how)
        self.attendants.append(shadow)
        return shadow

    def left(self) -> None:
        """It goes on elsewhere: end here, wherever it stands."""
        self._left = True
        lib.vmm_vm_stop(self._open_vm(), _STOP_HOST, 0)

    def forget(self, checkpoint: Checkpoint) -> None:
        """A checkpoint was closed."""
        if checkpoint in self._checkpoints:
            self._checkpoints.remove(checkpoint)
        if self.course.checkpoint is checkpoint:
            self.course = self._from_boot or Course(obstacle=_BROUGHT_BACK)

    # ---- hooks ----

    def on_port(self, port: int | range, callback: Callable[[Access], int | None]) -> Hook:
        """Have ``callback(access)`` called for every access to these ports, before a write or after a read.

        The device behind still acts. A number that the callback returns replaces the value: what the device is
        given, or what the guest reads. It runs on the vCPU's thread: it may look at registers and memory,
        :meth:`interrupt`, and remove hooks. An exception stops the machine and comes out of :meth:`wait`.
        """
        return self._hooked().access(PIO, port, callback)

    def on_access(self, gpa: int | range, callback: Callable[[Access], int | None]) -> Hook:
        """:meth:`on_port` for guest-physical addresses outside RAM.

        Raises :class:`~vmm.errors.BusError` for RAM, whose accesses do not exit: :meth:`watch` it.
        """
        return self._hooked().access(MMIO, gpa, callback)

    def on_exit(self, reasons: str | Iterable[str], callback: Callable[[int, Exit], object]) -> Hook:
        """Have ``callback(vcpu, exit)`` called, on the vCPU's thread, after exits for these reasons were answered.

        ``reasons`` are names of :data:`vmm.cpu.vcpu.EXIT_REASONS`, for example ``"io"`` or ``["shutdown", "hlt"]``.
        """
        return self._hooked().exits(reasons, callback)

    @property
    def hooked(self) -> bool:
        """Whether there are hooks."""
        return bool(self._hooks)

    def _hooked(self) -> Hooks:
        vm = self._open_vm()
        with self._lock:
            if self._hooks is None:
                from vmm.hooks import Hooks

                self._hooks = Hooks(vm, self._callback_failed)
                self.on_close(self._hooks.close)
            return self._hooks

    # ---- debugging ----

    @property
    def debug(self) -> Debugger:
        """The machine's debugger, made on first use (the image is loaded then): see :class:`vmm.cpu.debug.Debugger`."""
        if self._debugger is None:
            from vmm.cpu.debug import Debugger

            self._open_vm()
            self.load()
            self._debugger = Debugger(
                self._vm,
                self.vcpus,
                self.memory,
                pause=self.pause,
                resume=self.resume,
                failed=self._callback_failed,
                stop_fd=self.stop_fd,
                emulated=self.host.emulated,
                unstopped=self.host.unstopped,
            )
        return self._debugger

    def breakpoint(
        self, address: int, callback: Callable[[Stop], object] | None = None, *, hardware: bool = False
    ) -> Point:
        """Call ``callback(stop)`` before the instruction at linear ``address``: ``debug.breakpoint``."""
        return self.debug.breakpoint(address, callback, hardware=hardware)

    def watch(self, address: int, size: int = 8, callback: Callable[[Stop], object] | None = None) -> Point:
        """Call ``callback(stop)`` behind a write to linear ``address``: ``debug.watch``."""
        return self.debug.watch(address, size, callback)

    @property
    def stop_fd(self) -> int:
        """A file descriptor that is readable once the machine has ended."""
        return int(lib.vmm_vm_stop_fd(self._open_vm()))

    def _message(self, text: str) -> None:
        text = printable(text, _MESSAGE_MAX)
        if len(self.messages) < _MESSAGES_MAX:
            self.messages.append(text)
            if self.on_message is not None:
                self.on_message(text)

    def _callback_failed(self, error: BaseException) -> None:
        with self._lock:
            if self._exception is None:
                self._exception = error
        lib.vmm_vm_stop(self._vm, _STOP_CALLBACK, 0)

    def _refuse_own_thread(self) -> None:
        if any(thread.current for thread in self._threads):
            raise StateError("a device's own code cannot wait for the end: ask for it with interrupt()")

    def _end(self) -> Outcome:
        """Join the vCPUs and make the outcome; whoever comes second gets the same one."""
        with self._ending:
            for thread in self._threads:
                thread.join()
            for stopper in self._stoppers if self._threads else ():
                stopper()
            if self.outcome is None:
                self.outcome = self._make_outcome()
            self._threads = []
            return self.outcome

    def _finish(self) -> Outcome:
        outcome = self._end()
        with self._lock:
            error, self._exception = self._exception, None
        if error is not None:
            raise error
        return outcome

    def _make_outcome(self) -> Outcome:
        from vmm.cpu.vcpu import named, operand_bits, was_reset

        code, number = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        native = lib.vmm_vm_stop_reason(self._vm, code, number)
        reason = _HOST_REASONS.get(code[0], "stopped") if native == _STOP_HOST else _REASONS.get(native, "stopped")
        if self._left:
            reason = "migrated"
        vcpu_number = int(number[0]) if number[0] < len(self.vcpus) else None
        vcpu = self.vcpus[vcpu_number or 0]
        regs, sregs = vcpu.structs()
        outcome = Outcome(
            reason,
            int(code[0]),
            vcpu=vcpu_number,
            registers=lambda: named(regs, sregs),
            bits=operand_bits(sregs),
            last_exits=vcpu.kept_exits(),
            console=self.console.tail(),
            seconds=time.monotonic() - self._started_at,
        )
        if reason == "triple-fault" and was_reset(regs, sregs) and self.entry and self.entry.rip != regs.rip:
            outcome.seek(self.replay_of(outcome))
        if native == _STOP_CALLBACK and self._exception is not None:
            outcome.explanation = f"code of a device or hook raised {self._exception!r:.200}"
        if reason == "emulation-failure" and outcome.code != KVM_EMULATION:
            from vmm.cpu.internal_error import sentence

            outcome.data = vcpu.internal_error()
            outcome.explanation = sentence(outcome.code, outcome.data)
        outcome.instruction = vcpu.failed_instruction() or self._bytes_at(vcpu, regs.rip + sregs.cs.base)
        if reason in ("reset", "halt", "timeout", "stalled") and _PANIC_MARK in outcome.console:
            # panic=-1 turns a panic into a reset: the guest's own last words say which it was.
            outcome.reason = "panic"
        if outcome.reason == "no-bios":
            from vmm.observe import bios

            outcome.explanation = bios.call(outcome.registers, self.memory)
        if outcome.reason == "panic":
            at = outcome.console.rfind(_PANIC_MARK)
            if at >= 0:
                line = outcome.console[at:].split(b"\n", 1)[0].split(b" ]---")[0].strip()
                outcome.explanation = f"the guest's kernel panicked: {line.decode(errors='replace')}"
        return outcome

    def _bytes_at(self, vcpu: Any, linear: int) -> bytes:
        found = b""
        while len(found) < 16:
            gpa = vcpu.translate((linear + len(found)) & ((1 << 64) - 1))
            if gpa is None:
                break
            size = min(16 - len(found), layout.PAGE - gpa % layout.PAGE)
            try:
                found += self.memory.read(gpa, size)
            except IndexError:
                break
        return found

    # ---- the end ----

    def close(self) -> None:
        """Stop and free everything. Twice is fine."""
        if self._vm is None:
            self._run_closers()
            return
        self._refuse_own_thread()
        if (migration := self.migration) is not None:
            with contextlib.suppress(StateError):  # it is handed over
                migration.cancel()
            migration.wait()
        for attendant in list(self.attendants):
            attendant.stop()
        if self._threads:
            lib.vmm_vm_stop(self._vm, _STOP_HOST, 0)
            self._end()
        for runner in self._runners:
            runner.close()
        if self._debugger is not None:
            self._debugger.close()
            self._debugger = None
        if self._tracing is not None:
            self._tracing.finish()
        for checkpoint in list(self._checkpoints):
            checkpoint.close()
        if self._series is not None:
            self._series.close()
        for device in self.devices:
            device.reset()
        if self.lazy is not None:
            self.lazy.close()
        if hasattr(self, "memory"):
            self.memory.close()
        vm, self._vm = self._vm, None
        for vcpu in self.vcpus:
            vcpu.closed()
        lib.vmm_vm_destroy(vm)
        self._run_closers()
        if hasattr(self, "console"):
            self.console.destroy()

    def _run_closers(self) -> None:
        closers, self._closers = self._closers, []
        for closer in reversed(closers):
            closer()

    def on_start(self, starter: Any) -> None:
        """Have ``starter()`` called before the vCPUs run."""
        self._starters.append(starter)

    def on_stop(self, stopper: Any) -> None:
        """Have ``stopper()`` called once no vCPU runs any more."""
        self._stoppers.append(stopper)

    def on_still(self, hold: Any, release: Any) -> None:
        """Have ``hold()`` called before the machine's state is taken or replaced, and ``release()`` after it."""
        self._holders.append((hold, release))

    def on_close(self, closer: Any) -> None:
        """Have ``closer()`` called once the machine's native half is gone."""
        self._closers.append(closer)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_vm", None) is not None:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._vm is None else "running" if self._threads else "stopped"
        return f"<Machine {self.config.memory >> 20} MiB, {self.config.cpus} vCPU, {state}>"


BOOT_STEPS = [
    Machine._open_image,
    Machine._open_kvm,
    Machine._map_memory,
    Machine._remedy_host,
    Machine._choose_cpuid,
    Machine._create_devices,
    Machine._create_vcpus,
    Machine._go_on,
]

__all__ = ["BOOT_STEPS", "HostError", "Machine"]
