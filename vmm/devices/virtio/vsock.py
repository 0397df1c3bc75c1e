"""The socket device (virtio 1.2, 5.10): streams between guest ports and UNIX sockets. ``native/virtio/vsock.c``.

The convention is Firecracker's. A host program connects to ``path``, writes ``CONNECT <port>`` and a newline, reads
``OK <host port>``, and has a stream to the guest's port; a guest that connects to CID 2, port n, reaches the program
that listens on the UNIX socket ``<path>_<n>``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm._ffi import vmm_vm
    from vmm.private_socket import PrivateSocket

PATH_MAX = 95  # bytes: a UNIX socket's path has 107, and "_4294967295" goes behind this one
BACKLOG = 64


class Vsock(VirtioDevice):
    """Stream sockets for the guest with context id ``cid``; ``path`` is made here and removed by :meth:`destroy`.

    Raises :class:`~vmm.errors.ConfigError` where the socket cannot be (:mod:`vmm.private_socket`).
    """

    device_id = 19
    remembers = ("connected",)  # 1: a restored guest is told that its connections were reset

    def __init__(self, vm: vmm_vm, index: int = 0, *, cid: int = 3, path: str | os.PathLike[str]) -> None:
        self.name = f"virtio-vsock{index}"
        self.path = os.fspath(path)
        if not 3 <= cid < 0xFFFFFFFF:
            raise ConfigError(f"{cid} is not a guest's context id: give one from 3 to 4294967294")
        self._named = _listen(self.path)
        out = ffi.new("vmm_vsock **")
        fd = self._named.socket.fileno()
        try:
            check(lib.vmm_vsock_create(vm, self.name.encode(), cid, os.fsencode(self.path), fd, out))
        except BaseException:
            self._named.close()
            raise
        self._named.detach()  # the native half's now
        self._vsock: Any = out[0]
        self.virtio = lib.vmm_vsock_virtio(self._vsock)

    def connections(self) -> dict[str, int]:
        """Connections ``now``; opened since the start, ``from_host`` and ``from_guest``; ``resets`` sent."""
        info = ffi.new("vmm_vsock_info *")
        lib.vmm_vsock_get_info(self._vsock, info)
        names = ("from_host", "from_guest", "resets")
        return {"now": int(info.connections), **{name: int(getattr(info, name)) for name in names}}

    def destroy(self) -> None:
        """Close every socket, remove ``path``, free the native half."""
        if self._vsock is not None:
            lib.vmm_vsock_destroy(self._vsock)
            self._vsock = self.virtio = None
            self._named.close()


def _listen(path: str) -> PrivateSocket:
    from vmm.private_socket import PrivateSocket

    if len(os.fsencode(path)) > PATH_MAX:
        raise ConfigError(f"the vsock path {path} is longer than {PATH_MAX} bytes: give a shorter one")
    named = PrivateSocket(path, f"cannot listen on vsock socket {path}", BACKLOG)
    named.socket.setblocking(False)
    return named
