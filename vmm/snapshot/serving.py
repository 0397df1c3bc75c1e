"""A snapshot over a stream socket, its memory to a machine that runs already (:mod:`vmm.snapshot.lazy`).

First the records, so that the other side can make the machine: their length, 8 bytes, little-endian, and ``state`` and
``memory`` of what the whole chain is, packed as a record file (docs/snapshot-format.md). Then pages, as
``native/include/vmmlazy.h`` says, until the other side closes.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from vmm import deadline
from vmm.deadline import Deadline
from vmm.errors import SnapshotError, VmmError
from vmm.private_socket import PrivateSocket
from vmm.snapshot import records
from vmm.snapshot.reading import parse_regions
from vmm.snapshot.regions import PAGE, Region, checksums_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.snapshot.lazy import LazyMemory
    from vmm.snapshot.reading import Snapshot

_ANSWER = struct.Struct("<QII")  # address, whether a page follows, zeros
_REQUESTS = 4096  # bytes of requests taken at a time
_ANSWERS = 10.0  # seconds in which a server begins to send
_SLOWEST = 1 << 20  # bytes a second, at which it has sent the records
_READER_SECONDS = 30.0  # in which who asked for pages takes them
_AGAIN = 0.5  # seconds between two looks for a server that is gone


def answer_requests(connection: socket.socket, answer: Callable[[int], bytes]) -> None:
    """Answer requests for pages until the other side closes. Raises ``OSError``, and what ``answer`` does.

    A request may come at any time, and is answered at the reader's pace, but not without end.
    """
    pending = b""
    while True:
        connection.settimeout(None)
        taken = connection.recv(_REQUESTS)
        if not taken:
            return
        pending += taken
        whole = len(pending) // 8 * 8
        asked, pending = pending[:whole], pending[whole:]
        answers = b"".join(answer(int.from_bytes(asked[at : at + 8], "little")) for at in range(0, whole, 8))
        deadline.send(connection, answers, Deadline(_READER_SECONDS + len(answers) / _SLOWEST))


def answer_with(gpa: int, page: bytes | None) -> bytes:
    """The answer for the page at ``gpa``; ``None``: it is zeros."""
    return _ANSWER.pack(gpa, page is not None, 0) + (page or b"")


class PageServer:
    """Serves one snapshot to any number of machines, one after another or each on a thread of its own."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._layers = snapshot.layers[::-1]
        regions = []
        for number, region in enumerate(snapshot.regions):
            held = 0
            for layer in self._layers:
                held |= int.from_bytes(layer.regions[number].held, "little")
            sums = bytes(checksums_size(region.size))  # no file has these pages together: there is nothing to compare
            whole = region._replace(held=held.to_bytes(len(region.held), "little"), checksums=sums)
            regions.append(whole._asdict())
        self._records = records.pack({"state": snapshot.state, "memory": regions})

    def serve(self, connection: socket.socket) -> None:
        """Until the other side closes. Raises ``OSError``; ``ValueError`` when it asks for what is no page."""
        greeting = len(self._records).to_bytes(8, "little") + self._records
        deadline.send(connection, greeting, Deadline(_READER_SECONDS + len(greeting) / _SLOWEST))
        answer_requests(connection, self.answer)

    def answer(self, gpa: int) -> bytes:
        """The answer to one request."""
        for layer in self._layers:
            region = _holder(layer.regions, gpa)
            number = (gpa - region.gpa) // PAGE
            if region.held[number // 8] >> number % 8 & 1:
                page = os.pread(layer.memory_fd, PAGE, region.offset + number * PAGE)
                if len(page) != PAGE:
                    raise OSError(f"{layer.path} was cut short")
                return answer_with(gpa, page)
        return answer_with(gpa, None)


def _holder(regions: tuple[Region, ...], gpa: int) -> Region:
    for region in regions:
        if region.gpa <= gpa < region.gpa + region.size and gpa % PAGE == 0:
            return region
    raise ValueError(f"{gpa:#x} is not the address of a page")


class PageListener:
    """A UNIX socket at ``path``, its owner's alone, where machines come for a snapshot. A context manager.

    Raises :class:`~vmm.errors.ConfigError` when it cannot be there.
    """

    def __init__(self, snapshot: Snapshot, path: str) -> None:
        self._server = PageServer(snapshot)
        self._named = PrivateSocket(path, f"cannot serve at {path}")
        self._socket = self._named.socket

    def serve(self) -> None:
        """Every machine that comes, each on a thread of its own; until the process ends, or :meth:`close`."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._one, args=(connection,), name="pages", daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):  # it went, or is no machine
            self._server.serve(connection)

    def close(self) -> None:
        """Nobody new. Twice is fine."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._named.close()

    def __enter__(self) -> PageListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- the other side ----


def connect(path: str) -> socket.socket:
    """A connection to the :class:`PageListener` at ``path``. Raises :class:`~vmm.errors.SnapshotError`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWERS)
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise SnapshotError(f"no snapshot is served at {path}: {error.strerror or error}") from error
    return connection


class Reconnection:
    """Finds the server again when it is lost, as long as pages are to come: the guest waits meanwhile.

    ``what`` was received at first: another snapshot is not taken in its place. ``tell`` is told what a person should
    know.
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
                    raise SnapshotError(f"another snapshot is served at {self._path}")
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
    """The state and the regions that a :class:`PageServer` sends first; then the socket is one for pages.

    Raises :class:`~vmm.errors.SnapshotError` for what is no such thing, or an end before it.
    """
    timeout = connection.gettimeout()
    size = int.from_bytes(_exactly(connection, 8, Deadline(_ANSWERS)), "little")
    if size > records.SIZE_MAX:
        raise SnapshotError(f"the server announces records of {size} bytes: it serves no snapshot")
    content = _exactly(connection, size, Deadline(_ANSWERS + size / _SLOWEST))
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
