"""The public ring driver and the native queues, each against the other, through a device's registers. No guest runs."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm import Machine
from vmm.devices.virtio.model import Request, VirtioModel
from vmm.testing.ring import F_RING_PACKED, INDIRECT, NEXT, WRITE, PackedRing, RingFull, VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
EVENTS = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])


class Echo(VirtioModel):
    """Answers every request with what it read, as far as there is room, and keeps it."""

    name = "virtio-echo"
    device_id = 42
    queue_sizes = (16, 256)
    configuration = bytes(range(8))

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def handle(self, request: Request) -> None:
        data = request.read()
        self.heard.append(data)
        request.write(data)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine(memory="64M", virtio="mmio", rng=False) as machine:
        machine.add(Echo())
        machine.add(Echo())
        yield machine


@pytest.fixture
def echo(machine: Machine) -> Echo:
    echo = machine.virtio[0]
    assert isinstance(echo, Echo)
    echo.heard.clear()
    return echo


@pytest.fixture
def driver(machine: Machine, echo: Echo) -> VirtioDriver:
    return VirtioDriver.of(machine, echo)


@KINDS
@EVENTS
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_requests_come_back(driver: VirtioDriver, echo: Echo, packed: bool, event_idx: bool, indirect: bool) -> None:
    agreed = driver.start(packed=packed, event_idx=event_idx)
    assert bool(agreed & F_RING_PACKED) == packed
    assert [driver.rings[queue].size for queue in (0, 1)] == [16, 256]
    for n in range(100):
        number = struct.pack("<I", n)
        answer = driver.request(n % 2, [number, b"", b"abc"], [5, 0, 10], indirect=indirect)
        assert (answer.written, answer.data) == (7, number + b"abc" + b"\xee" * 8)
    assert echo.heard == [struct.pack("<I", n) + b"abc" for n in range(100)]
    driver.wait_interrupt()


@KINDS
def test_many_are_in_flight(driver: VirtioDriver, packed: bool) -> None:
    driver.start(packed=packed)
    sent = {}
    with pytest.raises(RingFull):
        for n in range(17):
            sent[driver.submit(0, [bytes([n])], indirect=True)] = n
    assert len(sent) == 16
    assert driver.kick(0)
    assert driver.wait(0, 16).keys() == sent.keys()


def test_a_doorbell_is_not_asked_for_twice(driver: VirtioDriver) -> None:
    driver.start(event_idx=True)
    driver.request(0, [b"x"])
    ring = driver.rings[0]
    driver.submit(0, [b"x"])
    assert ring.wants_doorbell()
    driver.submit(0, [b"x"])
    assert not ring.wants_doorbell()
    driver.transport.notify(0)
    driver.wait(0, 2)


def test_configuration_is_read_and_changed(driver: VirtioDriver, echo: Echo) -> None:
    driver.start()
    assert driver.transport.config(0, 8) == bytes(range(8))
    echo.set_config(2, b"\xaa")
    driver.wait_interrupt(2)
    assert driver.transport.config(0, 8) == bytes([0, 1, 0xAA, *range(3, 8)])
    echo.set_config(2, b"\x02")


@KINDS
def test_one_queue_is_reset_and_the_other_goes_on(driver: VirtioDriver, packed: bool) -> None:
    driver.start(packed=packed)
    for _ in range(3):
        assert driver.request(0, [b"a"], [1]).data == b"a"
        driver.reset_queue(0)
        assert driver.request(1, [b"b"], [1]).data == b"b"
        driver.enable(0, 8)
        assert driver.request(0, [b"c"], [1]).data == b"c"
    assert not driver.broken


# ---- random chains ----

CHAINS = st.lists(
    st.tuples(
        st.lists(st.binary(max_size=40), max_size=6),
        st.lists(st.integers(0, 60), max_size=6),
        st.booleans(),
    ).filter(lambda chain: chain[0] or chain[1]),
    min_size=1,
    max_size=20,
)


def trying(number: int) -> settings:
    """Every example starts the driver anew, so the fixtures may live for all of them."""
    return settings(
        max_examples=examples(number), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


@KINDS
@trying(60)
@given(chains=CHAINS, event_idx=st.booleans(), size=st.sampled_from([8, 16]))
def test_random_legal_chains_come_back_intact(
    driver: VirtioDriver,
    echo: Echo,
    packed: bool,
    chains: list[tuple[list[bytes], list[int], bool]],
    event_idx: bool,
    size: int,
) -> None:
    echo.heard.clear()
    driver.start(packed=packed, event_idx=event_idx, sizes={0: size})
    sent: dict[int, tuple[list[bytes], list[int]]] = {}

    def take_back() -> None:
        driver.rings[0].arm()
        driver.kick(0)
        for id, answer in driver.wait(0, len(sent)).items():
            data, room = sent.pop(id)
            whole = b"".join(data)[: sum(room)]
            assert answer.written == len(whole)
            assert answer.data == whole + b"\xee" * (sum(room) - len(whole))
        assert not sent

    for data, room, indirect in chains:
        if not indirect and len(data) + len(room) > size:
            continue
        try:
            id = driver.submit(0, data, room, indirect=indirect)
        except RingFull:
            take_back()
            id = driver.submit(0, data, room, indirect=indirect)
        sent[id] = data, room
    if sent:
        take_back()
    assert not driver.broken


DESCRIPTORS = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 2**64 - 1), st.sampled_from([0, 0x2000, 64 << 20, 2**64 - 1, 2**32]), st.integers(0, 1 << 26)
        ),
        st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 64), st.just(16)),
        st.integers(0, 0xFFFF),
        st.one_of(st.integers(0, 0xFFFF), st.integers(0, 7).map(lambda low: low | 0x80), st.integers(0, 7)),
    ),
    min_size=1,
    max_size=16,
)


@KINDS
@trying(150)
@given(descriptors=DESCRIPTORS, index=st.one_of(st.integers(0, 0xFFFF), st.integers(1, 16)), table=DESCRIPTORS)
def test_random_descriptors_break_the_device_at_most(
    machine: Machine,
    driver: VirtioDriver,
    packed: bool,
    descriptors: list[tuple[int, int, int, int]],
    index: int,
    table: list[tuple[int, int, int, int]],
) -> None:
    # The second device is there to see that nothing of it reaches others. A model that fails would end the machine.
    other = VirtioDriver.of(machine, machine.virtio[1], arena=(16 << 20, 17 << 20))
    other.start(packed=packed)
    driver.start(packed=packed)
    ring = driver.rings[0]
    for n, (address, size, a, b) in enumerate(descriptors):
        fields = (address, size, a, b) if packed else (address, size, b, a % 20)
        driver.memory.write(ring.table + 16 * n, struct.pack("<QIHH", *fields))
    driver.memory.write(0x2000, b"".join(struct.pack("<QIHH", *entry) for entry in table))
    if not packed:
        driver.memory.write(ring.driver_area + 4, bytes(range(0, 2 * 16)))
        driver.memory.write(ring.driver_area + 2, struct.pack("<H", index))
    driver.kick(0, always=True)
    assert other.request(0, [b"still here"], [10]).data == b"still here"
    driver.start(packed=packed)
    assert not driver.broken
    assert driver.request(0, [b"again"], [5]).data == b"again"


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([(64 << 20, 1, 0)], "where there is no memory"),
        ([(0, 16, WRITE), (0, 16, 0)], "device-readable descriptor after"),
        ([(0x2000, 17, INDIRECT)], "no number of descriptors"),
        ([(0x2000, 16, INDIRECT | NEXT)], "indirect descriptor"),
    ],
)
@KINDS
def test_a_broken_rule_is_said_once_with_its_device_and_queue(
    machine: Machine, driver: VirtioDriver, echo: Echo, packed: bool, pieces: list[tuple[int, int, int]], words: str
) -> None:
    driver.start(packed=packed, sizes={1: 8})
    machine.messages.clear()
    ring = driver.rings[1]
    for n, (gpa, size, flags) in enumerate(pieces):
        flags |= NEXT if n + 1 < len(pieces) else 0
        fields = (gpa, size, 0, flags | 0x80) if packed else (gpa, size, flags, n + 1)
        driver.memory.write(ring.table + 16 * n, struct.pack("<QIHH", *fields))
    if not isinstance(ring, PackedRing):
        driver.memory.write(ring.driver_area + 2, b"\x01\x00")
    driver.kick(1, always=True)
    driver.wait_interrupt(2)
    assert driver.broken
    assert words in echo.info()["fault"]
    driver.kick(1, always=True)
    assert [message for message in machine.messages if "virtio-echo" in message and "queue 1" in message] == (
        machine.messages
    )
    assert len(machine.messages) == 1
