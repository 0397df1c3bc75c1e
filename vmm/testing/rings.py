"""Driver's side of split and packed rings, over guest memory. See :mod:`vmm.testing.ring`."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
"""Flags of descriptors: virtio 1.2, 2.7.5 and 2.8.1."""

EVENTS_ON, EVENTS_OFF, EVENTS_AT = 0, 1, 2
"""Flags of a packed ring's event suppression areas: 2.8.10."""

_WRAP = 0x8000
_SPLIT = struct.Struct("<QIHH")  # address, size, flags, next
_PACKED = struct.Struct("<QIHH")  # address, size, id, flags


class Memory(Protocol):
    """The memory access that a ring needs."""

    def read(self, gpa: int, size: int, /) -> bytes:
        """Return ``size`` bytes at ``gpa``."""

    def write(self, gpa: int, data: bytes, /) -> None:
        """Store ``data`` at ``gpa``."""


class Piece(NamedTuple):
    """Guest memory for one descriptor: device-readable, or device-writable if ``write``."""

    gpa: int
    size: int
    write: bool


def readable(gpa: int, size: int) -> Piece:
    """Return a device-readable piece of ``size`` bytes."""
    return Piece(gpa, size, False)


def writable(gpa: int, size: int) -> Piece:
    """Return a device-writable piece of ``size`` bytes."""
    return Piece(gpa, size, True)


class Used(NamedTuple):
    """A used buffer: its id from :meth:`Ring.offer`, and the length that the device reports."""

    id: int
    written: int


class RingFull(Exception):
    """There are not enough free descriptors for a chain."""


class BadUsed(Exception):
    """The device returned a buffer that was not available to it, which is an error of the device."""


class Ring:
    """Base of split and packed rings: ``size`` descriptors, laid out from page-aligned ``gpa`` on, zeroed.

    ``table``, ``driver_area`` and ``device_area`` are guest-physical addresses; ``end`` is the first one after them.
    ``avail`` and ``used`` are the positions of the next :meth:`offer` and :meth:`collect`.
    """

    packed = False

    def __init__(self, memory: Memory, size: int, *, gpa: int, event_idx: bool = False) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        driver_bytes, device_bytes = self._area_sizes()
        self.table = gpa
        self.driver_area = round_up(gpa + 16 * size, 64)
        self.device_area = round_up(self.driver_area + driver_bytes, 64)
        self.end = self.device_area + device_bytes
        memory.write(gpa, bytes(self.end - gpa))
        self.avail = self.used = 0
        self.chains: dict[int, int] = {}  # id of an available chain -> its slots in the ring
        self._free_slots = size
        self._offered = 0  # slots offered since the last wants_doorbell

    def _area_sizes(self) -> tuple[int, int]:
        raise NotImplementedError

    def offer(self, pieces: Sequence[Piece], *, indirect: int | None = None) -> int:
        """Make one chain available; return its id. ``indirect`` is the address for an indirect table, 16 bytes for each
        piece, with which the chain takes one slot.

        Raises :class:`RingFull`. ``pieces`` are not checked, so that a test can break rules.
        """
        if not pieces:
            raise ValueError("a chain has at least one piece")
        more = 0
        if indirect is not None:
            self.memory.write(indirect, self._indirect_table(pieces))
            pieces, more = [readable(indirect, 16 * len(pieces))], INDIRECT
        if len(pieces) > self._free_slots:
            raise RingFull(f"{len(pieces)} descriptors asked for, {self._free_slots} of {self.size} are free")
        id = self._put(pieces, more)
        self.chains[id] = len(pieces)
        self._free_slots -= len(pieces)
        return id

    def _put(self, pieces: Sequence[Piece], more: int) -> int:
        raise NotImplementedError

    def _indirect_table(self, pieces: Sequence[Piece]) -> bytes:
        raise NotImplementedError

    def wants_doorbell(self) -> bool:
        """Return whether the device wants a notification for the chains offered since the last call."""
        offered, self._offered = self._offered, 0
        return offered > 0 and self._wants_doorbell(offered)

    def _wants_doorbell(self, offered: int) -> bool:
        raise NotImplementedError

    @property
    def waiting(self) -> bool:
        """Whether there is a buffer to collect."""
        raise NotImplementedError

    def collect(self) -> Used | None:
        """Return the next used buffer, or ``None``. Raises :class:`BadUsed`."""
        if not self.waiting:
            return None
        used = self._next_used()
        slots = self.chains.pop(used.id, 0)
        if not slots:
            raise BadUsed(f"buffer {used.id} came back, the device has {sorted(self.chains) or 'none'}")
        self._free_slots += slots
        self._collected(used.id, slots)
        return used

    def _next_used(self) -> Used:
        raise NotImplementedError

    def _collected(self, id: int, slots: int) -> None:
        raise NotImplementedError

    def suppress(self) -> None:
        """Suppress interrupts (a hint; without effect with event_idx in a split ring)."""
        raise NotImplementedError

    def arm(self) -> bool:
        """Ask for an interrupt with the next buffer that comes back; true: one is there already."""
        raise NotImplementedError

    def _load16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def _store16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))


