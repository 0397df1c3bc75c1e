"""Virtio devices' states: requests go over to another machine at any moment, none is lost and none is done twice."""

from __future__ import annotations

import contextlib
import socket
import struct
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm import Machine
from vmm.console.guest_end import HIGH_WATER, Console
from vmm.devices.virtio.balloon import Balloon
from vmm.devices.virtio.blk import Blk
from vmm.devices.virtio.console import VirtioConsole
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.fs import Fs, find_server
from vmm.devices.virtio.model import Request, VirtioModel
from vmm.devices.virtio.net import Net
from vmm.devices.virtio.rng import Rng
from vmm.devices.virtio.rng_model import RngModel
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import HostError, StateError
from vmm.net.end import End
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vmm.devices.device import State

ARENA = (8 << 20, 16 << 20)


# -- a device, its driver, and the way from one machine to the next ------------------------------------------------


@contextlib.contextmanager
def paused(machine: Machine) -> Iterator[None]:
    machine.pause()
    try:
        yield
    finally:
        machine.resume()


class Place:
    """A machine that does not run, one device in it, and everything of both that goes over to the next."""

    def __init__(self, transport: str, make: Callable[[Any], VirtioDevice]) -> None:
        self.machine = Machine(memory="16M", virtio=transport, rng=False)
        self.device = make(self.machine.native)
        self.machine.add(self.device)
        on_bus = (a.device for a in self.machine.bus.attachments.values())
        self.transport = next(device for device in on_bus if getattr(device, "device", None) is self.device)
        self.parts = [*([self.machine.pci] if self.machine.pci else []), self.transport]

    def save(self) -> tuple[list[State], bytes]:
        """With the machine held: what the device would do after it, it does twice."""
        states = [part.save() for part in self.parts]
        return states, self.machine.memory.read(ARENA[0], ARENA[1] - ARENA[0])

    def load(self, saved: tuple[list[State], bytes]) -> None:
        """The state is what it was: nothing happens while the machine is held."""
        with paused(self.machine):
            for part, state in zip(self.parts, saved[0], strict=True):
                part.load(state)
            self.machine.memory.write(ARENA[0], saved[1])
            assert [part.save() for part in self.parts] == saved[0]

    def again(self) -> None:
        """Its own state."""
        with paused(self.machine):
            self.load(self.save())

    def close(self) -> None:
        self.machine.close()


class Journey:
    """A device that is driven in one place after another."""

    def __init__(self, transport: str, make: Callable[[Any], VirtioDevice], **how: Any) -> None:
        self._make = partial(Place, transport, make)
        self.place = self._make()
        self.driver = VirtioDriver.of(self.place.machine, self.place.device, arena=ARENA)
        self.driver.start(**how)

    @property
    def device(self) -> Any:
        return self.place.device

    def move(self, before_close: Callable[[Any], None] = lambda device: None) -> None:
        self.place.machine.pause()
        saved = self.place.save()
        before_close(self.device)
        self.place.close()  # what is locked, like a disk, is free for the next
        self.place = self._make()
        self.place.load(saved)
        self._follow()

    def _follow(self) -> None:
        machine, driver = self.place.machine, self.driver
        driver.memory = machine.memory
        driver.transport = VirtioDriver.of(machine, self.device, arena=ARENA).transport
        for ring in driver.rings.values():
            ring.memory = machine.memory

    def close(self) -> None:
        self.place.close()


ACTS = st.lists(st.sampled_from(["offer", "offer", "offer", "kick", "wait", "move", "turn"]), max_size=14)


def travel(journey: Journey, queue: int, acts: list[str], request: Callable[[int], Any]) -> dict[int, Any]:
    """Drive the queue through the acts; ``request(n)`` is the n-th's data and room. Answers them by their number."""
    driver, waiting, answers = journey.driver, {}, {}
    offered = 0
    for act in [*acts, "end"]:
        match act:
            case "offer":
                data, room = request(offered)
                waiting[driver.submit(queue, data, room)] = offered
                offered += 1
            case "kick":
                driver.kick(queue)
            case "turn":  # to itself
                journey.place.again()
            case "move":
                journey.move()
            case "wait" | "end":
                driver.rings[queue].arm()
                driver.kick(queue, always=True)
                if waiting:
                    done = driver.wait(queue, len(waiting))
                    answers.update({waiting.pop(id): answer for id, answer in done.items()})
    assert not waiting and driver.collect(queue) == {}
    assert not driver.broken
    return answers


