"""Frames on a stream socket: what the two sides of a migration say to each other (docs/migration.md).

A frame is a header of 24 bytes and a payload: kind, number of a disk, length of the payload, an address, CRC-32C of the
header before it and of the payload, zeros. What a frame of a kind may be long is bounded before it is read; whoever
breaks a rule is refused with :class:`~vmm.errors.MigrationError`.
"""

from __future__ import annotations

import struct
import time
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm import deadline
from vmm._ffi import ffi, lib
from vmm.deadline import Deadline
from vmm.errors import MigrationError
from vmm.snapshot import cbor

if TYPE_CHECKING:
    import socket

    Bytes = bytes | bytearray | memoryview

VERSION = 3
PAGE = 4096
_HEADER = struct.Struct("<HHIQII")
_SUMMED = 16  # bytes of the header under the checksum, which follows them

HELLO_MAX = 256 << 10  # a description has 1 KiB and two command lines; whoever sends it may be anybody
TEXT_MAX = 16 << 10  # a sentence, or the version of the protocol
STATE_MAX = 64 << 20  # a vCPU's state has 10 KiB, and a region of 1 TiB a bitmap of 32 MiB
HELLO_VALUES = 1 << 14  # a description has some 600, whatever the number of vCPUs
DATA_MAX = 256 << 10  # a link of 1 MB/s moves it within the downtime that is asked for
PATIENCE = 30.0  # seconds in which not one frame comes or goes: the link is lost
SLOWEST = 1 << 20  # bytes a second that a frame may count on beyond that


class Kind(IntEnum):
    """What a frame is for."""

    # From the side that has the machine, the source:
    HELLO = 1  # value: what is coming
    PAGES = 2  # memory at the address
    ZEROS = 3  # as many bytes of zeros (8 bytes: their number) at the address
    ROUND = 4  # all so far is sent: answered by SEEN
    STATE = 5  # value: the machine's state, behind all of its memory
    YOURS = 6  # the machine is the destination's
    ABORT = 7  # value: why it stays where it was
    EPOCH = 8  # value: a state to go on from, if the source dies; all pages before belong to it
    DISK = 9  # what a disk holds at the address, a byte's
    DISK_ZEROS = 10  # as many bytes of zeros (8 bytes: their number) there
    OVER = 11  # it has heard ALL, and forgets the machine
    # From the destination:
    ACCEPT = 32  # value: it can become that machine
    SEEN = 33
    READY = 34  # it has become it, and waits to be told to go on
    TAKEN = 35  # it goes on
    ALL = 36  # every page is here: answered by OVER
    REFUSE = 37  # value: why not


_VALUES = {Kind.HELLO, Kind.STATE, Kind.ABORT, Kind.EPOCH, Kind.ACCEPT, Kind.REFUSE}
_DATA = {Kind.PAGES, Kind.DISK}
_RANGES = {Kind.ZEROS, Kind.DISK_ZEROS}
_DISKS = {Kind.DISK, Kind.DISK_ZEROS}
_BARE = {Kind.ROUND, Kind.YOURS, Kind.OVER, Kind.SEEN, Kind.READY, Kind.TAKEN, Kind.ALL}
_LONGEST = {
    **dict.fromkeys(_VALUES, TEXT_MAX),
    Kind.HELLO: HELLO_MAX,
    Kind.STATE: STATE_MAX,
    Kind.EPOCH: STATE_MAX,
    **dict.fromkeys(_DATA, DATA_MAX),
    **dict.fromkeys(_RANGES, 8),
    **dict.fromkeys(_BARE, 0),
}


class Frame(NamedTuple):
    """What came: ``payload`` is bytes, ``value`` what it decodes to where the kind has one, ``disk`` a number."""

    kind: Kind
    address: int
    payload: bytes
    value: Any
    disk: int = 0


class LinkLost(MigrationError):
    """The other side is not heard any more: that says nothing of what it does."""


