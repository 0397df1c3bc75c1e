"""Driver's side of PCI for tests without a guest: configuration space, capabilities, BARs, MSI-X."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.testing.rings import Ring
    from vmm.testing.transport import Bus

_MMIO = 1
COMMAND, CAPABILITIES, BAR0 = 0x04, 0x34, 0x10
MEMORY, MASTER, INTX_DISABLE = 2, 4, 0x400
MSIX, VENDOR = 0x11, 0x09
_COMMON, _NOTIFY, _ISR, _DEVICE = 1, 2, 3, 4


class PciFunction:
    """Function 0 in a slot of bus 0, reached through the ECAM at ``ecam``."""

    def __init__(self, bus: Bus, ecam: int, slot: int) -> None:
        self.bus = bus
        self._at = ecam + (slot << 15)

    def read(self, offset: int, size: int) -> int:
        """Read ``size`` bytes of configuration space."""
        return self.bus.read(_MMIO, self._at + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes of configuration space."""
        self.bus.write(_MMIO, self._at + offset, size, value)

    def enable(self) -> None:
        """Enable memory decoding and bus mastering."""
        self.write(COMMAND, 2, self.read(COMMAND, 2) | MEMORY | MASTER)

    def bar(self, number: int) -> int:
        """Return the address in a 64-bit memory BAR."""
        return self.read(BAR0 + 4 * number, 8) & ~0xF

    def move(self, number: int, address: int) -> None:
        """Set the address of a BAR."""
        self.write(BAR0 + 4 * number, 8, address)

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """Yield (id, offset) in the order of the list. Raises ``ValueError`` if it loops."""
        at = self.read(CAPABILITIES, 1)
        for _ in range(48):  # as many as fit
            if not at:
                return
            yield self.read(at, 1), at
            at = self.read(at + 1, 1)
        raise ValueError("the PCI capability list loops")


class PciTransport:
    """virtio-pci registers (virtio 1.2, 4.1.4) of the function in a slot, found through its capabilities.

    Raises ``ValueError`` when it is no modern virtio device.
    """

    def __init__(self, bus: Bus, ecam: int, slot: int) -> None:
        self.bus = bus
        self.function = PciFunction(bus, ecam, slot)
        if self.function.read(0, 2) != 0x1AF4 or self.function.read(2, 2) < 0x1040:
            raise ValueError(f"no modern virtio device in PCI slot {slot}")
        self._where: dict[int, tuple[int, int]] = {}
        for id, at in self.function.capabilities():
            kind = self.function.read(at + 3, 1)
            if id == VENDOR and kind not in self._where:
                self._where[kind] = (self.function.read(at + 4, 1), self.function.read(at + 8, 4))
                if kind == _NOTIFY:
                    self._multiplier = self.function.read(at + 16, 4)
        if not {_COMMON, _NOTIFY, _ISR} <= self._where.keys():
            raise ValueError(f"the virtio device in PCI slot {slot} lacks a structure of 4.1.4")
        self.function.enable()

    def address(self, kind: int, offset: int = 0) -> int:
        """Return the guest-physical address of byte ``offset`` of a structure."""
        bar, start = self._where[kind]
        return self.function.bar(bar) + start + offset

    def read(self, offset: int, size: int) -> int:
        """Read a field of the common configuration."""
        return self.bus.read(_MMIO, self.address(_COMMON, offset), size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a field of the common configuration."""
        self.bus.write(_MMIO, self.address(_COMMON, offset), size, value)

    def device_id(self) -> int:
        """Return the PCI device id minus 0x1040."""
        return self.function.read(2, 2) - 0x1040

    def status(self) -> int:
        """device_status."""
        return self.read(20, 1)

    def set_status(self, status: int) -> None:
        """Write device_status; a reset is complete when it reads as 0 (4.1.4.3.2)."""
        self.write(20, 1, status)
        while status == 0 and self.read(20, 1):
            time.sleep(0.0001)

    def features(self) -> int:
        """Read both words of device_feature."""
        words = []
        for select in (0, 1):
            self.write(0, 4, select)
            words.append(self.read(4, 4))
        return words[0] | words[1] << 32

    def set_features(self, features: int) -> None:
        """Write both words of driver_feature."""
        for select in (0, 1):
            self.write(8, 4, select)
            self.write(12, 4, features >> 32 * select & 0xFFFFFFFF)

    def queue_size(self, queue: int) -> int:
        """Read queue_size, which after a reset is the largest."""
        self.write(22, 2, queue)
        return self.read(24, 2)

    def set_queue(self, queue: int, ring: Ring) -> None:
        """Write queue_size, the three areas, queue_enable."""
        self.write(22, 2, queue)
        self.write(24, 2, ring.size)
        for offset, gpa in ((32, ring.table), (40, ring.driver_area), (48, ring.device_area)):
            self.write(offset, 4, gpa & 0xFFFFFFFF)
            self.write(offset + 4, 4, gpa >> 32)
        self.write(28, 2, 1)

    def reset_queue(self, queue: int) -> None:
        """Write queue_reset (4.1.4.3.2)."""
        self.write(22, 2, queue)
        self.write(58, 2, 1)
        while self.read(58, 2) or self.read(28, 2):
            time.sleep(0.0001)

    def notify(self, queue: int) -> None:
        """Write the doorbell at queue_notify_off."""
        self.write(22, 2, queue)
        self.bus.write(_MMIO, self.address(_NOTIFY, self.read(30, 2) * self._multiplier), 2, queue)

    def interrupts(self) -> int:
        """Read the ISR status, which clears it; it stays 0 while MSI-X is enabled."""
        return self.bus.read(_MMIO, self.address(_ISR), 1)

    def config(self, offset: int, size: int) -> bytes:
        """Read bytes of the device's configuration, one by one."""
        return bytes(self.bus.read(_MMIO, self.address(_DEVICE, offset + n), 1) for n in range(size))

    def set_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the device's configuration, one by one."""
        for n, byte in enumerate(data):
            self.bus.write(_MMIO, self.address(_DEVICE, offset + n), 1, byte)