WHERE = pytest.mark.parametrize("transport", ["mmio", "pci"])
HOW = settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# -- devices ---------------------------------------------------------------------------------------------------------


class Numbered(VirtioModel):
    """Answers each request with a number of its own, counted over all machines; keeps some until it must let go."""

    name = "virtio-numbered"
    device_id = 42
    queue_sizes = (32,)
    configuration = b"numbered"

    def __init__(self, keep: int = 0) -> None:
        self.count, self.keep = 0, keep
        self.kept: list[Request] = []

    def handle(self, request: Request) -> None:
        if len(self.kept) < self.keep:
            request.later()
            self.kept.append(request)
        else:
            self.answer(request)

    def answer(self, request: Request) -> None:
        request.write(struct.pack("<I", self.count) + request.read())
        self.count += 1

    def quiesce(self) -> None:
        self.let_go()

    def let_go(self) -> None:
        kept, self.kept = self.kept, []
        for request in kept:
            self.answer(request)
            request.complete()

    def stopped(self) -> None:
        self.kept.clear()

    def save(self) -> State:
        return {"version": 1, "count": self.count}

    def load(self, state: State) -> None:
        self.count = state["count"]


@WHERE
@HOW
@given(packed=st.booleans(), acts=ACTS, keep=st.integers(0, 3))
def test_a_model_in_python_answers_each_request_once(transport: str, packed: bool, acts: list[str], keep: int) -> None:
    journey = Journey(transport, lambda vm: Numbered(keep), packed=packed)
    acts = [act for act in acts if act != "wait"][:10]  # what is kept would be waited for
    try:
        driver, numbers, offered, echoed = journey.driver, [], 0, set()
        for act in [*acts, "move", "move"]:
            if act == "offer" and offered < 8:
                driver.submit(0, [b"%03d" % offered], [7])
                offered += 1
            elif act == "kick":
                driver.kick(0)
            elif act == "move":
                journey.move()
            elif act == "turn":
                journey.place.again()
            for answer in driver.collect(0).values():
                numbers.append(int.from_bytes(answer.data[:4], "little"))
                echoed.add(answer.data[4:])
        while len(numbers) < offered:
            journey.device.keep = 0
            with paused(journey.place.machine):
                journey.device.let_go()
            for answer in driver.wait(0).values():
                numbers.append(int.from_bytes(answer.data[:4], "little"))
                echoed.add(answer.data[4:])
        assert sorted(numbers) == list(range(offered)) and journey.device.count == offered
        assert echoed == {b"%03d" % n for n in range(offered)}
    finally:
        journey.close()


@WHERE
@pytest.mark.parametrize("make", [Rng, lambda vm: RngModel()], ids=["native", "model"])
@HOW
@given(packed=st.booleans(), acts=ACTS, sizes=st.lists(st.integers(1, 5000), min_size=14, max_size=14))
def test_random_bytes(
    transport: str, make: Callable[[Any], VirtioDevice], packed: bool, acts: list[str], sizes: list[int]
) -> None:
    journey = Journey(transport, make, packed=packed)
    try:
        for n, answer in travel(journey, 0, acts, lambda n: ((), [sizes[n]])).items():
            assert answer.written == sizes[n]
    finally:
        journey.close()


