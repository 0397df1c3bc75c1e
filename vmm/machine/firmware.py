"""What a machine starts from: the image, the ACPI tables and the command line, put where the guest expects them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm import layout
from vmm.config import LINUX_KINDS
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.boot import Entry, Image
    from vmm.boot.acpi import Tables
    from vmm.config import MachineConfig
    from vmm.cpu.vcpu import Vcpu
    from vmm.host import Remedies
    from vmm.machine.board import Board
    from vmm.memory import GuestMemory
    from vmm.snapshot.origin import Origin

RESET_VALUE = 1  # of the ACPI reset register
S5 = 5  # sleep type of soft-off
_E820_RESERVED = 2
_DISPENSABLE = ("GLIBC_TUNABLES=", "clocksource=")


class Firmware:
    """Takes the place of a machine's firmware: loads the image, once, and enters it on the first of ``vcpus``.

    ``kind`` is the image's, as found or configured. ``merge_ticks``: the host emulates guest kernel code, and the
    machine has a timer that merges ticks.
    """

    def __init__(
        self,
        config: MachineConfig,
        kind: str,
        image: Image | None,
        remedies: Remedies,
        board: Board,
        memory: GuestMemory,
        vcpus: Sequence[Vcpu],
        *,
        merge_ticks: bool,
    ) -> None:
        self.kind = kind
        self.image = image
        self.entry: Entry | None = None
        self.command_line = ""
        self.notes: list[str] = []
        self.merge_ticks = merge_ticks
        self._config = config
        self._remedies = remedies
        self._board = board
        self._memory = memory
        self._vcpus = vcpus

    def load(self) -> Entry:
        """Load the image and point vCPU 0 at it, if that was not done."""
        if self.entry is None:
            from vmm.cpu import modes

            self.entry = self._load()
            self.notes += self.entry.notes
            modes.enter(self._vcpus[0].native, self.entry)
        return self.entry

    def adopt(self, origin: Origin) -> None:
        """Take entry and command line from the machine that this one continues, in place of :meth:`load`."""
        from vmm.boot.entry import Entry

        self.entry = Entry(origin.mode, origin.kind, 0)
        self.entry.symbols = origin.symbols
        self.command_line = origin.command_line

    def _load(self) -> Entry:
        from vmm import boot
        from vmm.boot.loader import command_line_room

        config = self._config
        if self.image is None:
            raise ConfigError("there is nothing to boot: give a kernel image (kernel=..., --kernel FILE)")
        initrds = [boot.Image.open(path) for path in config.initrd]
        tables = self._tables()
        room = command_line_room(self.image, self.kind)
        self.command_line = command_line(config, self.kind, self._remedies, tables, room, ticks=self.merge_ticks)
        return boot.load(
            self._memory,
            image=self.image,
            kind=config.kind,
            cmdline=self.command_line,
            initrds=initrds,
            acpi_rsdp=self._write_tables(tables),
            load_address=config.address,
            flat_mode=config.mode,
            unpack=config.unpack,
            e820=[(address, size, _E820_RESERVED) for address, size in tables.reserved],
        )

    def _tables(self) -> Tables:
        """Describe the machine to the guest: fixed hardware, and what each device adds of itself."""
        from vmm.boot import acpi

        tables = acpi.Tables()
        tables.pm1a_event, tables.pm1a_control = layout.PM1_EVENT, layout.PM1_CONTROL
        tables.pm_timer = layout.PM_TIMER
        tables.reset = (layout.RESET, RESET_VALUE)
        tables.s5, tables.sci = S5, layout.GSI_SCI
        tables.rtc, tables.century = True, 0x32
        tables.dsdt += [
            acpi.uart_node(layout.COM1, irq=layout.GSI_COM1, uid=1),
            acpi.rtc_node(layout.RTC, irq=layout.GSI_RTC),
            acpi.pvpanic_node(layout.PVPANIC),
        ]
        self._board.describe(tables)
        return tables

    def _write_tables(self, tables: Tables) -> int:
        """Write the ACPI tables and return the RSDP's address; 0 for a machine too small to hold them."""
        from vmm.boot import acpi

        if self._config.memory < layout.ACPI_START + layout.ACPI_SIZE:
            return 0
        rsdp, blobs = acpi.build(
            tables, cpus=self._config.cpus, address=layout.ACPI_START, size=layout.ACPI_SIZE,
            local_apic=layout.LAPIC, io_apic=layout.IOAPIC,
        )  # fmt: skip
        for gpa, data in blobs:
            self._memory.write(gpa, data)
        self._board.generation_id.place()
        return rsdp


def command_line(
    config: MachineConfig, kind: str, remedies: Remedies, tables: Tables, room: int, *, ticks: bool
) -> str:
    """Return the user's words; for Linux also a console, an end after a panic, and what this host needs.

    Where the user gives an option, nothing is added for it. ``room``: the bytes that the image takes. ``ticks``: the
    host emulates guest kernel code, and the machine merges timer ticks.
    """
    given = config.append
    if kind not in LINUX_KINDS:
        return given
    from vmm.boot.cmdline import CommandLine

    said = CommandLine(given)
    tty = "ttyS0" if config.console_device == "uart" else "hvc0"
    added = [] if said.values("console") else [f"console={tty}"]
    # A panic is over at once: the machine ends with it instead of looping for ever.
    added += [] if said.values("panic") else ["panic=-1"]
    if ticks:
        from vmm.cpu.compat import linux_cmdline

        added += [word for word in linux_cmdline() if word.partition("=")[0] not in said]
    if remedies.tsc_fixed:
        from vmm.cpu.compat import KEEP_TIME

        added += [word for word in KEEP_TIME if word.partition("=")[0] not in said]
    # Without ACPI a kernel learns of virtio-mmio devices here; with it, it would find them twice.
    found = tables.virtio_mmio if "off" in said.values("acpi") else []
    line = [*added, *tables.cmdline, *found, given]
    # For programs, and for a clock: an image that takes so short a line (memtest86+) has neither.
    for word in [word for word in added if word.startswith(_DISPENSABLE)]:
        if len(" ".join(line).encode()) > room:
            line.remove(word)
    return " ".join(line).strip()
