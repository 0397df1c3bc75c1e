"""The public rings, byte for byte as virtio 1.2 has them, against a device that is written out by hand."""

from __future__ import annotations

import struct

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.testing.ring import (
    AVAIL,
    EVENTS_AT,
    EVENTS_OFF,
    EVENTS_ON,
    INDIRECT,
    NEXT,
    USED,
    WRITE,
    BadUsed,
    MmioTransport,
    PackedRing,
    Ring,
    RingFull,
    SplitRing,
    Used,
    readable,
    writable,
)

GPA = 0x1000
WRAP = 0x8000


class Memory:
    """A few pages from address 0."""

    def __init__(self) -> None:
        self.bytes = bytearray(b"\xcc" * 0x8000)

    def read(self, gpa: int, size: int) -> bytes:
        assert 0 <= gpa <= gpa + size <= len(self.bytes)
        return bytes(self.bytes[gpa : gpa + size])

    def write(self, gpa: int, data: bytes) -> None:
        assert 0 <= gpa <= gpa + len(data) <= len(self.bytes)
        self.bytes[gpa : gpa + len(data)] = data

    def words(self, gpa: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}H", self.read(gpa, 2 * count))

    def descriptor(self, gpa: int) -> tuple[int, ...]:
        return struct.unpack("<QIHH", self.read(gpa, 16))


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.mark.parametrize("kind", [SplitRing, PackedRing])
def test_a_ring_starts_zeroed_with_its_areas_aligned_and_apart(memory: Memory, kind: type[Ring]) -> None:
    ring = kind(memory, 16, gpa=GPA)
    assert not any(memory.bytes[GPA : ring.end])
    assert memory.bytes[ring.end] == memory.bytes[GPA - 1] == 0xCC
    assert ring.table == GPA
    assert ring.driver_area >= GPA + 16 * 16
    assert ring.device_area >= ring.driver_area + (4 if ring.packed else 6 + 2 * 16)
    assert ring.end >= ring.device_area + (4 if ring.packed else 6 + 8 * 16)
    assert ring.driver_area % 4 == ring.device_area % 4 == 0
    assert ring.collect() is None


# ---- split: 2.7.5, 2.7.6, 2.7.8 ----


def use_split(ring: SplitRing, memory: Memory, index: int, id: int, written: int) -> None:
    memory.write(ring.device_area + 4 + 8 * (index % ring.size), struct.pack("<II", id, written))
    memory.write(ring.device_area + 2, struct.pack("<H", index + 1 & 0xFFFF))


def test_a_split_chain_is_linked_and_made_available(memory: Memory) -> None:
    ring = SplitRing(memory, 4, gpa=GPA)
    assert ring.offer([readable(0x5000, 16), writable(0x6000, 512)]) == 0
    assert ring.offer([writable(0x7000, 1)]) == 2
    assert memory.descriptor(GPA) == (0x5000, 16, NEXT, 1)
    assert memory.descriptor(GPA + 16) == (0x6000, 512, WRITE, 0)
    assert memory.descriptor(GPA + 32) == (0x7000, 1, WRITE, 0)
    assert memory.words(ring.driver_area, 4) == (0, 2, 0, 2)  # flags, idx, ring
    with pytest.raises(RingFull, match="2 descriptors asked for, 1 of 4 are free"):
        ring.offer([readable(0, 1), readable(0, 1)])
    use_split(ring, memory, 0, 2, 1)
    assert ring.collect() == Used(2, 1)
    assert ring.collect() is None
    assert ring.offer([readable(0, 1), readable(0, 1)]) == 3  # 3 was free longer than 2
    assert memory.words(ring.driver_area, 5) == (0, 3, 0, 2, 3)


def test_a_split_table_is_a_chain_of_its_own(memory: Memory) -> None:
    ring = SplitRing(memory, 4, gpa=GPA)
    ring.offer([readable(1, 2), writable(3, 4)], indirect=0x5001)
    assert memory.descriptor(GPA) == (0x5001, 32, INDIRECT, 0)
    assert memory.descriptor(0x5001) == (1, 2, NEXT, 1)
    assert memory.descriptor(0x5011) == (3, 4, WRITE, 0)


@pytest.mark.parametrize(("event", "offered", "wants"), [(0, 1, True), (1, 1, False), (1, 2, True), (0xFFFF, 3, False)])
def test_a_split_device_asks_for_a_doorbell_by_index(memory: Memory, event: int, offered: int, wants: bool) -> None:
    ring = SplitRing(memory, 4, gpa=GPA, event_idx=True)
    memory.write(ring.device_area + 4 + 8 * 4, struct.pack("<H", event))
    for _ in range(offered):
        ring.offer([readable(0, 1)])
    assert ring.wants_doorbell() is wants
    assert not ring.wants_doorbell()  # nothing was offered since


def test_a_split_device_asks_for_a_doorbell_by_flag(memory: Memory) -> None:
    ring = SplitRing(memory, 4, gpa=GPA)
    ring.offer([readable(0, 1)])
    assert ring.wants_doorbell()
    memory.write(ring.device_area, b"\x01\x00")
    ring.offer([readable(0, 1)])
    assert not ring.wants_doorbell()


