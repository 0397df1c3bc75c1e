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

All code follows virtio 1.2; a test of a misbehaving driver writes to ``ring.table``, ``ring.driver_area`` and
``ring.device_area``. There are no fences: x86 keeps stores in order, and Python is slower than the store buffer.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.testing.rings import (
    AVAIL,
    EVENTS_AT,
    EVENTS_OFF,
    EVENTS_ON,
    INDIRECT,
    NEXT,
    USED,
    WRITE,
    BadUsed,
    Memory,
    PackedRing,
    Piece,
    Ring,
    RingFull,
    SplitRing,
    Used,
    readable,
    round_up,
    writable,
)
from vmm.testing.transport import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    FEATURES_OK,
    NEEDS_RESET,
    Bus,
    MmioTransport,
    Transport,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "ACKNOWLEDGE", "AVAIL", "DRIVER", "DRIVER_OK", "EVENTS_AT", "EVENTS_OFF", "EVENTS_ON", "FEATURES_OK", "F_EVENT_IDX",
    "F_INDIRECT_DESC", "F_RING_PACKED", "F_RING_RESET", "F_VERSION_1", "INDIRECT", "NEEDS_RESET", "NEXT", "USED",
    "WRITE", "Answer", "BadUsed", "Bus", "Memory", "MmioTransport", "PackedRing", "Piece", "Ring", "RingFull",
    "SplitRing", "Transport", "Used", "VirtioDriver", "readable", "writable",
]  # fmt: skip


def _transport(machine: Any, attachment: Any) -> Transport:
    if machine.pci is None:
        return MmioTransport(machine.bus, attachment.base)
    from vmm.testing.pci import PciTransport

    return PciTransport(machine.bus, machine.pci.ecam, attachment.device.slot)


class Answer(NamedTuple):
    """Reply to a request: the length that the device reports, and the content of each writable buffer."""

    written: int
    pieces: list[bytes]

    @property
    def data(self) -> bytes:
        """The buffers as one."""
        return b"".join(self.pieces)


class VirtioDriver:
    """Driver of one device, through its transport: reset, features, queues, requests.

    ``arena`` is guest memory (first address, end) for rings and buffers, used by nothing else. Send requests one at a
    time (:meth:`request`) or several (:meth:`submit`, :meth:`kick`, :meth:`wait`).
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
        """Return a driver for a virtio ``device`` of a machine that does not run.

        ``arena`` is by default the upper half of the lowest region of memory; two drivers need different ones. Raises
        ``ValueError`` if the machine does not have the device.
        """
        for attachment in machine.bus.attachments.values():
            if attachment.space == 1 and getattr(attachment.device, "device", None) is device:
                gpa, size = machine.memory.regions[0]
                transport = _transport(machine, attachment)
                return cls(machine.memory, transport, arena=arena or (gpa + size // 2, gpa + size))
        raise ValueError(f"{device!r} is not in this machine: give it to Machine.add")

    # ---- set-up ----

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
        """Reset, negotiate features, set up queues, DRIVER_OK (virtio 1.2, 3.1.1); return the negotiated features.

        ``features`` are the device's own bits to accept (``None``: all offered). ``packed``, ``event_idx`` and
        ``indirect`` are accepted if offered. ``queues`` are those to enable (``None``: all); ``sizes`` maps queues to
        sizes, by default the largest. Raises ``RuntimeError`` if the device does not set FEATURES_OK.
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
        """Reset the device, and drop every ring and request."""
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
        """Allocate a ring in the arena and enable the queue with it; return the ring."""
        kind = PackedRing if self.agreed & F_RING_PACKED else SplitRing
        size = size or self.transport.queue_size(queue)
        gpa = self.allocate(26 * size + 256)
        ring = kind(self.memory, size, gpa=gpa, event_idx=bool(self.agreed & F_EVENT_IDX))
        self.transport.set_queue(queue, ring)
        self.rings[queue] = ring
        return ring

    def reset_queue(self, queue: int) -> None:
        """Reset one queue (F_RING_RESET), and drop its requests. :meth:`enable` it again afterwards."""
        self.transport.reset_queue(queue)
        del self.rings[queue]
        for key in [key for key in self._requests if key[0] == queue]:
            self._release(*self._requests.pop(key)[:2])

    @property
    def broken(self) -> bool:
        """Whether the device reports DEVICE_NEEDS_RESET."""
        return bool(self.transport.status() & NEEDS_RESET)

    # ---- guest memory ----

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes of the arena on a page of their own; return the address. Raises ``MemoryError``."""
        size = round_up(max(size, 1), 4096)
        for n, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[n] = (start + size, end)
                return start
        raise MemoryError(f"{size} bytes: the driver's arena is used up")

    def _release(self, gpa: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._free, (gpa, gpa + round_up(max(size, 1), 4096))]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            elif start < end:
                merged.append((start, end))
        self._free = merged

    # ---- requests ----

    def submit(
        self, queue: int, data: Sequence[bytes] = (), room: Sequence[int] = (), *, indirect: bool = False
    ) -> int:
        """Make a request available; return its id. Each buffer in ``data`` (device-readable), then each length in
        ``room`` (device-writable), gets a descriptor.

        Raises :class:`RingFull`. It does not notify the device: see :meth:`kick`.
        """
        sizes = [*map(len, data), *room]
        table = round_up(sum(sizes), 16)
        size = table + 16 * len(sizes)
        base = self.allocate(size)
        at, pieces = base, []
        for n, length in enumerate(sizes):
            pieces.append(Piece(at, length, n >= len(data)))
            self.memory.write(at, data[n] if n < len(data) else b"\xee" * length)  # marks unwritten bytes
            at += length
        try:
            id = self.rings[queue].offer(pieces, indirect=base + table if indirect else None)
        except RingFull:
            self._release(base, size)
            raise
        self._requests[queue, id] = (base, size, pieces[len(data) :])
        return id

    def kick(self, queue: int, *, always: bool = False) -> bool:
        """Notify the device if it does not suppress that, or ``always``; return whether it was notified."""
        wanted = self.rings[queue].wants_doorbell()
        if wanted or always:
            self.transport.notify(queue)
        return wanted or always

    def collect(self, queue: int) -> dict[int, Answer]:
        """Return the replies so far by the ids of :meth:`submit`, in the device's order."""
        answers = {}
        while used := self.rings[queue].collect():
            base, size, room = self._requests.pop((queue, used.id))
            answers[used.id] = Answer(used.written, [self.memory.read(piece.gpa, piece.size) for piece in room])
            self._release(base, size)
        return answers

    def wait(self, queue: int, count: int = 1, timeout: float = 5.0) -> dict[int, Answer]:
        """Wait for at least ``count`` replies; return all that have arrived. Raises ``TimeoutError`` after ``timeout``
        seconds, ``RuntimeError`` if the device needs a reset."""
        answers: dict[int, Answer] = {}
        self._until(lambda: answers.update(self.collect(queue)) or len(answers) >= count, timeout, f"queue {queue}")
        return answers

    def wait_interrupt(self, bits: int = 1, timeout: float = 5.0) -> None:
        """Wait until one of ``bits`` was raised since the last call (1: buffers, 2: configuration); acknowledge all."""

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
        """Submit one request and return its reply: :meth:`submit`, :meth:`kick`, :meth:`wait`. Replies to others
        are dropped: do not mix it with :meth:`submit` on one queue."""
        id = self.submit(queue, data, room, indirect=indirect)
        self.rings[queue].arm()
        self.kick(queue)
        return self.wait(queue, timeout=timeout)[id]
