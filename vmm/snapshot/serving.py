"""Serve a snapshot over a stream socket, its memory to a running machine (:mod:`vmm.snapshot.lazy`).

First the server sends the records from which the client creates the machine: their length (8 bytes, little-endian),
then ``state`` and ``memory`` of the merged chain, packed as a record file (docs/snapshot-format.md). Then it serves
pages by the protocol in ``native/include/vmmlazy.h`` until the client closes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

from vmm import deadline
from vmm.deadline import Deadline
from vmm.private_socket import PrivateSocket
from vmm.snapshot import records
from vmm.snapshot.regions import PAGE, Region, checksums_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.snapshot.reading import Snapshot

_ANSWER = struct.Struct("<QII")  # address, whether a page follows, zeros
_REQUESTS = 4096  # bytes of requests read at once
ANSWERS = 10.0  # seconds within which a server must begin to send
SLOWEST = 1 << 20  # bytes per second, the least rate of the records
_READER_SECONDS = 30.0  # within which a client must read the pages it requested


def answer_requests(connection: socket.socket, answer: Callable[[int], bytes]) -> None:
    """Serve requests for pages until the client closes. Raises ``OSError``, and what ``answer`` raises.

    Replies wait for a slow client, at most :data:`_READER_SECONDS`.
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
        deadline.send(connection, answers, Deadline(_READER_SECONDS + len(answers) / SLOWEST))


def answer_with(gpa: int, page: bytes | None) -> bytes:
    """Return the reply for the page at ``gpa``; ``page`` is ``None`` for zeros."""
    return _ANSWER.pack(gpa, page is not None, 0) + (page or b"")


class PageServer:
    """Serve one snapshot to any number of machines, one after another or each on its own thread."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._layers = snapshot.layers[::-1]
        regions = []
        for number, region in enumerate(snapshot.regions):
            held = 0
            for layer in self._layers:
                held |= int.from_bytes(layer.regions[number].held, "little")
            sums = bytes(checksums_size(region.size))  # no single file has these pages, so there are no checksums
            whole = region._replace(held=held.to_bytes(len(region.held), "little"), checksums=sums)
            regions.append(whole._asdict())
        self._records = records.pack({"state": snapshot.state, "memory": regions})

    def serve(self, connection: socket.socket) -> None:
        """Serve one client until it closes. Raises ``OSError``, ``ValueError`` for an address that is not a page's."""
        greeting = len(self._records).to_bytes(8, "little") + self._records
        deadline.send(connection, greeting, Deadline(_READER_SECONDS + len(greeting) / SLOWEST))
        answer_requests(connection, self.answer)

    def answer(self, gpa: int) -> bytes:
        """Return the reply to one request."""
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
    """A UNIX socket at ``path``, open to its owner only, that serves a snapshot. A context manager.

    Raises :class:`~vmm.errors.ConfigError` if it cannot listen there.
    """

    def __init__(self, snapshot: Snapshot, path: str) -> None:
        self._server = PageServer(snapshot)
        self._named = PrivateSocket(path, f"cannot serve at {path}")
        self._socket = self._named.socket

    def serve(self) -> None:
        """Serve every client on its own thread, until :meth:`close` or the end of the process."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._one, args=(connection,), name="pages", daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):  # the client closed, or broke the protocol
            self._server.serve(connection)

    def close(self) -> None:
        """Stop listening; existing connections continue. Idempotent."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._named.close()

    def __enter__(self) -> PageListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