def test_a_split_driver_asks_for_interrupts(memory: Memory) -> None:
    ring = SplitRing(memory, 4, gpa=GPA)
    ring.suppress()
    assert memory.words(ring.driver_area, 1) == (1,)
    assert not ring.arm()
    assert memory.words(ring.driver_area, 1) == (0,)
    ring = SplitRing(memory, 4, gpa=GPA, event_idx=True)
    for n in range(5):
        id = ring.offer([readable(0, 1)])
        assert not ring.arm()
        assert memory.words(ring.driver_area + 4 + 2 * 4, 1) == (n,)  # used_event
        use_split(ring, memory, n, id, 0)
        assert ring.arm()
        assert ring.collect() == Used(id, 0)


# ---- packed: 2.8.1, 2.8.6, 2.8.10 ----


def test_a_packed_list_is_contiguous_and_wraps(memory: Memory) -> None:
    ring = PackedRing(memory, 3, gpa=GPA)
    assert ring.offer([readable(0x5000, 16), writable(0x6000, 512)]) == 0
    assert memory.descriptor(GPA) == (0x5000, 16, 0, AVAIL | NEXT)
    assert memory.descriptor(GPA + 16) == (0x6000, 512, 0, AVAIL | WRITE)
    with pytest.raises(RingFull):
        ring.offer([readable(0, 1)] * 2)
    memory.write(GPA, struct.pack("<QIHH", 0x5000, 100, 0, AVAIL | USED | WRITE))
    assert ring.collect() == Used(0, 100)
    assert ring.used == 2 | WRAP
    assert ring.offer([readable(1, 2), readable(3, 4), writable(5, 6)]) == 1
    assert memory.descriptor(GPA + 32) == (1, 2, 1, AVAIL | NEXT)
    assert memory.descriptor(GPA) == (3, 4, 1, USED | NEXT)  # the next round: AVAIL is 0, USED is not
    assert memory.descriptor(GPA + 16) == (5, 6, 1, USED | WRITE)
    assert ring.avail == 2
    memory.write(GPA + 32, struct.pack("<QIHH", 0, 6, 1, AVAIL | USED))
    assert ring.collect() == Used(1, 6)
    assert ring.used == 2
    assert ring.collect() is None


def test_a_packed_table_has_no_links(memory: Memory) -> None:
    ring = PackedRing(memory, 4, gpa=GPA)
    ring.offer([readable(1, 2), writable(3, 4)], indirect=0x5000)
    assert memory.descriptor(GPA) == (0x5000, 32, 0, AVAIL | INDIRECT)
    assert memory.descriptor(0x5000) == (1, 2, 0, 0)
    assert memory.descriptor(0x5010) == (3, 4, 0, WRITE)


@pytest.mark.parametrize(
    ("event", "flags", "wants"),
    [
        (0, EVENTS_ON, True),
        (0, EVENTS_OFF, False),
        (0 | WRAP, EVENTS_AT, True),
        (2 | WRAP, EVENTS_AT, True),
        (3 | WRAP, EVENTS_AT, False),
        (0, EVENTS_AT, False),  # not before the next round
    ],
)
def test_a_packed_device_asks_for_doorbells(memory: Memory, event: int, flags: int, wants: bool) -> None:
    ring = PackedRing(memory, 5, gpa=GPA, event_idx=True)
    memory.write(ring.device_area, struct.pack("<HH", event, flags))
    ring.offer([readable(0, 1)] * 3)
    assert ring.wants_doorbell() is wants


def test_a_packed_driver_asks_for_interrupts(memory: Memory) -> None:
    ring = PackedRing(memory, 5, gpa=GPA)
    ring.suppress()
    assert memory.words(ring.driver_area, 2) == (0, EVENTS_OFF)
    assert not ring.arm()
    assert memory.words(ring.driver_area, 2) == (0, EVENTS_ON)
    ring = PackedRing(memory, 5, gpa=GPA, event_idx=True)
    assert not ring.arm()
    assert memory.words(ring.driver_area, 2) == (0 | WRAP, EVENTS_AT)


@settings(max_examples=examples(100))
@given(size=st.integers(1, 9), steps=st.lists(st.integers(0, 9), max_size=60))
def test_packed_positions_count_as_two_rounds(size: int, steps: list[int]) -> None:
    ring = PackedRing(Memory(), size, gpa=GPA)
    position, gone = WRAP, 0
    for step in steps:
        step %= size + 1
        assert ring.distance(position, ring.advance(position, step)) == step
        position, gone = ring.advance(position, step), gone + step
        assert position == gone % size | (0 if gone // size % 2 else WRAP)


# ---- a device that is wrong ----


@pytest.mark.parametrize("id", [1, 7, 0xFFFF])
def test_a_buffer_the_device_does_not_have_is_noticed(memory: Memory, id: int) -> None:
    split, packed = SplitRing(memory, 4, gpa=GPA), PackedRing(memory, 4, gpa=GPA + 0x1000)
    for ring in (split, packed):
        assert ring.offer([readable(0, 1)]) == 0
    use_split(split, memory, 0, id, 0)
    memory.write(packed.table, struct.pack("<QIHH", 0, 0, id, AVAIL | USED))
    for ring in (split, packed):
        with pytest.raises(BadUsed, match=rf"buffer {id} came back, the device has \[0\]"):
            ring.collect()


def test_registers_that_are_not_virtio_mmio_are_refused() -> None:
    class Nothing:
        def read(self, space: int, address: int, size: int) -> int:
            return (1 << 8 * size) - 1

        def write(self, space: int, address: int, size: int, value: int) -> None:
            raise AssertionError("nothing is to be written where nothing is known to be")

    with pytest.raises(ValueError, match="no virtio-mmio registers of version 2 at 0xc0000000"):
        MmioTransport(Nothing(), 0xC0000000)
