"""The devices that every machine has, on the addresses of :mod:`vmm.layout`, and those its configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm import layout
from vmm._ffi import lib
from vmm.machine.firmware import RESET_VALUE, S5

if TYPE_CHECKING:
    from vmm.config import MachineConfig
    from vmm.console import Console
    from vmm.machine.board import Board
    from vmm.machine.execution import Execution
    from vmm.machine.hold import Hold
    from vmm.memory import GuestMemory

# Soft-off's sleep type on QEMU (0) and VirtualBox (5, as here), which kernels for them write without asking.
S5_TYPES = (0, S5)
TICK_SECONDS = 0.02  # where a tick costs milliseconds of emulation: at most 50 a second


def attach_standard(board: Board, config: MachineConfig, memory: GuestMemory, console: Console) -> None:
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

    uart = NativeUart(board.line(layout.GSI_COM1), _uart_console(board, config, console))
    board.destroy_at_close(uart.destroy)
    board.attach(uart, port=layout.COM1, size=8)
    i8042 = I8042(board.stop(lib.VMM_STOP_RESET))
    board.attach(i8042, port=layout.I8042, size=1, gsi=layout.GSI_I8042)
    board.attach(i8042, port=layout.I8042 + 4, size=1, first=4)
    board.attach(Rtc(memory=min(config.memory, layout.LOW_RAM_END)), port=layout.RTC, size=2, gsi=layout.GSI_RTC)
    board.attach(Post(), port=layout.POST, size=1)
    board.attach(NoBios(board.stop(lib.VMM_STOP_NO_BIOS)), port=layout.NO_BIOS, size=3)
    board.attach(DebugExit(board.stop(lib.VMM_STOP_DEBUG_EXIT)), port=layout.DEBUG_EXIT, size=4)
    board.attach(Pvpanic(board.stop(lib.VMM_STOP_PANIC)), port=layout.PVPANIC, size=1)
    power = PowerManagement(board.stop(lib.VMM_STOP_POWEROFF), S5_TYPES)
    board.attach(power, port=layout.PM_BASE, size=6, gsi=layout.GSI_SCI)
    board.attach(PmTimer(), port=layout.PM_TIMER, size=4)
    board.attach(ResetRegister(board.stop(lib.VMM_STOP_RESET), RESET_VALUE), port=layout.RESET, size=1)
    _attach_ways_out(board, pci=config.virtio == "pci")
    board.generation_id = GenerationId(memory, layout.GENERATION_ID, layout.GSI_EVENTS)
    board.generation_id.line = board.line(layout.GSI_EVENTS)
    board.devices.append(board.generation_id)  # memory alone: on no bus


def _attach_ways_out(board: Board, *, pci: bool) -> None:
    from vmm.devices.ways_out import BochsShutdown, ResetControl, SleepControl, SystemControlA

    off, reset = board.stop(lib.VMM_STOP_POWEROFF), board.stop(lib.VMM_STOP_RESET)
    for port in layout.SLEEP_CONTROLS:
        board.attach(SleepControl(off, S5_TYPES), port=port, size=2)
    board.attach(BochsShutdown(off), port=layout.BOCHS_SHUTDOWN, size=1)
    board.attach(SystemControlA(reset), port=layout.SYSTEM_CONTROL_A, size=1)
    if not pci:  # else the port is one of PCI's: native/devices/pci.c
        board.attach(ResetControl(reset), port=layout.PCI_PORTS, size=4)


def _uart_console(board: Board, config: MachineConfig, console: Console) -> Console:
    """Return the console behind the UART: where the machine's is a virtio device's, one that is never read."""
    if config.console_device == "uart":
        return console
    from vmm.console import Console

    unread = Console()
    board.destroy_at_close(unread.destroy)
    return unread


def attach_pit(board: Board, execution: Execution, hold: Hold) -> None:
    """Attach a timer that merges its ticks, in place of KVM's."""
    from vmm.devices.pit import Pit

    pit = Pit(min_period=TICK_SECONDS)
    board.attach(pit, port=layout.PIT, size=4, gsi=layout.GSI_PIT)
    board.attach(pit, port=layout.SPEAKER, size=1, first=layout.SPEAKER - layout.PIT)
    execution.on_start(pit.start)
    execution.on_stop(pit.stop)
    hold.add(pit.hold, pit.release)


def add_configured(board: Board, config: MachineConfig, console: Console) -> None:
    """Add the virtio devices that the configuration asks for, disks first: the guest names them in this order."""
    vm = board.native
    for index, disk in enumerate(config.disks):
        from vmm.devices.virtio.blk import Blk

        board.add(Blk(vm, index, **disk.as_dict()))
    for index, net in enumerate(config.nets):
        from vmm.devices.virtio.net import Net
        from vmm.net import end_of

        limits = {"pps": net.pps, "bps": net.bps}
        board.add(Net(vm, index, end_of(net), mac=net.mac, mtu=net.mtu, queues=net.queues, **limits))
    for index, share in enumerate(config.shares):
        from vmm.devices.virtio.fs import Fs

        board.add(Fs(vm, index, share.directory, share.tag, readonly=share.readonly))
    if config.vsock is not None:
        from vmm.devices.virtio.vsock import Vsock

        board.add(Vsock(vm, **config.vsock.as_dict()))
    if config.balloon:
        from vmm.devices.virtio.balloon import Balloon

        board.add(Balloon(vm))
    if config.console_device == "virtio":
        from vmm.devices.virtio.console import VirtioConsole

        board.add(VirtioConsole(vm, 0, console))
    if config.rng:
        from vmm.devices.virtio.rng import Rng

        board.add(Rng(vm))