@WHERE
@HOW
@given(packed=st.booleans(), acts=ACTS, writes=st.lists(st.integers(0, 7), min_size=14, max_size=14))
def test_a_disk_s_requests(transport: str, packed: bool, acts: list[str], writes: list[int], tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    journey = Journey(transport, lambda vm: Blk(vm, 0, image), packed=packed)

    def write(n: int) -> Any:  # each to a place of its own: requests under way have no order
        return [struct.pack("<IIQ", 1, 0, 8 * n), bytes([n + 1]) * 512 * (writes[n] + 1)], [1]

    try:
        answers = travel(journey, 0, acts, write)
        assert all(answer.data == b"\0" for answer in answers.values())
        for n in answers:
            got = journey.driver.request(0, [struct.pack("<IIQ", 0, 0, 8 * n)], [512 * (writes[n] + 1), 1])
            assert got.data == bytes([n + 1]) * 512 * (writes[n] + 1) + b"\0"
    finally:
        journey.close()


class Wire(End):
    """An end whose other side is the test's, also when the machine is gone."""

    offloads = True
    lasting = False

    def __init__(self) -> None:
        self.sides: list[socket.socket] = []

    def identity(self) -> str:
        return "wire"

    def connect(self, stop: int) -> socket.socket | None:
        ours, theirs = socket.socketpair()
        theirs.settimeout(5)
        self.sides.append(theirs)
        return ours

    def frames(self) -> list[int]:
        """First words of the frames that came through, in the order of the machines."""
        found = []
        for side in self.sides:
            data = bytearray()
            with contextlib.suppress(TimeoutError, BlockingIOError):
                side.setblocking(False)
                while more := side.recv(1 << 20):
                    data += more
            while data:
                size = int.from_bytes(data[:4], "big")
                found.append(int.from_bytes(data[16:20], "little"))
                del data[: 4 + size]
        return found


@WHERE
@HOW
@given(packed=st.booleans(), acts=ACTS)
def test_frames_on_their_way_out(transport: str, packed: bool, acts: list[str]) -> None:
    wire = Wire()
    journey = Journey(transport, lambda vm: Net(vm, 0, wire, mac="52:54:00:00:00:01"), packed=packed)
    try:
        answers = travel(journey, 1, acts, lambda n: ([bytes(12), struct.pack("<I", n) + bytes(60 + 100 * n)], ()))
        assert wire.frames() == list(range(len(answers)))
    finally:
        journey.close()


@WHERE
@HOW
@given(packed=st.booleans(), acts=ACTS, sizes=st.lists(st.integers(1, 9000), min_size=14, max_size=14))
def test_page_numbers_of_a_balloon(transport: str, packed: bool, acts: list[str], sizes: list[int]) -> None:
    counted = 0

    def count(device: Any) -> None:
        nonlocal counted
        counted += device.counters()["inflated"] // 4096

    journey = Journey(transport, Balloon, packed=packed)
    move, journey.move = journey.move, lambda *_: move(count)  # type: ignore[method-assign]
    try:
        pages = 0
        answers = travel(journey, 0, acts, lambda n: ([struct.pack("<I", 0x100 + n) * sizes[n]], ()))
        for n in answers:
            pages += sizes[n]
        count(journey.device)
        assert counted == pages
    finally:
        journey.close()


@pytest.fixture
def made() -> Iterator[list[Console]]:
    """A console for each machine, which outlives it."""
    consoles: list[Console] = []
    yield consoles
    for console in consoles:
        console.destroy()


def console_of(vm: Any, made: list[Console]) -> VirtioConsole:
    made.append(Console())
    made[-1].pumped(0)
    return VirtioConsole(vm, 0, made[-1], size=(80, 25))


@WHERE
@HOW
@given(packed=st.booleans(), acts=ACTS)
def test_bytes_to_a_console(transport: str, packed: bool, acts: list[str], made: list[Console]) -> None:
    output: list[bytes] = []
    journey = Journey(transport, lambda vm: console_of(vm, made), packed=packed)
    move, journey.move = journey.move, lambda *_: move(lambda _: output.append(made[-1].transcript))  # type: ignore[method-assign]
    try:
        answers = travel(journey, 1, acts, lambda n: ([b"%02d" % n * 70, b"." * n], ()))
        whole = b"".join(output) + made[-1].transcript
        assert whole == b"".join(b"%02d" % n * 70 + b"." * n for n in range(len(answers)))
    finally:
        journey.close()


# -- what each remembers ---------------------------------------------------------------------------------------------


@WHERE
def test_a_buffer_is_printed_on_from_its_middle(transport: str, made: list[Console]) -> None:
    journey = Journey(transport, lambda vm: console_of(vm, made))
    driver, text = journey.driver, bytes(range(256)) * 5000
    driver.submit(1, [text[: 1 << 20], text[1 << 20 :]])
    driver.kick(1)
    driver._until(lambda: made[0].end == HIGH_WATER, 5, "the console to fill")
    taken: list[bytes] = []
    journey.move(lambda _: taken.append(made[0].output(0, 2 * HIGH_WATER)[0]))
    driver.wait(1)
    assert taken[0] == text[:HIGH_WATER] and made[1].transcript == text[HIGH_WATER:]
    journey.close()


def test_a_terminal_of_another_size_is_told(made: list[Console]) -> None:
    journey = Journey("mmio", lambda vm: console_of(vm, made))
    journey.device.resize(100, 50)
    assert journey.driver.transport.config(0, 4) == struct.pack("<HH", 100, 50)
    journey.driver.transport.interrupts()
    journey.move()  # to a console of 80 by 25
    journey.driver.wait_interrupt(2)
    assert journey.driver.transport.config(0, 4) == struct.pack("<HH", 80, 25)
    journey.close()


def test_commands_to_a_network_interface_hold() -> None:
    wire = Wire()
    journey = Journey("pci", lambda vm: Net(vm, 0, wire, mac="52:54:00:00:00:01"))
    driver = journey.driver
    assert driver.request(2, [b"\1\1" + b"\2abcde"], room=[1]).data == b"\0"
    assert driver.request(2, [b"\0\1\1"], room=[1]).data == b"\0"
    assert driver.request(2, [b"\5\0" + struct.pack("<Q", 2)], room=[1]).data == b"\0"  # GUEST_CSUM alone
    before = journey.device.save()
    assert before["filter"] == 2 and before["accepted"] == 1
    journey.move()
    assert journey.device.save() == before and journey.device.mac == b"\2abcde".hex(":")
    journey.close()


def test_a_link_that_is_down_now_is_told_to_the_driver() -> None:
    wire = Wire()
    journey = Journey("mmio", lambda vm: Net(vm, 0, wire, mac="52:54:00:00:00:01"))
    with paused(journey.place.machine):
        saved = journey.place.save()
    assert journey.driver.transport.config(6, 2) == b"\1\0"
    journey.device.link_up = False
    journey.driver.wait_interrupt(2)
    journey.place.load(saved)
    journey.driver.wait_interrupt(2)
    assert journey.driver.transport.config(6, 2) == b"\0\0"
    journey.close()


def test_a_guest_with_connections_learns_that_they_are_gone(tmp_path: Path) -> None:
    cids = iter([9, 9, 10])
    paths = iter(str(tmp_path / name) for name in "abc")
    journey = Journey("pci", lambda vm: Vsock(vm, cid=next(cids), path=next(paths)))
    driver = journey.driver
    driver.submit(2, room=[4])
    driver.kick(2)
    journey.move()  # without a connection there is nothing to tell
    assert driver.request(1, [struct.pack("<QQIIIHHIII", 9, 2, 1000, 80, 0, 1, 1, 0, 4096, 0)]) is not None
    assert driver.request(0, room=[44]).data[30:32] == b"\3\0"  # nobody listens: RST
    assert driver.collect(2) == {}
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(journey.device.path)
        end.sendall(b"CONNECT 80\n")
        assert driver.request(0, room=[44]).data[30:32] == b"\1\0"
        journey.move()  # and the other machine has another address
        end.settimeout(5)
        assert end.recv(10) == b""
    assert next(iter(driver.wait(2).values())).data == b"\0\0\0\0"
    assert driver.transport.config(0, 8) == (10).to_bytes(8, "little")
    journey.close()


def test_a_held_request_names_its_device_and_a_disk_of_another_size_is_refused(tmp_path: Path) -> None:
    class Stubborn(Numbered):
        def quiesce(self) -> None:
            pass

    journey = Journey("mmio", lambda vm: Stubborn(keep=2))
    for _ in range(2):
        journey.driver.submit(0, [b"x"], [5])
    journey.driver.kick(0)
    journey.driver._until(lambda: len(journey.device.kept) == 2, 5, "two requests")
    with pytest.raises(StateError, match="virtio-numbered holds 2 requests of queue 0"):
        journey.place.save()
    journey.device.let_go()
    journey.place.save()
    journey.close()

    (tmp_path / "a").write_bytes(bytes(1 << 16))
    (tmp_path / "b").write_bytes(bytes(1 << 17))
    images = iter("ab")
    journey = Journey("mmio", lambda vm: Blk(vm, 0, tmp_path / next(images)))
    with pytest.raises(ValueError, match="virtio-blk0: the saved disk has 65536 bytes, this one 131072"):
        journey.move()
    assert not journey.device.driven  # refused, and reset
    journey.close()


def test_a_share_says_that_it_cannot_be_saved(tmp_path: Path) -> None:
    try:
        find_server()
    except HostError as error:
        pytest.skip(str(error))
    place = Place("mmio", lambda vm: Fs(vm, 0, tmp_path, "work"))
    for save in (place.save, place.transport.capture):
        with pytest.raises(StateError, match=r"a share cannot be saved.*take out the share 'work'"):
            save()
    place.close()


# -- hostile states --------------------------------------------------------------------------------------------------


def corrupted(value: Any, data: st.DataObject) -> Any:
    """The state with one leaf changed, one key missing or one too many."""
    if isinstance(value, dict):
        key = data.draw(st.sampled_from(sorted(value, key=str)))
        what = data.draw(st.sampled_from(["deeper", "deeper", "deeper", "missing", "extra"]))
        if what == "missing":
            return {k: v for k, v in value.items() if k != key}
        if what == "extra":
            return {**value, "extra": 1}
        return {**value, key: corrupted(value[key], data)}
    if isinstance(value, list) and value:
        n = data.draw(st.integers(0, len(value) - 1))
        return [*value[:n], corrupted(value[n], data), *value[n + 1 :]]
    if isinstance(value, bytes) and value:
        n = data.draw(st.integers(0, len(value) - 1))
        return value[:n] + bytes([data.draw(st.integers(0, 255))]) + value[n + 1 :]
    return data.draw(st.one_of(st.integers(-1, 1 << 64), st.sampled_from([None, "x", b"xx", [], {}, 1.5])))


@pytest.fixture(scope="module", params=["mmio", "pci"])
def target(request: pytest.FixtureRequest) -> Iterator[Journey]:
    journey = Journey(request.param, Balloon)
    yield journey
    journey.close()


@settings(max_examples=examples(250), deadline=None)
@given(data=st.data())
def test_any_state_is_taken_or_refused_and_the_device_works_after_a_reset(target: Journey, data: st.DataObject) -> None:
    place = target.place
    with paused(place.machine):
        for part in place.parts:
            wrong = corrupted(part.save(), data)
            with contextlib.suppress(ValueError):
                part.load(wrong)
    if place.machine.pci:
        place.machine.pci.reset()
        target._follow()  # which has the BAR decode again
    target.driver.start()
    assert target.driver.request(1, [b"\0\1\0\0"]).written == 0


# -- pages -----------------------------------------------------------------------------------------------------------


def changed_pages(before: bytes, after: bytes) -> set[int]:
    return {at for at in range(0, len(before), 4096) if before[at : at + 4096] != after[at : at + 4096]}


@pytest.mark.parametrize("packed", [False, True])
def test_every_page_a_device_changes_is_in_a_dirty_log(packed: bool, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(range(256)) * 4096)
    wire = Wire()
    work: list[tuple[Callable[[Any], VirtioDevice], int, list[bytes], list[int]]] = [
        (Rng, 0, [], [9000]),
        (lambda vm: RngModel(), 0, [], [9000]),
        (lambda vm: Blk(vm, 0, image), 0, [struct.pack("<IIQ", 0, 0, 0)], [40 << 10, 1]),
        (lambda vm: Blk(vm, 0, image), 0, [struct.pack("<IIQ", 8, 0, 0)], [5000, 1]),  # the id, and a status far off
        (lambda vm: Net(vm, 0, wire, mac="52:54:00:00:00:01"), 2, [b"\0\0\1"], [1]),
        (lambda vm: Numbered(), 0, [b"some"], [8]),
    ]
    for make, queue, data, room in work:
        journey = Journey("mmio", make, packed=packed)
        machine, driver = journey.place.machine, journey.driver
        with paused(machine):
            driver.rings[queue].arm()
            driver.submit(queue, data, room)
            log = machine.memory.dirty_log()
            before = machine.memory.read(0, 16 << 20)
        driver.kick(queue, always=True)
        driver._until(lambda: driver.rings[queue].waiting, 5, "an answer")  # noqa: B023
        with paused(machine):
            after = machine.memory.read(0, 16 << 20)
            log.collect()
            told = {page for gpa, size in log.take() for page in range(gpa, gpa + size, 4096)}
        changed = changed_pages(before, after)
        assert len(changed) >= 2 and changed <= told
        log.close()
        journey.close()


def test_pages_that_a_balloon_takes_are_changed_pages() -> None:
    journey = Journey("mmio", Balloon)
    machine = journey.place.machine
    machine.memory.write(0x100000, b"content")
    log = machine.memory.dirty_log()
    journey.driver.request(0, [struct.pack("<I", 0x100)])
    assert machine.memory.read(0x100000, 7) == bytes(7)
    log.collect()
    assert any(gpa <= 0x100000 < gpa + size for gpa, size in log.take())
    log.close()
    journey.close()
