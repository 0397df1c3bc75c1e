"""The entropy device (virtio 1.2, 5.4) in Python: the readable twin of ``native/virtio/rng.c``.

The reference for :class:`~vmm.devices.virtio.model.VirtioModel`: properties and a request handler.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.devices.virtio.model import VirtioModel

if TYPE_CHECKING:
    from vmm.devices.virtio.model import Request

REQUEST_MAX = 65536  # bytes a request gets at most (5.4.6.1 allows less than asked): a turn stays short


class RngModel(VirtioModel):
    """Every request is filled with random bytes of the host."""

    name = "virtio-rng-model"
    device_id = 4
    queue_sizes = (64,)

    def handle(self, request: Request) -> None:
        """Fill the request."""
        request.write(os.urandom(min(request.writable, REQUEST_MAX)))
