"""Moments by which something is over, and socket transfers that keep to one as a whole.

A socket's timeout begins anew with each byte: a peer that sends one every few seconds never runs into it, and has the
thread that waits for it for ever. So whatever comes from a peer is read under a :class:`Deadline`, which does not move.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket


class Deadline:
    """``seconds`` from now; ``None``: never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds until it, ``None`` without end. Raises ``TimeoutError`` once it is over."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        return left


def receive(connection: socket.socket, size: int, deadline: Deadline) -> bytes:
    """``size`` bytes, or as many as came before the other side closed. Raises ``OSError``, of which TimeoutError is
    one."""
    buffer = bytearray(size)
    with memoryview(buffer) as view:
        got = 0
        while got < size:
            connection.settimeout(deadline.left)
            came = connection.recv_into(view[got:])
            if not came:
                break
            got += came
    return bytes(buffer[:got])


def send(connection: socket.socket, data: bytes | bytearray | memoryview, deadline: Deadline) -> None:
    """All of ``data``. Raises ``OSError``, of which TimeoutError is one."""
    with memoryview(data).cast("B") as view:
        sent = 0
        while sent < len(view):
            connection.settimeout(deadline.left)
            sent += connection.send(view[sent:])