class SplitRing(Ring):
    """A split virtqueue (virtio 1.2, 2.7): ``size`` is a power of two."""

    def __init__(self, memory: Memory, size: int, *, gpa: int, event_idx: bool = False) -> None:
        super().__init__(memory, size, gpa=gpa, event_idx=event_idx)
        self._free = list(range(size))
        self._descriptors: dict[int, list[int]] = {}

    def _area_sizes(self) -> tuple[int, int]:
        return 6 + 2 * self.size, 6 + 8 * self.size  # 2.7.6, 2.7.8

    def _indirect_table(self, pieces: Sequence[Piece]) -> bytes:
        return self._chain(pieces, range(len(pieces)), 0)

    @staticmethod
    def _chain(pieces: Sequence[Piece], where: Sequence[int], more: int) -> bytes:
        last = len(pieces) - 1
        return b"".join(
            _SPLIT.pack(
                piece.gpa,
                piece.size,
                piece.write * WRITE | (n < last) * NEXT | more,
                where[n + 1] if n < last else 0,
            )
            for n, piece in enumerate(pieces)
        )

    def _put(self, pieces: Sequence[Piece], more: int) -> int:
        where = [self._free.pop(0) for _ in pieces]
        chain = self._chain(pieces, where, more)
        for n, slot in enumerate(where):
            self.memory.write(self.table + 16 * slot, chain[16 * n : 16 * n + 16])
        self._descriptors[where[0]] = where
        self._store16(self.driver_area + 4 + 2 * (self.avail % self.size), where[0])
        self.avail = (self.avail + 1) & 0xFFFF
        self._store16(self.driver_area + 2, self.avail)  # after the entries that it publishes
        self._offered += 1
        return where[0]

    def _wants_doorbell(self, offered: int) -> bool:
        if not self.event_idx:
            return not self._load16(self.device_area) & 1
        event = self._load16(self.device_area + 4 + 8 * self.size)  # 2.7.10.1
        return (self.avail - 1 - event) & 0xFFFF < offered

    @property
    def waiting(self) -> bool:
        """Whether there is a buffer to collect."""
        return self._load16(self.device_area + 2) != self.used

    def _next_used(self) -> Used:
        entry = self.memory.read(self.device_area + 4 + 8 * (self.used % self.size), 8)
        return Used(*struct.unpack("<II", entry))

    def _collected(self, id: int, slots: int) -> None:
        self.used = (self.used + 1) & 0xFFFF
        self._free += self._descriptors.pop(id)

    def suppress(self) -> None:
        """Suppress interrupts (a hint; without effect with event_idx)."""
        if not self.event_idx:
            self._store16(self.driver_area, 1)

    def arm(self) -> bool:
        """Ask for an interrupt with the next buffer that comes back; true: one is there already."""
        if self.event_idx:
            self._store16(self.driver_area + 4 + 2 * self.size, self.used)  # 2.7.7.1
        else:
            self._store16(self.driver_area, 0)
        return self.waiting


