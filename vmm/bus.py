"""Attach a device to a range of ports or guest-physical addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import PYTHON_OPS, Upcall, check, ffi, lib
from vmm.errors import BusError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._ffi import vmm_vm
    from vmm.devices.device import Device

PIO: int = lib.VMM_PIO
MMIO: int = lib.VMM_MMIO


class Attachment:
    """A device attached to a range of one address space."""

    __slots__ = ("base", "device", "first", "keep", "size", "space", "tag")

    def __init__(self, device: Device, space: int, base: int, size: int, first: int, keep: Any, tag: int) -> None:
        self.device = device
        self.space = space
        self.base = base
        self.size = size
        self.first = first
        self.keep = keep
        self.tag = tag

    @property
    def name(self) -> str:
        """Name of the device, the first part of ``device[.register]``."""
        return self.device.name

    def holds(self, space: int, address: int) -> bool:
        """Return whether ``address`` is inside the range."""
        return space == self.space and 0 <= address - self.base < self.size

    def register(self, address: int) -> str:
        """The device's name for the register at bus ``address``, or ``+0x..``."""
        offset = address - self.base + self.first
        return self.device.registers.get(offset, f"+{offset:#x}")


class Bus:
    """Both address spaces of a machine. The table lives in C; this keeps what the table points to alive."""

    def __init__(self, vm: vmm_vm, failed: Callable[[BaseException], None]) -> None:
        self._vm = vm
        self._failed = failed
        self.attachments: dict[int, Attachment] = {}
        self._next_tag = 1

    def attach(self, device: Device, space: int, base: int, size: int, *, first: int = 0) -> Attachment:
        """Claim ``[base, base+size)`` of ``space`` for ``device``, whose offset ``first`` is at ``base``.

        Raises :class:`~vmm.errors.BusError` when the range overlaps another, or RAM, or leaves the space.
        """
        native = getattr(device, "native", None)
        if native is not None and first == 0:
            ops, opaque = native
            keep = native
        else:
            upcall = self._upcall(device, first)
            ops, opaque, keep = PYTHON_OPS, upcall.opaque, upcall
        tag = self._next_tag
        code = lib.vmm_bus_attach(self._vm, space, base, size, ops, opaque, tag)
        if code < 0:
            text = ffi.string(lib.vmm_error_text()).decode()
            raise BusError(f"cannot attach {device.name}: {text}; choose a free range")
        self._next_tag += 1
        attachment = self.attachments[tag] = Attachment(device, space, base, size, first, keep, tag)
        return attachment

    def _upcall(self, device: Device, first: int) -> Upcall:
        if not first:
            return Upcall(device.read, device.write, self._failed)
        read, write = device.read, device.write
        return Upcall(
            lambda offset, size: read(offset + first, size),
            lambda offset, size, value: write(offset + first, size, value),
            self._failed,
        )

    def adopt(self, tag: int, attachment: Attachment) -> None:
        """Record a range that native code attached under ``tag``, so that :meth:`find` returns it."""
        self.attachments[tag] = attachment

    def detach(self, attachment: Attachment) -> None:
        """Remove the device from its range."""
        check(lib.vmm_bus_detach(self._vm, attachment.space, attachment.base))
        for tag, known in list(self.attachments.items()):
            if known is attachment:
                del self.attachments[tag]

    def find(self, space: int, address: int) -> Attachment | None:
        """Return the attachment that claims ``address``, or ``None``."""
        for attachment in self.attachments.values():
            if attachment.holds(space, address):
                return attachment
        return None

    def read(self, space: int, address: int, size: int) -> int:
        """Read ``size`` bytes as a vCPU would; unclaimed bytes read as 0xff."""
        return int(lib.vmm_bus_read(self._vm, space, address, size))

    def write(self, space: int, address: int, size: int, value: int) -> None:
        """Write ``size`` bytes as a vCPU would."""
        lib.vmm_bus_write(self._vm, space, address, size, value)

    @property
    def unclaimed(self) -> int:
        """Number of accesses by vCPUs so far that no device claimed."""
        return int(lib.vmm_bus_unclaimed(self._vm))
