"""The virtio-mmio transport, version 2, on the bus (virtio 1.2, 4.2). Its model is ``native/virtio/mmio.c``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.saved_state import accept, checked
from vmm.devices.virtio.transport import VirtioTransport

if TYPE_CHECKING:
    from vmm.boot.acpi import Tables
    from vmm.devices.device import State, Undo
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.irq import GsiLine

SIZE = 0x1000


_STATE = {"device_select": 0xFFFFFFFF, "driver_select": 0xFFFFFFFF, "queue_select": 0xFFFFFFFF, "isr": 3}


class VirtioMmio(VirtioTransport):
    """A virtio device behind 4 KiB of registers at guest-physical ``address``, with the line ``line``."""

    registers = {
        0x000: "MagicValue", 0x004: "Version", 0x008: "DeviceID", 0x00C: "VendorID", 0x010: "DeviceFeatures",
        0x014: "DeviceFeaturesSel", 0x020: "DriverFeatures", 0x024: "DriverFeaturesSel", 0x030: "QueueSel",
        0x034: "QueueNumMax", 0x038: "QueueNum", 0x044: "QueueReady", 0x050: "QueueNotify",
        0x060: "InterruptStatus", 0x064: "InterruptACK", 0x070: "Status", 0x080: "QueueDescLow",
        0x084: "QueueDescHigh", 0x090: "QueueDriverLow", 0x094: "QueueDriverHigh", 0x0A0: "QueueDeviceLow",
        0x0A4: "QueueDeviceHigh", 0x0B0: "SHMLenLow", 0x0B4: "SHMLenHigh", 0x0B8: "SHMBaseLow",
        0x0BC: "SHMBaseHigh", 0x0C0: "QueueReset", 0x0FC: "ConfigGeneration",
        **{0x100 + offset: f"Config+{offset:#x}" for offset in range(0x40)},
    }  # fmt: skip

    def __init__(self, device: VirtioDevice, address: int, line: GsiLine) -> None:
        self.device = device
        self.name = device.name
        self.address = address
        self.line: GsiLine = line
        out = ffi.new("vmm_virtio_mmio **")
        check(lib.vmm_virtio_mmio_create(device.virtio, address, line.native, out))
        self._transport: Any = out[0]
        self.native = (lib.vmm_virtio_mmio_ops(), self._transport)

    def read(self, offset: int, size: int) -> int:
        """One read, as the bus makes it."""
        return int(self.native[0].read(self._transport, offset, size))

    def write(self, offset: int, size: int, value: int) -> None:
        """One write, as the bus makes it."""
        self.native[0].write(self._transport, offset, size, value)

    def reset(self) -> None:
        """Device and transport to power-on."""
        self.device.reset()

    def save_transport(self) -> State:
        """The selectors, and the interrupt status, which the line follows."""
        s = self.capture_transport()
        return {"version": 1, **{field: int(getattr(s, field)) for field in _STATE}}

    def load_transport(self, state: State) -> None:
        """Become what :meth:`save_transport` recorded."""
        saved = checked(self.name, state, _STATE)
        native = ffi.new("vmm_virtio_mmio_state *", {field: saved[field] for field in _STATE})
        accept(lib.vmm_virtio_mmio_load(self._transport, native))

    def capture_transport(self) -> Any:
        """The native record."""
        s = ffi.new("vmm_virtio_mmio_state *")
        lib.vmm_virtio_mmio_save(self._transport, s)
        return s

    def roll_back_transport(self, captured: Any) -> None:
        """Become what it says."""
        check(lib.vmm_virtio_mmio_load(self._transport, captured))

    def checkpoint(self) -> Undo | None:
        """The device's way back."""
        return self.device.checkpoint()

    def describe(self, tables: Tables) -> None:
        """An ACPI device with the id Linux looks for; the same for a kernel without ACPI."""
        tables.add_virtio_mmio(self.address, SIZE, self.line.gsi)

    def destroy(self) -> None:
        """Free the transport, then the device."""
        if self._transport is not None:
            lib.vmm_virtio_mmio_destroy(self._transport)
            self._transport = None
            self.device.destroy()
