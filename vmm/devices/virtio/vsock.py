"""The socket device (virtio 1.2, 5.10): streams between guest ports and UNIX sockets. ``native/virtio/vsock.c``.

The convention is Firecracker's. A host program connects to ``path``, writes ``CONNECT <port>`` and a newline, reads
``OK <host port>``, and has a stream to the guest's port; a guest that connects to CID 2, port n, reaches whoever
listens on the UNIX socket ``<path>_<n>``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError, HostError

if TYPE_CHECKING:
    import socket

PATH_MAX = 95  # bytes: a UNIX socket's path has 107, and "_4294967295" goes behind this one
BACKLOG = 64


class Vsock(VirtioDevice):
    """Stream sockets for the guest with context id ``cid``; ``path`` is made here and removed by :meth:`destroy`.

    A socket at ``path`` on which nobody listens any more is replaced. Raises :class:`~vmm.errors.ConfigError` when
    something else is there, and :class:`~vmm.errors.HostError` when the host does not let it be made.
    """

    device_id = 19
    remembers = ("connected",)  # 1: a guest that is loaded is told that its connections are gone

    def __init__(self, vm: Any, index: int = 0, *, cid: int = 3, path: str | os.PathLike[str]) -> None:
        self.name = f"virtio-vsock{index}"
        self.path = os.fspath(path)
        if not 3 <= cid < 0xFFFFFFFF:
            raise ConfigError(f"{cid} is not a guest's context id: give one from 3 to 4294967294")
        listener = _listen(self.path)
        self._made = _identity(self.path)
        out = ffi.new("vmm_vsock **")
        try:
            check(lib.vmm_vsock_create(vm, self.name.encode(), cid, os.fsencode(self.path), listener.fileno(), out))
        except BaseException:
            listener.close()
            self._remove()
            raise
        listener.detach()  # the native half's now
        self._vsock: Any = out[0]
        self.virtio = lib.vmm_vsock_virtio(self._vsock)

    def connections(self) -> dict[str, int]:
        """Connections ``now``; opened since the start, ``from_host`` and ``from_guest``; ``resets`` sent."""
        info = ffi.new("vmm_vsock_info *")
        lib.vmm_vsock_get_info(self._vsock, info)
        names = ("from_host", "from_guest", "resets")
        return {"now": int(info.connections), **{name: int(getattr(info, name)) for name in names}}

    def disconnect(self) -> None:
        """End every connection, and tell the guest that its transport was reset."""
        lib.vmm_vsock_disconnect(self._vsock)

    def destroy(self) -> None:
        """Close every socket, remove ``path``, free the native half."""
        if self._vsock is not None:
            lib.vmm_vsock_destroy(self._vsock)
            self._vsock = self.virtio = None
            self._remove()

    def _remove(self) -> None:
        if _identity(self.path) == self._made:  # nobody has put another one in its place
            os.unlink(self.path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _listen(path: str) -> socket.socket:
    import socket

    if len(os.fsencode(path)) > PATH_MAX:
        raise ConfigError(f"the vsock path {path} is longer than {PATH_MAX} bytes: give a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if os.path.lexists(path):
            _make_way(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(
            f"{path}: {error.strerror}: give a vsock path in a directory you may write", error.errno or 0
        ) from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _make_way(path: str) -> None:
    """Remove a socket on which nobody listens."""
    import socket
    import stat

    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(f"{path} is there already and no socket: give another vsock path, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # it listens, and is busy
            pass
    raise ConfigError(f"{path} belongs to a program that is running: give another vsock path")
