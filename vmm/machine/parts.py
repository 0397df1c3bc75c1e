"""What a machine is made of, by name."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmm.machine.message_log import MessageLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._ffi import vmm_vm
    from vmm.boot import Entry, Image
    from vmm.bus import Bus
    from vmm.config import MachineConfig
    from vmm.console import Console
    from vmm.cpu.cpuid import CpuidTable
    from vmm.cpu.vcpu import Vcpu
    from vmm.devices.device import Device
    from vmm.devices.generation_id import GenerationId
    from vmm.devices.pci import PciHost
    from vmm.devices.virtio.blk import Blk
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.host import Remedies
    from vmm.machine.background import Background
    from vmm.machine.board import Board
    from vmm.machine.execution import Execution
    from vmm.machine.firmware import Firmware
    from vmm.machine.hold import Hold
    from vmm.machine.interception import Interception
    from vmm.machine.timeline import Timeline
    from vmm.machine.view import View
    from vmm.machine.vm import Vm
    from vmm.memory import GuestMemory
    from vmm.migrate.source import Migration
    from vmm.observe.samples import Sample
    from vmm.outcome import Outcome
    from vmm.snapshot.lazy import LazyMemory


class Parts:
    """The parts of one machine, each made by a step of :mod:`vmm.machine.build`, and short names for what they own.

    ``closing`` is unwound while the native machine is there, which ends with it; ``closed`` after that.
    """

    host: Remedies
    vm: Vm
    memory: GuestMemory
    bus: Bus
    cpuid: CpuidTable
    console: Console
    execution: Execution
    hold: Hold
    board: Board
    firmware: Firmware
    timeline: Timeline
    view: View
    interception: Interception
    background: Background

    def __init__(self, config: MachineConfig, kvm_path: str) -> None:
        self.config = config
        self.kvm_path = kvm_path
        self.vcpus: list[Vcpu] = []
        self.log = MessageLog()
        self.closing = ExitStack()
        self.closed = ExitStack()

    def close(self) -> None:
        """Stop and free everything. Idempotent. Raises :class:`~vmm.errors.StateError` on a vCPU's own thread."""
        if hasattr(self, "execution"):
            self.execution.refuse_own_thread()
        try:
            self.closing.close()
        finally:
            self.closed.close()

    # ---- the board's ----

    @property
    def native(self) -> vmm_vm:
        """The native machine, for the constructors of devices whose model is C."""
        return self.vm.handle

    @property
    def devices(self) -> list[Device]:
        """All devices, in the order in which they were attached."""
        return self.board.devices

    @property
    def virtio(self) -> list[VirtioDevice]:
        """The virtio devices, in the guest's order."""
        return self.board.virtio

    @property
    def pci(self) -> PciHost | None:
        """The PCI host bridge, if there is one."""
        return self.board.pci

    @property
    def generation_id(self) -> GenerationId:
        """The generation ID, which is another one in each copy of a machine."""
        return self.board.generation_id

    # ---- the firmware's ----

    @property
    def kind(self) -> str:
        """The kind of the image (:data:`vmm.config.KINDS`)."""
        return self.firmware.kind

    @property
    def image(self) -> Image | None:
        """The image, of a machine that was booted from a file."""
        return self.firmware.image

    @property
    def entry(self) -> Entry | None:
        """How the guest is entered, once its image is loaded."""
        return self.firmware.entry

    @property
    def notes(self) -> list[str]:
        """How the image is booted, in sentences."""
        return self.firmware.notes

    @property
    def command_line(self) -> str:
        """The kernel's command line, once the image is loaded."""
        return self.firmware.command_line

    @property
    def symbols_file(self) -> str | None:
        """The file with the image's own symbols, if the image names one."""
        return self.firmware.entry.symbols if self.firmware.entry else None

    # ---- of a run ----

    @property
    def outcome(self) -> Outcome | None:
        """How the last run ended; ``None`` before the end."""
        return self.execution.outcome

    @property
    def samples(self) -> list[list[Sample]]:
        """Where the vCPUs were lately, sampled while a limit was watched (:mod:`vmm.observe.watch`)."""
        return self.execution.samples

    @property
    def messages(self) -> list[str]:
        """What the monitor had to say about the machine."""
        return self.log.texts

    @property
    def on_message(self) -> Callable[[str], object] | None:
        """Called with each new message, on any thread."""
        return self.log.on_message

    @on_message.setter
    def on_message(self, callback: Callable[[str], object] | None) -> None:
        self.log.on_message = callback

    # ---- in time ----

    @property
    def disks(self) -> list[Blk]:
        """The disks, as the configuration has them."""
        return self.timeline.disks

    @property
    def lazy(self) -> LazyMemory | None:
        """Memory that was still to come when the machine was restored (``later``)."""
        return self.timeline.lazy

    @lazy.setter
    def lazy(self, memory: LazyMemory | None) -> None:
        self.timeline.lazy = memory

    @property
    def migration(self) -> Migration | None:
        """The migration that is under way, to be cancelled."""
        return self.background.migration
