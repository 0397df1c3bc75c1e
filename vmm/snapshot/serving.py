"""A snapshot's memory over a stream socket, to a machine that runs already (:mod:`vmm.snapshot.lazy`).

First the records, so that the other side can make the machine: their length, 8 bytes, little-endian, and ``state`` and
``memory`` of what the whole chain is, packed as a record file (docs/snapshot-format.md). Then pages, as
``native/include/vmmlazy.h`` says, until the other side closes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm.errors import SnapshotError
from vmm.snapshot import records
from vmm.snapshot.reading import parse_regions
from vmm.snapshot.regions import PAGE, Region, checksums_size

if TYPE_CHECKING:
    import socket

    from vmm.snapshot.reading import Snapshot

_ANSWER = "<QII"  # address, what follows, zeros
_ZEROS, _PAGE = 0, 1
_REQUESTS = 4096  # bytes of requests taken at a time


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
        connection.sendall(len(self._records).to_bytes(8, "little") + self._records)
        pending = b""
        while taken := connection.recv(_REQUESTS):
            pending += taken
            whole = len(pending) // 8 * 8
            asked, pending = pending[:whole], pending[whole:]
            connection.sendall(
                b"".join(self.answer(int.from_bytes(asked[at : at + 8], "little")) for at in range(0, whole, 8))
            )

    def answer(self, gpa: int) -> bytes:
        """The answer to one request."""
        import struct

        for layer in self._layers:
            region = _holder(layer.regions, gpa)
            number = (gpa - region.gpa) // PAGE
            if region.held[number // 8] >> number % 8 & 1:
                page = os.pread(layer.memory_fd, PAGE, region.offset + number * PAGE)
                if len(page) != PAGE:
                    raise OSError(f"{layer.path} was cut short")
                return struct.pack(_ANSWER, gpa, _PAGE, 0) + page
        return struct.pack(_ANSWER, gpa, _ZEROS, 0)


def _holder(regions: tuple[Region, ...], gpa: int) -> Region:
    for region in regions:
        if region.gpa <= gpa < region.gpa + region.size and gpa % PAGE == 0:
            return region
    raise ValueError(f"{gpa:#x} is not the address of a page")


def receive(connection: socket.socket) -> tuple[Any, tuple[Region, ...]]:
    """The state and the regions that a :class:`PageServer` sends first; then the socket is one for pages.

    Raises :class:`~vmm.errors.SnapshotError` for what is no such thing, or an end before it.
    """
    size = int.from_bytes(_exactly(connection, 8), "little")
    if size > records.SIZE_MAX:
        raise SnapshotError(f"the server announces records of {size} bytes: it serves no snapshot")
    found, _ = records.unpack("what the server sends", _exactly(connection, size))
    if found.keys() != {"state", "memory"}:
        raise SnapshotError("what the server sends is no snapshot")
    return found["state"], parse_regions("what the server sends", found["memory"])


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        try:
            part = connection.recv(min(size - len(content), 1 << 20))
        except OSError as error:
            raise SnapshotError(f"the server of the snapshot cannot be read ({error.strerror})") from None
        if not part:
            raise SnapshotError("the server of the snapshot closed its socket before it had sent the records")
        content += part
    return bytes(content)
