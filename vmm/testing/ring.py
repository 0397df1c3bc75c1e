"""The driver's side of virtio: rings, and a driver for a whole device through its transport's registers.

For tests of devices, without a guest. Rings work over anything with ``read(gpa, size)`` and ``write(gpa, data)``
(:class:`vmm.memory.GuestMemory` has both)::

    ring = PackedRing(memory, 64, gpa=0x10000, event_idx=True)
    id = ring.offer([readable(0x20000, 16), writable(0x21000, 512)])
    if ring.wants_doorbell(): ...
    while used := ring.collect(): ...                   # Used(id, written)

and a driver over a machine's bus::

    with Machine(memory="64M", virtio="mmio") as machine:
        driver = VirtioDriver.of(machine, machine.virtio[0])
        driver.start(packed=True)
        print(driver.request(0, room=[512]).data)       # 512 bytes of the entropy device

All is written after virtio 1.2, and behaves; ``ring.table``, ``ring.driver_area`` and ``ring.device_area`` are where
a test that does not goes to work. No fences: the processor keeps stores in order, and Python is slower than its store
buffer.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# ---- rings ----

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
"""Flags of descriptors: virtio 1.2, 2.7.5 and 2.8.1."""

EVENTS_ON, EVENTS_OFF, EVENTS_AT = 0, 1, 2
"""Flags of a packed ring's event suppression areas: 2.8.10."""

_WRAP = 0x8000
_SPLIT = struct.Struct("<QIHH")  # address, size, flags, next
_PACKED = struct.Struct("<QIHH")  # address, size, id, flags


class Memory(Protocol):
    """What a ring asks of memory."""

    def read(self, gpa: int, size: int, /) -> bytes:
        """``size`` bytes at ``gpa``."""

    def write(self, gpa: int, data: bytes, /) -> None:
        """Store ``data`` at ``gpa``."""


class Piece(NamedTuple):
    """Guest memory for one descriptor: the device reads it, or, if ``write``, fills it."""

    gpa: int
    size: int
    write: bool


def readable(gpa: int, size: int) -> Piece:
    """``size`` bytes for the device to read."""
    return Piece(gpa, size, False)


def writable(gpa: int, size: int) -> Piece:
    """``size`` bytes for the device to fill."""
    return Piece(gpa, size, True)


class Used(NamedTuple):
    """A buffer that came back: what :meth:`Ring.offer` called it, and how many bytes the device says it filled."""

    id: int
    written: int


class RingFull(Exception):
    """There are not enough free descriptors for a chain."""


class BadUsed(Exception):
    """The device gave a buffer back that it does not have: the device is wrong."""


