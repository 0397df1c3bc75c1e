"""Deadlines, and socket transfers that must be complete by one.

A socket's timeout restarts with each byte: a peer that sends one every few seconds never exceeds it and holds the
waiting thread for ever. Everything from a peer is therefore read under a :class:`Deadline`, which does not move.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket


class Deadline:
    """A moment ``seconds`` from now; ``None`` is never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Return the seconds that remain, ``None`` without a limit. Raises ``TimeoutError`` once it has passed."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        return left


def receive(connection: socket.socket, size: int, deadline: Deadline) -> bytes:
    """Receive ``size`` bytes, or fewer if the peer closes before. Raises ``OSError``, of which ``TimeoutError`` is a
    subclass."""
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
    """Send all of ``data``. Raises ``OSError``, of which ``TimeoutError`` is a subclass."""
    with memoryview(data).cast("B") as view:
        sent = 0
        while sent < len(view):
            connection.settimeout(deadline.left)
            sent += connection.send(view[sent:])
