"""A link between two machines: frames with their virtio-net header over a stream socket, so that a large frame crosses
unsegmented, without checksums, since they never leave the host.

Who connects says hello first: 8 bytes of magic, the version, the largest frame (32 bits each, little-endian). Either
side hangs up on any other hello. Every frame follows its length, 32 bits big-endian, header included.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.errors import ConfigError, HostError
from vmm.net.end import End, Refusal, wait

if TYPE_CHECKING:
    from socket import socket

    from vmm.private_socket import PrivateSocket

MAGIC, VERSION, FRAME_MAX = b"pyvmmnet", 1, 65597
HELLO = MAGIC + VERSION.to_bytes(4, "little") + FRAME_MAX.to_bytes(4, "little")

_SEATS = 64  # machines that may wait for a place on one link
_HELLO_TIME = 5.0  # seconds for a peer's greeting; then the next may connect

_links = 0


class Connected(End):
    """One of the two ends that :func:`link` makes."""

    offloads = True

    def __init__(self, end: socket, identity: str) -> None:
        self._end: socket | None = end
        self._identity = identity

    def identity(self) -> str:
        """This link and this side of it."""
        return self._identity

    def connect(self, stop: int) -> socket | None:
        """The socket, once: when the other machine is gone, so is the link."""
        end, self._end = self._end, None
        return end

    def close(self) -> None:
        """The end, if no device took it."""
        if self._end is not None:
            self._end.close()
            self._end = None


def link() -> tuple[Connected, Connected]:
    """Two ends that are connected, for two machines in this process::

    left, right = link()
    """
    import socket

    global _links
    _links += 1
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    left, right = (Connected(end, f"link {_links} {side}") for side, end in enumerate(ends))
    return left, right


class SocketLink(End):
    """Two machines that name the same ``path``. The first listens there, the second connects; when one goes, the
    other waits for the next at the same place. A third waits until one of them leaves.

    Each has a seat at the link, the first that is free: a lock on one byte of ``path.lock``, which goes with the
    process. The MAC address is made of it: two machines never share one, and a
    machine that reconnects keeps its address.
    """

    backend = "socket"
    offloads = True
    lasting = True

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._lock = -1
        self._seat = 0
        self._named: PrivateSocket | None = None
        self._peer: socket | None = None

    def open(self, index: int, queues: int, mtu: int | None) -> None:
        """Take a seat; listen or connect."""
        try:
            self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._seat = next((seat for seat in range(1, _SEATS + 1) if self._hold(seat)), 0)
            if not self._seat:
                raise ConfigError(f"link {self.path}: {_SEATS} machines wait at it already: use another path")
            self._join()
        except OSError as error:
            self.close()
            raise HostError(
                f"link {self.path}: {error.strerror}: give a path in a directory you may write", errno=error.errno or 0
            ) from error
        except BaseException:
            self.close()
            raise

    def _hold(self, byte: int, kind: int | None = None, wait: bool = False) -> bool:
        """A lock on a byte of the lock file, of this open of it: another machine in this process is another one."""
        import fcntl
        import struct

        what = struct.pack("hhlli", fcntl.F_WRLCK if kind is None else kind, os.SEEK_SET, byte, 1, 0)
        try:
            fcntl.fcntl(self._lock, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, what)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _join(self) -> None:
        """Connect to a listening machine; if there is none, listen. Only one at a time: two would both find none."""
        import fcntl
        import socket

        from vmm.private_socket import PrivateSocket

        self._hold(0, wait=True)
        try:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                peer.connect(self.path)
                self._peer = peer
                return
            except (FileNotFoundError, ConnectionRefusedError):
                peer.close()
            except BaseException:
                peer.close()
                raise
            self._named = PrivateSocket(self.path, f"link {self.path}", _SEATS)
        finally:
            self._hold(0, kind=fcntl.F_UNLCK)

    def identity(self) -> str:
        """The link and our seat at it."""
        return f"socket {os.path.realpath(self.path)} {self._seat}"

    def connect(self, stop: int) -> socket | None:
        """The next machine at the other end."""
        if self._named is None and self._peer is None:
            try:
                self._join()
            except OSError as error:
                raise Refusal(f"link {self.path}: {error.strerror}") from error
            except ConfigError as error:
                raise Refusal(str(error)) from error
        while True:
            peer, self._peer = self._peer, None
            if peer is None:
                assert self._named is not None
                if not wait(self._named.socket.fileno(), stop):
                    return None
                peer, _ = self._named.socket.accept()
            # Who was accepted says hello at once. Who connected may have to wait until the two others part.
            answer = greet(peer, stop, _HELLO_TIME if self._named else None)
            if answer == HELLO:
                return peer
            peer.close()
            if answer is None:
                return None
            if self._named is None:
                if not answer:
                    raise Refusal(f"link {self.path}: the machine that listened there has left; start it again")
                raise Refusal(
                    f"link {self.path}: the listener is not a machine of this version of pyvmm; use another path"
                )

    def close(self) -> None:
        """Leave the link; the seat is free."""
        if self._peer is not None:
            self._peer.close()
        if self._named is not None:
            self._leave(self._named)
        self._peer = self._named = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _leave(self, named: PrivateSocket) -> None:
        import fcntl

        self._hold(0, wait=True)
        named.close()
        self._hold(0, kind=fcntl.F_UNLCK)


def greet(peer: socket, stop: int, timeout: float | None) -> bytes | None:
    """Exchange hellos: what came, which is short if the peer left or was silent. ``None``: ``stop`` turned readable."""
    import time

    end = None if timeout is None else time.monotonic() + timeout
    answer = b""
    try:
        peer.sendall(HELLO)
        while len(answer) < len(HELLO):
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = wait(peer.fileno(), stop, left)
            if not ready:
                return None if ready is None else answer
            part = peer.recv(len(HELLO) - len(answer))
            if not part:
                break
            answer += part
    except OSError:
        return b""
    return answer