class Ring:
    """What split and packed rings share. ``size`` descriptors, laid out from page-aligned ``gpa`` on, zeroed.

    ``table``, ``driver_area`` and ``device_area`` are guest-physical addresses; ``end`` is the first one after them.
    ``avail`` and ``used`` say where the driver offers and collects next.
    """

    packed = False

    def __init__(self, memory: Memory, size: int, *, gpa: int, event_idx: bool = False) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        driver_bytes, device_bytes = self._area_sizes()
        self.table = gpa
        self.driver_area = _up(gpa + 16 * size, 64)
        self.device_area = _up(self.driver_area + driver_bytes, 64)
        self.end = self.device_area + device_bytes
        memory.write(gpa, bytes(self.end - gpa))
        self.avail = self.used = 0
        self.chains: dict[int, int] = {}  # id of a chain the device has -> slots of it in the ring
        self._free_slots = size
        self._offered = 0  # slots, since wants_doorbell was asked

    def _area_sizes(self) -> tuple[int, int]:
        raise NotImplementedError

    def offer(self, pieces: Sequence[Piece], *, indirect: int | None = None) -> int:
        """Offer one chain; its id. ``indirect``: put a table of 16 bytes a piece at that address, and take one slot.

        Raises :class:`RingFull`. ``pieces`` are taken as they are, also where they break rules.
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
        """Whether the device asks for a doorbell for what was offered since this was last asked."""
        offered, self._offered = self._offered, 0
        return offered > 0 and self._wants_doorbell(offered)

    def _wants_doorbell(self, offered: int) -> bool:
        raise NotImplementedError

    @property
    def waiting(self) -> bool:
        """Whether there is a buffer to collect."""
        raise NotImplementedError

    def collect(self) -> Used | None:
        """The next buffer that came back, if there is one. Raises :class:`BadUsed`."""
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
        """Ask for no interrupts (a wish; with event_idx in a split ring there is nothing to say)."""
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
        self._store16(self.driver_area + 2, self.avail)  # after all it makes available
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
        """Ask for no interrupts (a wish; with event_idx there is nothing to say)."""
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
        """The position ``slots`` further on, wrap counter included."""
        slot = (position & ~_WRAP) + slots
        return slot | position & _WRAP if slot < self.size else (slot - self.size) | ~position & _WRAP

    def _put(self, pieces: Sequence[Piece], more: int) -> int:
        id, position, placed = self._ids.pop(0), self.avail, []
        for n, piece in enumerate(pieces):
            flags = AVAIL if position & _WRAP else USED
            flags |= piece.write * WRITE | (n < len(pieces) - 1) * NEXT | more
            placed.append((self.table + 16 * (position & ~_WRAP), _PACKED.pack(piece.gpa, piece.size, id, flags)))
            position = self.advance(position, 1)
        for gpa, descriptor in reversed(placed):  # flags last of each, the first one's last of all (2.8.6)
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
        """Slots from one position forward to another, within two rounds."""
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
        """Ask for no interrupts."""
        self.memory.write(self.driver_area, struct.pack("<HH", 0, EVENTS_OFF))

    def arm(self) -> bool:
        """Ask for an interrupt with the next buffer that comes back; true: one is there already."""
        wish = (self.used, EVENTS_AT) if self.event_idx else (0, EVENTS_ON)
        self.memory.write(self.driver_area, struct.pack("<HH", *wish))
        return self.waiting


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# ---- a driver ----

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
"""Device status: virtio 1.2, 2.1."""

F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1, F_RING_PACKED, F_RING_RESET = (1 << bit for bit in (28, 29, 32, 34, 40))
"""Feature bits of every device: virtio 1.2, 6."""


class Transport(Protocol):
    """How a driver reaches a device: what virtio-mmio and virtio-pci have in common."""

    def device_id(self) -> int:
        """What kind of device it is (virtio 1.2, 5)."""

    def status(self) -> int:
        """The device status."""

    def set_status(self, status: int) -> None:
        """Write the device status; 0 resets."""

    def features(self) -> int:
        """What the device offers, 64 bits."""

    def set_features(self, features: int) -> None:
        """What the driver accepts."""

    def queue_size(self, queue: int) -> int:
        """The largest size of a queue; 0: there is no such queue."""

    def set_queue(self, queue: int, ring: Ring) -> None:
        """Tell where a queue is, and enable it."""

    def reset_queue(self, queue: int) -> None:
        """Reset one queue (F_RING_RESET); returns when it is done."""

    def notify(self, queue: int) -> None:
        """Ring a doorbell."""

    def interrupts(self) -> int:
        """Read and acknowledge: 1: buffers came back; 2: the configuration changed."""

    def config(self, offset: int, size: int) -> bytes:
        """Bytes of the device's configuration space."""

    def set_config(self, offset: int, data: bytes) -> None:
        """Write bytes of it."""


class Bus(Protocol):
    """The part of :class:`vmm.bus.Bus` that registers are reached through."""

    def read(self, space: int, address: int, size: int, /) -> int:
        """One read as a vCPU makes it."""

    def write(self, space: int, address: int, size: int, value: int, /) -> None:
        """One write as a vCPU makes it."""