class PackedRing(Ring):
    """A packed virtqueue (virtio 1.2, 2.8). ``avail`` and ``used`` carry the wrap counter in bit 15."""

    packed = True

    def __init__(self, memory: Memory, size: int, *, gpa: int, event_idx: bool = False) -> None:
        super().__init__(memory, size, gpa=gpa, event_idx=event_idx)
        self.avail = self.used = _WRAP
        self._ids = list(range(size))

    def _area_sizes(self) -> tuple[int, int]:
        return 4, 4  # 2.8.10.1

    def _indirect_table(self, pieces: Sequence[Piece]) -> bytes:
        return b"".join(_PACKED.pack(piece.gpa, piece.size, 0, piece.write * WRITE) for piece in pieces)

    def advance(self, position: int, slots: int) -> int:
        """Return the position ``slots`` further on, wrap counter included."""
        slot = (position & ~_WRAP) + slots
        return slot | position & _WRAP if slot < self.size else (slot - self.size) | ~position & _WRAP

    def _put(self, pieces: Sequence[Piece], more: int) -> int:
        id, position, placed = self._ids.pop(0), self.avail, []
        for n, piece in enumerate(pieces):
            flags = AVAIL if position & _WRAP else USED
            flags |= piece.write * WRITE | (n < len(pieces) - 1) * NEXT | more
            placed.append((self.table + 16 * (position & ~_WRAP), _PACKED.pack(piece.gpa, piece.size, id, flags)))
            position = self.advance(position, 1)
        for gpa, descriptor in reversed(placed):  # the first descriptor's flags last of all (2.8.6)
            self.memory.write(gpa, descriptor[:14])
            self.memory.write(gpa + 14, descriptor[14:])
        self.avail = position
        self._offered += len(pieces)
        return id

    def _wants_doorbell(self, offered: int) -> bool:
        event, flags = struct.unpack("<HH", self.memory.read(self.device_area, 4))
        if flags != EVENTS_AT:
            return bool(flags == EVENTS_ON)
        return 0 < self.distance(event, self.avail) <= offered

    def distance(self, start: int, end: int) -> int:
        """Return the slots from one position forward to another, modulo two rounds."""
        there = (end & ~_WRAP) - (start & ~_WRAP) + (self.size if (start ^ end) & _WRAP else 0)
        return there % (2 * self.size)

    @property
    def waiting(self) -> bool:
        """Whether there is a buffer to collect."""
        flags = self._load16(self.table + 16 * (self.used & ~_WRAP) + 14)
        return flags & (AVAIL | USED) == (AVAIL | USED if self.used & _WRAP else 0)

    def _next_used(self) -> Used:
        _, written, id, _ = _PACKED.unpack(self.memory.read(self.table + 16 * (self.used & ~_WRAP), 16))
        return Used(id, written)

    def _collected(self, id: int, slots: int) -> None:
        self.used = self.advance(self.used, slots)
        self._ids.append(id)

    def suppress(self) -> None:
        """Suppress interrupts."""
        self.memory.write(self.driver_area, struct.pack("<HH", 0, EVENTS_OFF))

    def arm(self) -> bool:
        """Ask for an interrupt with the next buffer that comes back; true: one is there already."""
        wish = (self.used, EVENTS_AT) if self.event_idx else (0, EVENTS_ON)
        self.memory.write(self.driver_area, struct.pack("<HH", *wish))
        return self.waiting


def round_up(number: int, unit: int) -> int:
    """Return ``number`` rounded up to a multiple of ``unit``."""
    return -(-number // unit) * unit
