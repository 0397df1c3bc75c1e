"""The wiring of a machine: which devices there are, on which ports, addresses and interrupt lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm import layout
from vmm._ffi import lib
from vmm.bus import MMIO, PIO
from vmm.errors import ConfigError
from vmm.irq import GsiLine

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from vmm._ffi import vmm_vm
    from vmm.boot.acpi import Tables
    from vmm.bus import Attachment, Bus
    from vmm.devices.device import Device
    from vmm.devices.generation_id import GenerationId
    from vmm.devices.pci import PciHost
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.machine.vm import Vm


class Board:
    """The devices of a machine, in the order in which they were attached.

    ``closing`` runs once the native machine is gone: native devices and transports are destroyed then. ``failed``
    takes an exception that a device's Python code raised on a vCPU's thread.
    """

    generation_id: GenerationId

    def __init__(self, vm: Vm, bus: Bus, closing: ExitStack, failed: Callable[[BaseException], None]) -> None:
        self.devices: list[Device] = []
        self.virtio: list[VirtioDevice] = []
        self.pci: PciHost | None = None
        self._vm = vm
        self._bus = bus
        self._closing = closing
        self._failed = failed

    @property
    def native(self) -> vmm_vm:
        """The native machine, for the constructors of devices whose model is C."""
        return self._vm.handle

    def line(self, gsi: int) -> GsiLine:
        """Return the wire of a global system interrupt into the interrupt controllers."""
        return GsiLine(self._vm.handle, gsi)

    def stop(self, reason: int) -> Callable[..., None]:
        """Return a function for a device that ends the machine: called with the code, on the vCPU's thread.

        ``reason`` is an ``enum vmm_stop_reason``.
        """
        vm, stop = self._vm.handle, lib.vmm_vm_stop
        return lambda code=0: stop(vm, reason, code)

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
        attachment = self._bus.attach(device, space, base, size, first=first)
        if device not in self.devices:
            self.devices.append(device)
        return attachment

    def destroy_at_close(self, destroy: Callable[[], object]) -> None:
        """Have ``destroy()`` called once the native machine is gone."""
        self._closing.callback(destroy)

    # ---- virtio and PCI ----

    def add(self, device: VirtioDevice) -> None:
        """Give the guest a virtio device, on PCI where there is a host bridge, else on virtio-mmio."""
        device.connect(self._vm.handle, self._failed)
        self.virtio.append(device)
        try:
            if self.pci is not None:
                self._add_pci(self.pci, device)
            else:
                self._add_mmio(device)
        except BaseException:
            self.destroy_at_close(device.destroy)  # no transport owns it
            raise

    def create_pci_host(self) -> None:
        """Add a PCI host bridge with its configuration space; virtio devices are added behind it from now on."""
        from vmm.devices.pci import PciHost

        host = PciHost(
            self._vm.handle,
            window=(layout.PCI_MMIO_START, layout.PCI_MMIO_SIZE),
            ecam=layout.ECAM_START,
            ports=layout.PCI_PORTS,
            gsis=layout.PCI_GSIS,
            isa_irq=layout.PCI_ISA_IRQ,
        )
        self.destroy_at_close(host.destroy)
        self.attach(host, address=layout.ECAM_START, size=layout.ECAM_SIZE)
        self.attach(host.ports, port=layout.PCI_PORTS, size=8)
        self.pci = host

    def _add_pci(self, host: PciHost, device: VirtioDevice) -> None:
        from vmm.devices.virtio.pci import VirtioPci

        transport = VirtioPci(device, host)
        self.destroy_at_close(transport.destroy)
        self.devices.append(transport)
        self._bus.adopt(transport.bar.tag, transport.bar)
        device.set_tag(transport.bar.tag)

    def _add_mmio(self, device: VirtioDevice) -> None:
        from vmm.devices.virtio.mmio import SIZE, VirtioMmio

        slot = len(self.virtio) - 1
        if slot >= len(layout.VIRTIO_MMIO_GSIS):
            raise ConfigError(f"{device.name} is one too many: virtio-mmio has {slot} lines; use the transport pci")
        address = layout.VIRTIO_MMIO_START + slot * layout.VIRTIO_MMIO_STRIDE
        transport = VirtioMmio(device, address, self.line(layout.VIRTIO_MMIO_GSIS[slot]))
        self.destroy_at_close(transport.destroy)
        device.set_tag(self.attach(transport, address=address, size=SIZE).tag)

    # ---- all of them ----

    def describe(self, tables: Tables) -> None:
        """Add what each device says of itself to the ACPI tables."""
        for device in self.devices:
            device.describe(tables)

    def announce(self) -> None:
        """Tell networks that this machine has moved here. After the vCPUs' state is loaded: it has the interrupts."""
        for device in self.virtio:
            device.announce()

    def reset(self) -> None:
        """Reset every device: nothing is in flight then, and host resources are released."""
        for device in self.devices:
            device.reset()
