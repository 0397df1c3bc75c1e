"""Building a machine: :data:`STEPS`, in order, each of which makes parts from those before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm import layout
from vmm._ffi import check, lib
from vmm.bus import Bus
from vmm.config import LINUX_KINDS
from vmm.console import Console
from vmm.errors import ConfigError, StateError
from vmm.machine.background import Background
from vmm.machine.board import Board
from vmm.machine.ending import Ending
from vmm.machine.execution import Execution
from vmm.machine.firmware import Firmware
from vmm.machine.hold import Hold
from vmm.machine.interception import Interception
from vmm.machine.timeline import Timeline
from vmm.machine.view import View
from vmm.machine.vm import Vm
from vmm.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.boot import Image
    from vmm.devices.device import State
    from vmm.machine.parts import Parts
    from vmm.outcome import Outcome, Replayed
    from vmm.snapshot.origin import Origin


class Builder:
    """Builds the parts of ``machine``, from its image or from an ``origin``, whose machine it continues.

    ``replay(outcome)`` returns what repeats a run that ended so.
    """

    def __init__(
        self, machine: Parts, origin: Origin | None, replay: Callable[[Outcome], Callable[[], Replayed]]
    ) -> None:
        self._machine = machine
        self._config = machine.config
        self._origin = origin
        self._replay = replay
        self._image: Image | None = None
        self._kind = ""
        self._merge_ticks = False
        self._later: Sequence[Callable[[Builder], None]] = ()

    def build(self) -> None:
        """Run all steps; for an ``arriving`` origin those that need nothing its source still has, a disk or a tap."""
        first = STEPS
        if self._origin is not None and self._origin.arriving:
            from vmm.cpu import processor_state  # noqa: F401 - its import takes longer than loading one, while the guest stands

            config = self._config
            held = bool(config.disks or config.nets or config.shares or config.vsock)
            at = STEPS.index(Builder.create_devices if held else Builder.adopt_origin)
            first, self._later = STEPS[:at], STEPS[at:]
        for step in first:
            step(self)

    def finish(self, state: State) -> None:
        """Run the steps that were left for later, with the state that has arrived."""
        if self._origin is None or not self._origin.arriving:
            raise StateError("this machine is not on its way here")
        self._origin.state = state
        for step in self._later:
            step(self)

    # ---- the steps ----

    def open_image(self) -> None:
        """Open the image and find out its kind."""
        config = self._config
        if self._origin is not None:
            self._kind = self._origin.kind
            return
        if config.symbols is not None:
            from vmm.observe.symbols import Symbols

            Symbols.check(config.symbols)  # not when the guest has died and its end is to be explained
        self._kind = config.kind
        if config.kernel is not None:
            from vmm import boot

            self._image = boot.Image.open(config.kernel)
            self._machine.closed.callback(self._image.close)
            if self._kind == "auto" and config.address is None:
                self._kind = boot.identify(self._image)

    def open_kvm(self) -> None:
        """Choose the remedies for this host, and create the native machine."""
        from vmm import host

        machine = self._machine
        machine.host = host.check(machine.kvm_path, self._config)
        # Where a tick costs milliseconds of emulation, a Linux guest gets a PIT of ours, which merges them.
        self._merge_ticks = machine.host.emulated and self._kind in LINUX_KINDS
        if self._origin is not None:
            self._merge_ticks = self._origin.merge_ticks  # a device the guest knows
        chips = lib.VMM_VM_IRQCHIP | (0 if self._merge_ticks else lib.VMM_VM_PIT)
        machine.vm = Vm(machine.kvm_path, chips, machine.log.add)
        machine.closing.callback(machine.vm.close)
        machine.closing.callback(self._release_vcpus)
        host.require_capabilities(machine.vm.handle)

    def _release_vcpus(self) -> None:
        for vcpu in self._machine.vcpus:
            vcpu.closed()

    def map_memory(self) -> None:
        """Give the machine its memory: its own, or files of its origin's."""
        machine = self._machine
        regions = layout.ram_regions(self._config.memory)
        files = self._origin.files if self._origin is not None else None
        machine.memory = GuestMemory(machine.vm.handle, regions, huge_pages=self._config.huge_pages, files=files)
        machine.closing.callback(machine.memory.close)

    def enable_remedies(self) -> None:
        """Have the run loop do what this host's KVM leaves undone."""
        if self._machine.host.remedies:
            check(lib.vmm_compat_enable(self._machine.native, self._machine.host.remedies))

    def choose_cpuid(self) -> None:
        """Choose what CPUID offers the guest."""
        from vmm.cpu.cpuid import CpuidTable

        machine, cpus = self._machine, self._config.cpus
        limit = machine.vm.extension(lib.KVM_CAP_MAX_VCPUS) or 1
        if cpus > limit:
            raise ConfigError(f"{cpus} vCPUs are more than this host allows: give --cpus 1 to {limit}")
        machine.cpuid = CpuidTable(machine.native, cpus, hypercalls=not machine.host.vmcall_loops)
        if self._origin is not None:
            machine.cpuid.become(self._origin.cpuid)

    def connect_parts(self) -> None:
        """Make the parts that own what happens to the machine from now on, and say how they are closed."""
        machine, config = self._machine, self._config
        vm, memory, vcpus = machine.vm, machine.memory, machine.vcpus
        console = machine.console = Console()
        machine.closed.callback(console.destroy)

        execution = machine.execution = Execution(
            vm, vcpus, console, load=lambda: firmware.load(), make_outcome=lambda *end: ending.outcome(*end)
        )
        machine.bus = Bus(vm.handle, execution.fail)
        board = machine.board = Board(vm, machine.bus, machine.closed, execution.fail)
        firmware = machine.firmware = Firmware(
            config, self._kind, self._image, machine.host, board, memory, vcpus, merge_ticks=self._merge_ticks
        )
        ending = Ending(vm, vcpus, memory, console, firmware, self._replay)
        hold = machine.hold = Hold(vm, execution, memory)
        restored = self._origin is not None
        timeline = machine.timeline = Timeline(
            config, vm, hold, firmware, board, machine.cpuid, vcpus, memory, console, restored=restored
        )
        view = machine.view = View(config, vm, execution, firmware, vcpus, memory, machine.log)
        interception = machine.interception = Interception(
            vm, execution, firmware, vcpus, memory, machine.host, machine.closed
        )
        background = machine.background = Background(vm, timeline, machine.log)
        # In reverse: what runs beside the guest; the guest, none of whose threads may wait for lazy memory; what looks
        # at it; then what they have touched.
        for close in (
            timeline.close_lazy, board.reset, timeline.close, view.close, interception.close, execution.close,
            timeline.give_up_lazy, execution.ask_end, background.stop,
        ):  # fmt: skip
            machine.closing.callback(close)

    def create_devices(self) -> None:
        """Attach the devices that every machine has, and those that the configuration asks for."""
        from vmm.machine import standard_devices

        machine, config, board = self._machine, self._config, self._machine.board
        standard_devices.attach_standard(board, config, machine.memory, machine.console)
        if self._merge_ticks:
            standard_devices.attach_pit(board, machine.execution, machine.hold)
        if config.virtio == "pci":
            board.create_pci_host()
        standard_devices.add_configured(board, config, machine.console)

    def create_vcpus(self) -> None:
        """Create the vCPUs, each with its place in CPUID."""
        from vmm.cpu.vcpu import Vcpu

        machine = self._machine
        for number in range(self._config.cpus):
            machine.vcpus.append(Vcpu(machine.native, number, machine.memory, machine.cpuid))

    def adopt_origin(self) -> None:
        """Continue the origin's machine, in place of loading the image."""
        origin, self._origin = self._origin, None
        if origin is None:
            return
        self._machine.firmware.adopt(origin)
        if origin.state is not None:
            self._machine.timeline.load(origin.state, clock=origin.clock)


STEPS: Sequence[Callable[[Builder], None]] = (
    Builder.open_image,
    Builder.open_kvm,
    Builder.map_memory,
    Builder.enable_remedies,
    Builder.choose_cpuid,
    Builder.connect_parts,
    Builder.create_devices,
    Builder.create_vcpus,
    Builder.adopt_origin,
)
