"""The entropy device (virtio 1.2, 5.4): the native one every machine has, and its readable twin in Python."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.model import VirtioModel

if TYPE_CHECKING:
    from vmm.devices.virtio.model import Request

DEVICE_ID = 4
REQUEST_MAX = 65536  # bytes a request gets at most (5.4.6.1 allows less than asked): a turn stays short


class Rng(VirtioDevice):
    """Random numbers from the host; the model is ``native/virtio/rng.c``."""

    device_id = DEVICE_ID

    def __init__(self, vm: Any, index: int = 0) -> None:
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


class PythonRng(VirtioModel):
    """The same device in Python: every request is filled with random bytes."""

    name = "virtio-rng-python"
    device_id = DEVICE_ID
    queue_sizes = (64,)

    def handle(self, request: Request) -> None:
        """Fill the request."""
        request.write(os.urandom(min(request.writable, REQUEST_MAX)))
