"""The migration protocol's frames on a stream socket (docs/migration.md).

A frame is a header of 24 bytes and a payload. The header has the kind, the number of a disk, the length of the payload,
an address, a CRC-32C over the header before it and the payload, and zeros. The length is checked against the bound of
the kind before the payload is read; a violation raises :class:`~vmm.errors.MigrationError`.
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
_SUMMED = 16  # bytes of the header that the checksum covers; it follows them

HELLO_MAX = 256 << 10  # a description has 1 KiB and two command lines; its sender is not authenticated yet
TEXT_MAX = 16 << 10  # a sentence, or the version of the protocol
STATE_MAX = 64 << 20  # a vCPU's state has 10 KiB, and a region of 1 TiB a bitmap of 32 MiB
HELLO_VALUES = 1 << 14  # a description has some 600, whatever the number of vCPUs
DATA_MAX = 256 << 10  # a link of 1 MB/s sends it within the default downtime
PATIENCE = 30.0  # seconds without a frame in either direction after which the link is lost
SLOWEST = 1 << 20  # bytes per second by which a long frame extends that deadline


class Kind(IntEnum):
    """What a frame is for."""

    # From the source:
    HELLO = 1  # value: what is coming
    PAGES = 2  # memory at the address
    ZEROS = 3  # as many bytes of zeros (8 bytes: their number) at the address
    ROUND = 4  # all so far is sent: the reply is SEEN
    STATE = 5  # value: the machine's state, behind all of its memory
    YOURS = 6  # the machine is the destination's
    ABORT = 7  # value: why it stays where it was
    EPOCH = 8  # value: a state to continue from if the source dies; all pages before belong to it
    DISK = 9  # data of a disk at the address, in bytes
    DISK_ZEROS = 10  # as many bytes of zeros (8 bytes: their number) there
    OVER = 11  # ALL was received; the source releases the machine
    # From the destination:
    ACCEPT = 32  # value: it can become that machine
    SEEN = 33
    READY = 34  # the state is loaded; it waits for YOURS
    TAKEN = 35  # it goes on
    ALL = 36  # every page has arrived: the reply is OVER
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
    """A received frame: ``payload`` is bytes, ``value`` its decoded form where the kind has one, ``disk`` a number."""

    kind: Kind
    address: int
    payload: bytes
    value: Any
    disk: int = 0


class LinkLost(MigrationError):
    """The link to the peer is lost, which does not tell whether the peer still runs."""


class Channel:
    """One connection. Not thread-safe, except for :meth:`interrupt`.

    ``sent`` counts bytes. Once begun, a frame in either direction must be complete within :data:`PATIENCE` seconds
    plus its length at :data:`SLOWEST`. Raises :class:`LinkLost` when the connection ends or a deadline passes, and
    :class:`~vmm.errors.MigrationError` for frames that the peer must not send.
    """

    def __init__(self, connection: socket.socket, *, bandwidth: int | None = None) -> None:
        self._socket = connection
        self._bandwidth = bandwidth
        self._paid = time.monotonic()  # the moment by which the bandwidth limit has accounted for everything sent
        self.sent = 0

    # ---- out ----

    def send(self, kind: Kind, payload: Bytes = b"", *, address: int = 0, disk: int = 0) -> None:
        """Send one frame. If the peer has closed the connection with a reason, raise that reason."""
        assert len(payload) <= _LONGEST[kind]
        head = struct.pack("<HHIQ", kind, disk, len(payload), address)
        crc = _crc(_crc(0, head), payload)
        until = _frame_deadline(len(payload))
        try:
            # One packet if possible: a separate header would wait for the previous acknowledgement.
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
        """Raise the peer's reason, if it sent one: a peer that refuses closes with unread data, so that sending fails
        before the reason is read."""
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
        """Lift the bandwidth limit from now on, for the time in which the guest is paused."""
        self._bandwidth = None

    def send_value(self, kind: Kind, value: Any) -> None:
        """Send one frame with a plain value."""
        try:
            encoded = cbor.encode(value)
        except ValueError as error:
            raise MigrationError(f"the machine cannot be described: {error}") from None
        if len(encoded) > _LONGEST[kind]:
            raise MigrationError(f"a frame {kind.name} would be of {len(encoded)} bytes: {_LONGEST[kind]} are the most")
        self.send(kind, encoded)

    # ---- in ----

    def receive(self, *kinds: Kind, timeout: float | None = PATIENCE, within: Deadline | None = None) -> Frame:
        """Return the next frame, which must be of one of ``kinds``. REFUSE and ABORT raise with the reason they give.

        It must begin within ``timeout`` seconds; or, with ``within``, be complete before that deadline, which several
        calls can share.
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
        """Make a thread in :meth:`send` or :meth:`receive` raise :class:`LinkLost`. Call it from any thread."""
        import contextlib
        import socket

        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()


def _frame_deadline(length: int) -> Deadline:
    """Return the deadline of a frame that has begun."""
    return Deadline(PATIENCE + length / SLOWEST)


def cleared(frame: Frame) -> int:
    """Return the bytes of zeros a frame stands for. Raises :class:`~vmm.errors.MigrationError` above the bound."""
    size = int.from_bytes(frame.payload, "little")
    if size > DATA_MAX:
        raise MigrationError(f"{size} bytes of zeros in one frame: {DATA_MAX} are the most")
    return size


def _crc(crc: int, data: Bytes) -> int:
    return int(lib.vmm_crc32c(crc, ffi.from_buffer(data), len(data)))


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _text(value: Any) -> str:
    """Return the peer's reason, made printable."""
    text = value if isinstance(value, str) else "it gave no reason"
    shown = "".join(c if c.isprintable() else "?" for c in text[:500])
    return f"the other side says: {shown}"