class MmioTransport:
    """virtio-mmio registers, version 2 (virtio 1.2, 4.2.2), at ``address`` on a bus.

    Raises ``ValueError`` when there are none.
    """

    def __init__(self, bus: Bus, address: int) -> None:
        self.bus = bus
        self.address = address
        if (self.read(0x000), self.read(0x004)) != (0x74726976, 2):
            raise ValueError(f"no virtio-mmio registers of version 2 at {address:#x}")

    def read(self, offset: int) -> int:
        """One register of 32 bits."""
        return self.bus.read(1, self.address + offset, 4)

    def write(self, offset: int, value: int) -> None:
        """Write one register."""
        self.bus.write(1, self.address + offset, 4, value)

    def device_id(self) -> int:
        """DeviceID."""
        return self.read(0x008)

    def status(self) -> int:
        """Status."""
        return self.read(0x070)

    def set_status(self, status: int) -> None:
        """Status."""
        self.write(0x070, status)

    def features(self) -> int:
        """DeviceFeatures, both words."""
        words = []
        for select in (0, 1):
            self.write(0x014, select)
            words.append(self.read(0x010))
        return words[0] | words[1] << 32

    def set_features(self, features: int) -> None:
        """DriverFeatures, both words."""
        for select in (0, 1):
            self.write(0x024, select)
            self.write(0x020, features >> 32 * select & 0xFFFFFFFF)

    def queue_size(self, queue: int) -> int:
        """QueueNumMax."""
        self.write(0x030, queue)
        return self.read(0x034)

    def set_queue(self, queue: int, ring: Ring) -> None:
        """QueueNum, the three addresses, QueueReady."""
        self.write(0x030, queue)
        self.write(0x038, ring.size)
        for offset, gpa in ((0x080, ring.table), (0x090, ring.driver_area), (0x0A0, ring.device_area)):
            self.write(offset, gpa & 0xFFFFFFFF)
            self.write(offset + 4, gpa >> 32)
        self.write(0x044, 1)

    def reset_queue(self, queue: int) -> None:
        """QueueReset (4.2.2.2)."""
        self.write(0x030, queue)
        self.write(0x0C0, 1)
        while self.read(0x0C0):
            time.sleep(0.0001)

    def notify(self, queue: int) -> None:
        """QueueNotify."""
        self.write(0x050, queue)

    def interrupts(self) -> int:
        """InterruptStatus, then InterruptACK."""
        pending = self.read(0x060)
        if pending:
            self.write(0x064, pending)
        return pending

    def config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space, one by one."""
        return bytes(self.bus.read(1, self.address + 0x100 + offset + n, 1) for n in range(size))

    def set_config(self, offset: int, data: bytes) -> None:
        """Write bytes of it, one by one."""
        for n, byte in enumerate(data):
            self.bus.write(1, self.address + 0x100 + offset + n, 1, byte)


def _transport(machine: Any, attachment: Any) -> Transport:
    if machine.pci is None:
        return MmioTransport(machine.bus, attachment.base)
    from vmm.testing.pci import PciTransport

    return PciTransport(machine.bus, machine.pci.ecam, attachment.device.slot)


class Answer(NamedTuple):
    """What came back for a request: bytes the device says it wrote, and all the room it had, piece by piece."""

    written: int
    pieces: list[bytes]

    @property
    def data(self) -> bytes:
        """The pieces as one."""
        return b"".join(self.pieces)


class VirtioDriver:
    """Drives one device through its transport: reset, features, queues, requests.

    ``arena`` is guest memory (first address, end) for rings and buffers, which nothing else uses. Requests are asked
    one at a time (:meth:`request`) or many (:meth:`submit`, :meth:`kick`, :meth:`wait`).
    """

    def __init__(self, memory: Memory, transport: Transport, *, arena: tuple[int, int]) -> None:
        self.memory = memory
        self.transport = transport
        self.rings: dict[int, Ring] = {}
        self.agreed = 0
        self.interrupts = 0  # bits seen since start
        self._arena = arena
        self._free: list[tuple[int, int]] = []
        self._requests: dict[tuple[int, int], tuple[int, int, list[Piece]]] = {}  # (queue, id) -> memory, room

    @classmethod
    def of(cls, machine: Any, device: Any, *, arena: tuple[int, int] | None = None) -> VirtioDriver:
        """A driver for a virtio ``device`` of a machine that does not run.

        ``arena``: the upper half of its lowest region of memory, unless given; two drivers want one each. Raises
        ``ValueError`` when the device is not there.
        """
        for attachment in machine.bus.attachments.values():
            if attachment.space == 1 and getattr(attachment.device, "device", None) is device:
                gpa, size = machine.memory.regions[0]
                transport = _transport(machine, attachment)
                return cls(machine.memory, transport, arena=arena or (gpa + size // 2, gpa + size))
        raise ValueError(f"{device!r} is not in this machine: give it to Machine.add")

    # ---- life ----

    def start(
        self,
        *,
        features: int | None = None,
        packed: bool = False,
        event_idx: bool = True,
        indirect: bool = True,
        sizes: dict[int, int] | None = None,
        queues: Iterable[int] | None = None,
    ) -> int:
        """Reset, agree on features, set up queues, DRIVER_OK (virtio 1.2, 3.1.1). The features that were agreed.

        ``features``: the device's own bits to accept (``None``: all it offers). ``packed``, ``event_idx`` and
        ``indirect`` are asked for where offered. ``queues``: which to enable (``None``: all); ``sizes``: of some
        of them, else the largest. Raises ``RuntimeError`` when the device does not accept.
        """
        self.reset()
        self.transport.set_status(ACKNOWLEDGE)
        self.transport.set_status(ACKNOWLEDGE | DRIVER)
        offered = self.transport.features()
        common = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_RING_PACKED | F_RING_RESET
        wanted = F_VERSION_1 | F_RING_RESET | packed * F_RING_PACKED | event_idx * F_EVENT_IDX
        wanted |= indirect * F_INDIRECT_DESC
        self.agreed = offered & (wanted | (~common if features is None else features))
        self.transport.set_features(self.agreed)
        self.transport.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        if not self.transport.status() & FEATURES_OK:
            raise RuntimeError(f"the device does not accept features {self.agreed:#x} of {offered:#x}")
        for queue in self._queues() if queues is None else queues:
            self.enable(queue, (sizes or {}).get(queue))
        self.transport.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return self.agreed

    def reset(self) -> None:
        """Power-on state; every ring and request is forgotten."""
        self.transport.set_status(0)
        self.rings.clear()
        self._requests.clear()
        self._free = [self._arena]
        self.agreed = self.interrupts = 0

    def _queues(self) -> Iterable[int]:
        queue = 0
        while self.transport.queue_size(queue):
            yield queue
            queue += 1

    def enable(self, queue: int, size: int | None = None) -> Ring:
        """Lay a ring out in the arena and give it to the device."""
        kind = PackedRing if self.agreed & F_RING_PACKED else SplitRing
        size = size or self.transport.queue_size(queue)
        gpa = self.allocate(26 * size + 256)
        ring = kind(self.memory, size, gpa=gpa, event_idx=bool(self.agreed & F_EVENT_IDX))
        self.transport.set_queue(queue, ring)
        self.rings[queue] = ring
        return ring

    def reset_queue(self, queue: int) -> None:
        """Take one queue away from the device (F_RING_RESET); its requests are forgotten. :meth:`enable` follows."""
        self.transport.reset_queue(queue)
        del self.rings[queue]
        for key in [key for key in self._requests if key[0] == queue]:
            self._release(*self._requests.pop(key)[:2])

    @property
    def broken(self) -> bool:
        """Whether the device needs a reset."""
        return bool(self.transport.status() & NEEDS_RESET)

    # ---- guest memory ----

    def allocate(self, size: int) -> int:
        """``size`` bytes of the arena, on a page of their own. Raises ``MemoryError``."""
        size = _up(max(size, 1), 4096)
        for n, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[n] = (start + size, end)
                return start
        raise MemoryError(f"{size} bytes: the driver's arena is used up")

    def _release(self, gpa: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._free, (gpa, gpa + _up(max(size, 1), 4096))]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            elif start < end:
                merged.append((start, end))
        self._free = merged

    # ---- requests ----

    def submit(
        self, queue: int, data: Sequence[bytes] = (), room: Sequence[int] = (), *, indirect: bool = False
    ) -> int:
        """Offer a request: ``data`` for the device to read, then ``room`` for it to fill, a descriptor each; its id.

        Raises :class:`RingFull`. The device is not told: :meth:`kick`.
        """
        sizes = [*map(len, data), *room]
        table = _up(sum(sizes), 16)
        size = table + 16 * len(sizes)
        base = self.allocate(size)
        at, pieces = base, []
        for n, length in enumerate(sizes):
            pieces.append(Piece(at, length, n >= len(data)))
            self.memory.write(at, data[n] if n < len(data) else b"\xee" * length)  # so that what is unwritten shows
            at += length
        try:
            id = self.rings[queue].offer(pieces, indirect=base + table if indirect else None)
        except RingFull:
            self._release(base, size)
            raise
        self._requests[queue, id] = (base, size, pieces[len(data) :])
        return id

    def kick(self, queue: int, *, always: bool = False) -> bool:
        """Ring the doorbell if the device wants it, or ``always``; whether it was rung."""
        wanted = self.rings[queue].wants_doorbell()
        if wanted or always:
            self.transport.notify(queue)
        return wanted or always

    def collect(self, queue: int) -> dict[int, Answer]:
        """What has come back by now, by the ids of :meth:`submit`, in the order of the device."""
        answers = {}
        while used := self.rings[queue].collect():
            base, size, room = self._requests.pop((queue, used.id))
            answers[used.id] = Answer(used.written, [self.memory.read(piece.gpa, piece.size) for piece in room])
            self._release(base, size)
        return answers

    def wait(self, queue: int, count: int = 1, timeout: float = 5.0) -> dict[int, Answer]:
        """At least ``count`` answers, and those that come with them. Raises ``TimeoutError`` after ``timeout`` seconds,
        ``RuntimeError`` when the device needs a reset."""
        answers: dict[int, Answer] = {}
        self._until(lambda: answers.update(self.collect(queue)) or len(answers) >= count, timeout, f"queue {queue}")
        return answers

    def wait_interrupt(self, bits: int = 1, timeout: float = 5.0) -> None:
        """Wait until one of ``bits`` was raised since last asked (1: buffers, 2: configuration), acknowledging all."""

        def raised() -> bool:
            self.interrupts |= self.transport.interrupts()
            return bool(self.interrupts & bits)

        self._until(raised, timeout, "an interrupt", broken_is_an_end=not bits & 2)
        self.interrupts &= ~bits

    def _until(self, done: Any, timeout: float, what: str, *, broken_is_an_end: bool = True) -> None:
        deadline, pause = time.monotonic() + timeout, 0.00005
        while not done():
            if broken_is_an_end and self.broken and not done():
                raise RuntimeError("the device needs a reset")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout} s for {what}")
            time.sleep(pause)
            pause = min(2 * pause, 0.002)

    def request(
        self,
        queue: int,
        data: Sequence[bytes] = (),
        room: Sequence[int] = (),
        *,
        indirect: bool = False,
        timeout: float = 5.0,
    ) -> Answer:
        """One request there and back: :meth:`submit`, :meth:`kick`, :meth:`wait`. Others that come back with it are
        lost: do not mix it with :meth:`submit` on one queue."""
        id = self.submit(queue, data, room, indirect=indirect)
        self.rings[queue].arm()
        self.kick(queue)
        return self.wait(queue, timeout=timeout)[id]
