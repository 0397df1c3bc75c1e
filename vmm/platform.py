"""The standard devices of a machine, on the addresses of :mod:`vmm.layout`, and the loading of its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm import layout
from vmm.config import LINUX_KINDS
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.boot import Entry
    from vmm.boot.acpi import Tables
    from vmm.console import Console
    from vmm.devices.pci import PciHost
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.machine import Machine

# enum vmm_stop_reason
_POWEROFF, _RESET, _DEBUG_EXIT, _PANIC, _NO_BIOS = 2, 3, 4, 5, 16

RESET_VALUE = 1
_E820_RESERVED = 2
S5 = 5
# Soft-off's sleep type on QEMU (0) and VirtualBox (5, as here), which kernels for them write without asking.
S5_TYPES = (0, S5)
_DISPENSABLE = ("GLIBC_TUNABLES=", "clocksource=")
TICK_SECONDS = 0.02  # where a tick costs milliseconds of emulation: at most 50 a second


def create_devices(machine: Machine) -> None:
    """Create and attach what every machine has."""
    from vmm.devices.acpi_pm import PmTimer, PowerManagement, ResetRegister
    from vmm.devices.debug_exit import DebugExit
    from vmm.devices.generation_id import GenerationId
    from vmm.devices.i8042 import I8042
    from vmm.devices.native import NativeUart
    from vmm.devices.no_bios import NoBios
    from vmm.devices.post import Post
    from vmm.devices.pvpanic import Pvpanic
    from vmm.devices.rtc import Rtc

    uart = NativeUart(machine.line(layout.GSI_COM1), _uart_console(machine))
    machine.on_close(uart.destroy)
    machine.attach(uart, port=layout.COM1, size=8)
    i8042 = I8042(machine.stop_callback(_RESET))
    machine.attach(i8042, port=layout.I8042, size=1, gsi=layout.GSI_I8042)
    machine.attach(i8042, port=layout.I8042 + 4, size=1, first=4)
    machine.attach(
        Rtc(memory=min(machine.config.memory, layout.LOW_RAM_END)), port=layout.RTC, size=2, gsi=layout.GSI_RTC
    )
    machine.attach(Post(), port=layout.POST, size=1)
    machine.attach(NoBios(machine.stop_callback(_NO_BIOS)), port=layout.NO_BIOS, size=1)
    machine.attach(DebugExit(machine.stop_callback(_DEBUG_EXIT)), port=layout.DEBUG_EXIT, size=4)
    machine.attach(Pvpanic(machine.stop_callback(_PANIC)), port=layout.PVPANIC, size=1)
    power = PowerManagement(machine.stop_callback(_POWEROFF), S5_TYPES)
    machine.attach(power, port=layout.PM_BASE, size=6, gsi=layout.GSI_SCI)
    machine.attach(PmTimer(), port=layout.PM_TIMER, size=4)
    machine.attach(ResetRegister(machine.stop_callback(_RESET), RESET_VALUE), port=layout.RESET, size=1)
    _attach_ways_out(machine)
    machine.generation_id = GenerationId(machine.memory, layout.GENERATION_ID, layout.GSI_EVENTS)
    machine.generation_id.line = machine.line(layout.GSI_EVENTS)
    machine.devices.append(machine.generation_id)  # memory alone: on no bus
    if machine.merge_ticks:
        _attach_pit(machine)
    if machine.config.virtio == "pci":
        _create_pci_host(machine)
    _add_configured(machine)


def _attach_ways_out(machine: Machine) -> None:
    from vmm.devices.ways_out import BochsShutdown, ResetControl, SleepControl, SystemControlA

    off, reset = machine.stop_callback(_POWEROFF), machine.stop_callback(_RESET)
    for port in layout.SLEEP_CONTROLS:
        machine.attach(SleepControl(off, S5_TYPES), port=port, size=2)
    machine.attach(BochsShutdown(off), port=layout.BOCHS_SHUTDOWN, size=1)
    machine.attach(SystemControlA(reset), port=layout.SYSTEM_CONTROL_A, size=1)
    if machine.config.virtio != "pci":  # else it is PCI's ports that have it: native/devices/pci.c
        machine.attach(ResetControl(reset), port=layout.PCI_PORTS, size=4)


def _uart_console(machine: Machine) -> Console:
    """A console has one device: where that is virtio's, the UART talks to one that nobody reads."""
    if machine.config.console_device == "uart":
        return machine.console
    from vmm.console import Console

    unread = Console()
    machine.on_close(unread.destroy)
    return unread


def _add_configured(machine: Machine) -> None:
    """The virtio devices the configuration asks for, disks first: their order is their names' in the guest."""
    config, vm = machine.config, machine.native
    for index, disk in enumerate(config.disks):
        from vmm.devices.virtio.blk import Blk

        machine.add(Blk(vm, index, **disk.as_dict()))
    for index, net in enumerate(config.nets):
        from vmm.devices.virtio.net import Net
        from vmm.net import end_of

        limits = {"pps": net.pps, "bps": net.bps}
        machine.add(Net(vm, index, end_of(net), mac=net.mac, mtu=net.mtu, queues=net.queues, **limits))
    for index, share in enumerate(config.shares):
        from vmm.devices.virtio.fs import Fs

        machine.add(Fs(vm, index, share.directory, share.tag, readonly=share.readonly))
    if config.vsock is not None:
        from vmm.devices.virtio.vsock import Vsock

        machine.add(Vsock(vm, **config.vsock.as_dict()))
    if config.balloon:
        from vmm.devices.virtio.balloon import Balloon

        machine.add(Balloon(vm))
    if config.console_device == "virtio":
        from vmm.devices.virtio.console import VirtioConsole

        machine.add(VirtioConsole(vm, 0, machine.console))
    if config.rng:
        from vmm.devices.virtio.rng import Rng

        machine.add(Rng(vm))


