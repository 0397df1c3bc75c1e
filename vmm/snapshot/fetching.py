"""Client of a snapshot that :mod:`vmm.snapshot.serving` serves over a stream socket."""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

from vmm import deadline
from vmm.deadline import Deadline
from vmm.errors import SnapshotError, VmmError
from vmm.snapshot import records
from vmm.snapshot.reading import parse_regions
from vmm.snapshot.regions import Region
from vmm.snapshot.serving import ANSWERS, SLOWEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.snapshot.lazy import LazyMemory

_AGAIN = 0.5  # seconds between two attempts to reach a lost server


def connect(path: str) -> socket.socket:
    """Connect to the :class:`PageListener` at ``path``. Raises :class:`~vmm.errors.SnapshotError`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWERS)
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise SnapshotError(f"no snapshot is served at {path}: {error.strerror or error}") from error
    return connection


class Reconnection:
    """Reconnect to a lost server while pages are missing; threads that fault on one wait meanwhile.

    ``what`` was received at first: another snapshot is refused. ``tell`` is called with messages for the user.
    """

    def __init__(self, memory: LazyMemory, path: str, what: object, tell: Callable[[str], object]) -> None:
        self._memory = memory
        self._path = path
        self._what = what
        self._tell = tell
        self._told = ""
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="regaining", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while (state := self._memory.state) not in ("done", "abandoned"):
            if state == "lost":
                self._regain()
            patience = _AGAIN if state == "lost" else None
            readable = select.select([self._memory.fd, self._stop], [], [], patience)[0]
            if self._stop in readable:
                return
            if readable:
                os.eventfd_read(self._memory.fd)

    def _regain(self) -> None:
        try:
            with connect(self._path) as connection:
                if receive(connection) != self._what:
                    raise SnapshotError(f"another snapshot is served at {self._path}: serve the machine's own")
                self._memory.connect(connection)
        except VmmError as error:
            self._say(f"the guest waits for its memory: {error}")
        else:
            self._say("its memory comes again")

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(text)

    def stop(self) -> None:
        """Stop and wait for the thread. Idempotent."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()


def receive(connection: socket.socket) -> tuple[Any, tuple[Region, ...]]:
    """Receive the state and the regions that a :class:`PageServer` sends first; afterwards the socket is for pages.

    Raises :class:`~vmm.errors.SnapshotError` for anything else, or an early end of the stream.
    """
    timeout = connection.gettimeout()
    size = int.from_bytes(_exactly(connection, 8, Deadline(ANSWERS)), "little")
    if size > records.SIZE_MAX:
        raise SnapshotError(f"the server announces records of {size} bytes: it serves no snapshot")
    content = _exactly(connection, size, Deadline(ANSWERS + size / SLOWEST))
    connection.settimeout(timeout)
    found, _ = records.unpack("what the server sends", content)
    if found.keys() != {"state", "memory"}:
        raise SnapshotError("what the server sends is no snapshot")
    return found["state"], parse_regions("what the server sends", found["memory"])


def _exactly(connection: socket.socket, size: int, until: Deadline) -> bytes:
    try:
        content = deadline.receive(connection, size, until)
    except OSError as error:
        raise SnapshotError(f"the server of the snapshot cannot be read ({error.strerror or error})") from None
    if len(content) < size:
        raise SnapshotError("the server of the snapshot closed its socket before it had sent the records")
    return content