class Channel:
    """One connection. Used by one thread at a time, but for :meth:`interrupt`.

    ``sent`` counts bytes. A frame that has begun, in or out, has :data:`PATIENCE` and its length at :data:`SLOWEST` to
    be over. Raises :class:`LinkLost` where the connection ends or a deadline is over, and
    :class:`~vmm.errors.MigrationError` for what the other side must not send.
    """

    def __init__(self, connection: socket.socket, *, bandwidth: int | None = None) -> None:
        self._socket = connection
        self._bandwidth = bandwidth
        self._paid = time.monotonic()  # what was sent until now is due at this moment
        self.sent = 0

    # ---- out ----

    def send(self, kind: Kind, payload: Bytes = b"", *, address: int = 0, disk: int = 0) -> None:
        """One frame. Where the other side has gone and has said why, that is raised."""
        assert len(payload) <= _LONGEST[kind]
        head = struct.pack("<HHIQ", kind, disk, len(payload), address)
        crc = _crc(_crc(0, head), payload)
        until = _frame_deadline(len(payload))
        try:
            # One packet where it fits one: a header on its own would wait for the acknowledgement of the last.
            if len(payload) <= DATA_MAX:
                deadline.send(self._socket, b"".join((head, struct.pack("<II", crc, 0), payload)), until)
            else:
                deadline.send(self._socket, head + struct.pack("<II", crc, 0), until)
                deadline.send(self._socket, payload, until)
        except (OSError, ValueError) as error:
            self._raise_reason()
            raise LinkLost(f"the link to the other side is lost ({_why(error)})") from error
        self.sent += _HEADER.size + len(payload)
        if self._bandwidth:
            self._pay(_HEADER.size + len(payload))

    def _raise_reason(self) -> None:
        """Who refuses closes the connection with what it has not read, so sending fails before its reason is read."""
        try:
            last = self.receive(Kind.REFUSE, Kind.ABORT, timeout=1.0)
        except MigrationError:
            return
        raise MigrationError(_text(last.value))

    def _pay(self, n: int) -> None:
        now = time.monotonic()
        self._paid = max(self._paid, now - 0.05) + n / (self._bandwidth or 1)
        if self._paid > now:
            time.sleep(self._paid - now)

    def unlimited(self) -> None:
        """No limit of bandwidth from now on: the guest stands still."""
        self._bandwidth = None

    def send_value(self, kind: Kind, value: Any) -> None:
        """One frame with a plain value."""
        try:
            encoded = cbor.encode(value)
        except ValueError as error:
            raise MigrationError(f"the machine cannot be described: {error}") from None
        if len(encoded) > _LONGEST[kind]:
            raise MigrationError(f"a frame {kind.name} would be of {len(encoded)} bytes: {_LONGEST[kind]} are the most")
        self.send(kind, encoded)

    # ---- in ----

    def receive(self, *kinds: Kind, timeout: float | None = PATIENCE, within: Deadline | None = None) -> Frame:
        """The next frame, which must be of one of ``kinds``. REFUSE and ABORT raise with the reason they give.

        It begins within ``timeout`` seconds; or all of it, and whatever else keeps to the same deadline, is there
        ``within`` that.
        """
        first = self._read(1, within or Deadline(timeout))
        head = first + self._read(_HEADER.size - 1, within or _frame_deadline(_HEADER.size))
        kind, disk, length, address, crc, zeros = _HEADER.unpack(head)
        if kind not in _LONGEST or zeros or (disk and kind not in _DISKS):
            raise MigrationError(f"the other side does not speak this protocol: a frame begins {head[:8].hex()}")
        if length > _LONGEST[kind] or (kind in _RANGES and length != 8):
            raise MigrationError(f"the other side sent a frame {Kind(kind).name} of {length} bytes: it is refused")
        payload = self._read(length, within or _frame_deadline(length))
        if _crc(_crc(0, head[:_SUMMED]), payload) != crc:
            raise MigrationError(f"a frame {Kind(kind).name} was damaged on the way: its checksum is wrong")
        try:
            values = HELLO_VALUES if kind == Kind.HELLO else cbor.VALUES_MAX
            value = cbor.decode(payload, values) if kind in _VALUES else None
        except (ValueError, RecursionError) as error:
            raise MigrationError(
                f"the other side sent a frame {Kind(kind).name} that holds no value: {error}"
            ) from None
        if kind in (Kind.REFUSE, Kind.ABORT) and kind not in kinds:
            raise MigrationError(_text(value))
        if kind not in kinds:
            expected = " or ".join(k.name for k in kinds)
            raise MigrationError(f"the other side sent {Kind(kind).name} where only {expected} can come: it is refused")
        return Frame(Kind(kind), address, payload, value, disk)

    def _read(self, n: int, until: Deadline) -> bytes:
        try:
            came = deadline.receive(self._socket, n, until)
        except (OSError, ValueError) as error:
            raise LinkLost(f"the link to the other side is lost ({_why(error)})") from error
        if len(came) < n:
            raise LinkLost("the other side closed the link")
        return came

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def interrupt(self) -> None:
        """Have whoever is in :meth:`send` or :meth:`receive` find the link lost. From any thread."""
        import contextlib
        import socket

        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection. Twice is fine."""
        self._socket.close()


def _frame_deadline(length: int) -> Deadline:
    """For a frame that has begun."""
    return Deadline(PATIENCE + length / SLOWEST)


def cleared(frame: Frame) -> int:
    """How many bytes of zeros a frame is for. Raises :class:`~vmm.errors.MigrationError` for more than one may be."""
    size = int.from_bytes(frame.payload, "little")
    if size > DATA_MAX:
        raise MigrationError(f"{size} bytes of zeros in one frame: {DATA_MAX} are the most")
    return size


def _crc(crc: int, data: Bytes) -> int:
    return int(lib.vmm_crc32c(crc, ffi.from_buffer(data), len(data)))


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _text(value: Any) -> str:
    """A reason the other side gave, fit to be printed."""
    text = value if isinstance(value, str) else "it gave no reason"
    shown = "".join(c if c.isprintable() else "?" for c in text[:500])
    return f"the other side says: {shown}"
