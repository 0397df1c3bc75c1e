"""Transports for a test's driver: the protocol, and virtio-mmio. :mod:`vmm.testing.pci` has PCI."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmm.testing.rings import Ring

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
"""Device status: virtio 1.2, 2.1."""

F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1, F_RING_PACKED, F_RING_RESET = (1 << bit for bit in (28, 29, 32, 34, 40))
"""Feature bits of every device: virtio 1.2, 6."""


class Transport(Protocol):
    """The operations that virtio-mmio and virtio-pci have in common."""

    def device_id(self) -> int:
        """Return the device id (virtio 1.2, 5)."""

    def status(self) -> int:
        """Return the device status."""

    def set_status(self, status: int) -> None:
        """Write the device status; 0 resets."""

    def features(self) -> int:
        """Return the features that the device offers, 64 bits."""

    def set_features(self, features: int) -> None:
        """Write the features that the driver accepts."""

    def queue_size(self, queue: int) -> int:
        """Return the largest size of a queue; 0 if it does not exist."""

    def set_queue(self, queue: int, ring: Ring) -> None:
        """Write the addresses of a queue, and enable it."""

    def reset_queue(self, queue: int) -> None:
        """Reset one queue (F_RING_RESET), and wait until that is complete."""

    def notify(self, queue: int) -> None:
        """Notify the device of a queue."""

    def interrupts(self) -> int:
        """Read and acknowledge interrupts: 1 is used buffers, 2 a change of the configuration."""

    def config(self, offset: int, size: int) -> bytes:
        """Read bytes of the device's configuration space."""

    def set_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the device's configuration space."""


class Bus(Protocol):
    """The part of :class:`vmm.bus.Bus` that registers are reached through."""

    def read(self, space: int, address: int, size: int, /) -> int:
        """Read as a vCPU does."""

    def write(self, space: int, address: int, size: int, value: int, /) -> None:
        """Write as a vCPU does."""


class MmioTransport:
    """virtio-mmio registers, version 2 (virtio 1.2, 4.2.2), at ``address`` on a bus.

    Raises ``ValueError`` when there are none.
    """

    def __init__(self, bus: Bus, address: int) -> None:
        self.bus = bus
        self.address = address
        if (self.read(0x000), self.read(0x004)) != (0x74726976, 2):
            raise ValueError(f"no virtio-mmio registers of version 2 at {address:#x}")

    def read(self, offset: int) -> int:
        """Read one register of 32 bits."""
        return self.bus.read(1, self.address + offset, 4)

    def write(self, offset: int, value: int) -> None:
        """Write one register."""
        self.bus.write(1, self.address + offset, 4, value)

    def device_id(self) -> int:
        """DeviceID."""
        return self.read(0x008)

    def status(self) -> int:
        """Status."""
        return self.read(0x070)

    def set_status(self, status: int) -> None:
        """Status."""
        self.write(0x070, status)

    def features(self) -> int:
        """Read both words of DeviceFeatures."""
        words = []
        for select in (0, 1):
            self.write(0x014, select)
            words.append(self.read(0x010))
        return words[0] | words[1] << 32

    def set_features(self, features: int) -> None:
        """Write both words of DriverFeatures."""
        for select in (0, 1):
            self.write(0x024, select)
            self.write(0x020, features >> 32 * select & 0xFFFFFFFF)

    def queue_size(self, queue: int) -> int:
        """QueueNumMax."""
        self.write(0x030, queue)
        return self.read(0x034)

    def set_queue(self, queue: int, ring: Ring) -> None:
        """Write QueueNum, the three addresses, QueueReady."""
        self.write(0x030, queue)
        self.write(0x038, ring.size)
        for offset, gpa in ((0x080, ring.table), (0x090, ring.driver_area), (0x0A0, ring.device_area)):
            self.write(offset, gpa & 0xFFFFFFFF)
            self.write(offset + 4, gpa >> 32)
        self.write(0x044, 1)

    def reset_queue(self, queue: int) -> None:
        """Write QueueReset (4.2.2.2)."""
        self.write(0x030, queue)
        self.write(0x0C0, 1)
        while self.read(0x0C0):
            time.sleep(0.0001)

    def notify(self, queue: int) -> None:
        """QueueNotify."""
        self.write(0x050, queue)

    def interrupts(self) -> int:
        """Read InterruptStatus, then write InterruptACK."""
        pending = self.read(0x060)
        if pending:
            self.write(0x064, pending)
        return pending

    def config(self, offset: int, size: int) -> bytes:
        """Read bytes of the configuration space, one by one."""
        return bytes(self.bus.read(1, self.address + 0x100 + offset + n, 1) for n in range(size))

    def set_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the configuration space, one by one."""
        for n, byte in enumerate(data):
            self.bus.write(1, self.address + 0x100 + offset + n, 1, byte)
