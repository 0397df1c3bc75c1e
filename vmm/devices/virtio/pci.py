"""The virtio-pci transport, modern only (virtio 1.2, 4.1). Its model is ``native/virtio/pci.c``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.pci import BarAttachment
from vmm.devices.saved_state import accept, checked
from vmm.devices.virtio.transport import VirtioTransport

if TYPE_CHECKING:
    from vmm.devices.device import State, Undo
    from vmm.devices.pci import PciHost
    from vmm.devices.virtio.device import VirtioDevice

_QUEUES = 64

# BAR 0: common configuration (4.1.4.3) and the structures after it, a page each.
_REGISTERS = {
    0x00: "device_feature_select", 0x04: "device_feature", 0x08: "driver_feature_select", 0x0C: "driver_feature",
    0x10: "config_msix_vector", 0x12: "num_queues", 0x14: "device_status", 0x15: "config_generation",
    0x16: "queue_select", 0x18: "queue_size", 0x1A: "queue_msix_vector", 0x1C: "queue_enable",
    0x1E: "queue_notify_off", 0x20: "queue_desc", 0x24: "queue_desc+4", 0x28: "queue_driver",
    0x2C: "queue_driver+4", 0x30: "queue_device", 0x34: "queue_device+4", 0x38: "queue_notify_data",
    0x3A: "queue_reset",
    0x1000: "ISR status",
    **{0x2000 + offset: f"config+{offset:#x}" for offset in range(0x40)},
    **{0x3000 + 4 * queue: f"notify {queue}" for queue in range(_QUEUES)},
    **{
        0x4000 + 16 * vector + 4 * word: f"MSI-X {vector} {name}"
        for vector in range(_QUEUES + 1)
        for word, name in enumerate(("address", "address+4", "data", "control"))
    },
    **{0x5000 + 8 * word: f"MSI-X pending+{8 * word}" for word in range(2)},
}  # fmt: skip


_STATE = {
    "device_feature_select": 0xFFFFFFFF, "driver_feature_select": 0xFFFFFFFF, "queue_select": 0xFFFF, "isr": 3,
    "config_vector": 0xFFFF,
}  # fmt: skip


class VirtioPci(VirtioTransport):
    """A virtio device in a slot of a PCI host (-1: the first that is free).

    The host puts it on the machine's bus where the guest says; ``bar`` is for :meth:`vmm.bus.Bus.adopt`.
    Raises :class:`~vmm.errors.StateError` when the slot is taken, :class:`~vmm.errors.BusError` when none is free.
    """

    registers = _REGISTERS

    def __init__(self, device: VirtioDevice, host: PciHost, slot: int = -1) -> None:
        self.device = device
        self.name = device.name
        out = ffi.new("vmm_virtio_pci **")
        self.slot = check(lib.vmm_virtio_pci_create(device.virtio, host.host, slot, out))
        self._transport: Any = out[0]
        self._ops = lib.vmm_virtio_pci_ops()
        host.name_function(self.slot, device.name)
        self.bar = BarAttachment(host, self.slot, 0, self)

    def read(self, offset: int, size: int) -> int:
        """One read of BAR 0, as the bus makes it."""
        return int(self._ops.read(self._transport, offset, size))

    def write(self, offset: int, size: int, value: int) -> None:
        """One write of BAR 0, as the bus makes it."""
        self._ops.write(self._transport, offset, size, value)

    def reset(self) -> None:
        """The device to power-on, and the transport's registers with it; configuration space is the host's."""
        self.device.reset()

    def save_transport(self) -> State:
        """Selectors and vectors (little-endian, 16 bits a queue), interrupt status, MSI-X table (as it is in the BAR)
        and pending bits. Configuration space is the host's."""
        s = self.capture_transport()
        table = s.msix[0 : s.n_vectors]
        return {
            "version": 1,
            **{field: int(getattr(s, field)) for field in _STATE},
            "queue_vectors": bytes(ffi.buffer(s.queue_vectors)),
            "table": b"".join(bytes(ffi.buffer(entry.words)) for entry in table),
            "pending": [n for n, entry in enumerate(table) if entry.pending],
        }

    def load_transport(self, state: State) -> None:
        """Become what :meth:`save_transport` recorded."""
        saved = checked(
            self.name, state, _STATE, {"queue_vectors": 2 * _QUEUES, "table": 16 * (_QUEUES + 1)}, ("pending",)
        )
        vectors, table, pending = saved["queue_vectors"], saved["table"], saved["pending"]
        if len(vectors) != 2 * _QUEUES or len(table) % 16 or not _indices(pending, len(table) // 16):
            raise ValueError(
                f"{self.name}: interrupt vectors of {len(vectors)} and {len(table)} bytes, pending {pending}"
            )
        s = ffi.new("vmm_virtio_pci_state *", {field: saved[field] for field in _STATE})
        s.n_vectors = len(table) // 16
        ffi.buffer(s.queue_vectors)[:] = vectors
        for n in range(s.n_vectors):
            ffi.buffer(s.msix[n].words)[:] = table[16 * n : 16 * n + 16]
            s.msix[n].pending = n in pending
        accept(lib.vmm_virtio_pci_load(self._transport, s))

    def capture_transport(self) -> Any:
        """The native record."""
        s = ffi.new("vmm_virtio_pci_state *")
        lib.vmm_virtio_pci_save(self._transport, s)
        return s

    def roll_back_transport(self, captured: Any) -> None:
        """Become what it says."""
        check(lib.vmm_virtio_pci_load(self._transport, captured))

    def checkpoint(self) -> Undo | None:
        """The device's way back."""
        return self.device.checkpoint()

    def destroy(self) -> None:
        """Free the transport, then the device; before the host."""
        if self._transport is not None:
            lib.vmm_virtio_pci_destroy(self._transport)
            self._transport = None
            self.device.destroy()


def _indices(value: Any, below: int) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and 0 <= n < below for n in value)