def add_virtio(machine: Machine, device: VirtioDevice) -> None:
    """Put a virtio device where the guest finds it."""
    if machine.pci is not None:
        _add_pci(machine, machine.pci, device)
    else:
        _add_mmio(machine, device)


def _create_pci_host(machine: Machine) -> None:
    from vmm.devices.pci import PciHost

    host = PciHost(
        machine.native,
        window=(layout.PCI_MMIO_START, layout.PCI_MMIO_SIZE),
        ecam=layout.ECAM_START,
        ports=layout.PCI_PORTS,
        gsis=layout.PCI_GSIS,
        isa_irq=layout.PCI_ISA_IRQ,
    )
    machine.on_close(host.destroy)
    machine.attach(host, address=layout.ECAM_START, size=layout.ECAM_SIZE)
    machine.attach(host.ports, port=layout.PCI_PORTS, size=8)
    machine.pci = host


def _add_pci(machine: Machine, host: PciHost, device: VirtioDevice) -> None:
    from vmm.devices.virtio.pci import VirtioPci

    transport = VirtioPci(device, host)
    machine.on_close(transport.destroy)
    machine.devices.append(transport)
    machine.bus.adopt(transport.bar.tag, transport.bar)
    device.set_tag(transport.bar.tag)


def _add_mmio(machine: Machine, device: VirtioDevice) -> None:
    from vmm.devices.virtio.mmio import SIZE, VirtioMmio

    slot = len(machine.virtio) - 1
    if slot >= len(layout.VIRTIO_MMIO_GSIS):
        raise ConfigError(f"{device.name} is one too many: virtio-mmio has {slot} lines; use the transport pci")
    address = layout.VIRTIO_MMIO_START + slot * layout.VIRTIO_MMIO_STRIDE
    transport = VirtioMmio(device, address, machine.line(layout.VIRTIO_MMIO_GSIS[slot]))
    machine.on_close(transport.destroy)
    device.set_tag(machine.attach(transport, address=address, size=SIZE).tag)


def _attach_pit(machine: Machine) -> None:
    from vmm.devices.pit import Pit

    pit = Pit(min_period=TICK_SECONDS)
    machine.attach(pit, port=layout.PIT, size=4, gsi=layout.GSI_PIT)
    machine.attach(pit, port=layout.SPEAKER, size=1, first=layout.SPEAKER - layout.PIT)
    machine.on_start(pit.start)
    machine.on_stop(pit.stop)
    machine.on_still(pit.hold, pit.release)


def describe(machine: Machine) -> Tables:
    """What the guest is told of the machine: fixed hardware, and what each device adds of itself."""
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
    for device in machine.devices:
        device.describe(tables)
    return tables


def load_image(machine: Machine) -> Entry:
    """Put ACPI tables and the configured image into guest memory."""
    from vmm import boot
    from vmm.boot import acpi
    from vmm.boot.loader import command_line_room

    config = machine.config
    if config.kernel is None:
        raise ConfigError("there is nothing to boot: give a kernel image (kernel=..., --kernel FILE)")
    initrds = [boot.Image.open(path) for path in config.initrd]
    tables = describe(machine)
    machine.command_line = command_line(machine, tables, command_line_room(machine.image, machine.kind))
    rsdp = 0
    if config.memory >= layout.ACPI_START + layout.ACPI_SIZE:
        rsdp, blobs = acpi.build(
            tables, cpus=config.cpus, address=layout.ACPI_START, size=layout.ACPI_SIZE,
            local_apic=layout.LAPIC, io_apic=layout.IOAPIC,
        )  # fmt: skip
        for gpa, data in blobs:
            machine.memory.write(gpa, data)
        machine.generation_id.place()
    return boot.load(
        machine.memory,
        image=machine.image,
        kind=config.kind,
        cmdline=machine.command_line,
        initrds=initrds,
        acpi_rsdp=rsdp,
        load_address=config.address,
        flat_mode=config.mode,
        unpack=config.unpack,
        e820=[(address, size, _E820_RESERVED) for address, size in tables.reserved],
    )


def command_line(machine: Machine, tables: Tables, room: int) -> str:
    """The user's words; for Linux also a console, an end after a panic, and what this host needs.

    What the user says about the same option wins: nothing is added then. ``room``: the bytes an image takes.
    """
    given = machine.config.append
    if machine.kind not in LINUX_KINDS:
        return given
    from vmm.boot.cmdline import CommandLine

    said = CommandLine(given)
    tty = "ttyS0" if machine.config.console_device == "uart" else "hvc0"
    added = [] if said.values("console") else [f"console={tty}"]
    # A panic is over at once: the machine ends with it instead of looping for ever.
    added += [] if said.values("panic") else ["panic=-1"]
    if machine.merge_ticks:
        from vmm.cpu.compat import linux_cmdline

        added += [word for word in linux_cmdline() if word.partition("=")[0] not in said]
    if machine.host.tsc_fixed:
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
