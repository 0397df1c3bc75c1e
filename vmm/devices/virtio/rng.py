"""The entropy device (virtio 1.2, 5.4) that every machine has; ``rng_model.py`` is its readable twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from vmm._ffi import vmm_vm


class Rng(VirtioDevice):
    """Random numbers from the host; the model is ``native/virtio/rng.c``."""

    device_id = 4

    def __init__(self, vm: vmm_vm, index: int = 0) -> None:
        self.name = f"virtio-rng{index}"
        out = ffi.new("vmm_rng **")
        check(lib.vmm_rng_create(vm, self.name.encode(), out))
        self._rng: Any = out[0]
        self.virtio = lib.vmm_rng_virtio(self._rng)

    def destroy(self) -> None:
        """Free the native half."""
        if self._rng is not None:
            lib.vmm_rng_destroy(self._rng)
            self._rng = self.virtio = None
