"""The console device (virtio 1.2, 5.3): Linux's ``hvc0``. Its model is ``native/virtio/console.c``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from vmm._ffi import vmm_vm
    from vmm.console import Console


class VirtioConsole(VirtioDevice):
    """One port between the guest and ``console``, which is this device's alone: a console has one device.

    ``size`` is the terminal's, in columns and rows; ``None``: not known, and the guest is not told of any. While the
    console's pump is too far behind, the guest waits: nothing is lost.
    """

    device_id = 3
    remembers = ("sent",)  # bytes of the oldest transmit buffer that the console has already

    def __init__(self, vm: vmm_vm, index: int, console: Console, *, size: tuple[int, int] | None = None) -> None:
        self.name = f"virtio-console{index}"
        out = ffi.new("vmm_vconsole **")
        check(lib.vmm_vconsole_create(vm, self.name.encode(), console.native, *(size or (0, 0)), out))
        self._device: Any = out[0]
        self.virtio = lib.vmm_vconsole_virtio(self._device)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest that its terminal has another size. Raises ``HostError`` if it was made without one."""
        check(lib.vmm_vconsole_resize(self._device, columns, rows))

    def destroy(self) -> None:
        """Free the native half, before the console."""
        if self._device is not None:
            lib.vmm_vconsole_destroy(self._device)
            self._device = self.virtio = None
