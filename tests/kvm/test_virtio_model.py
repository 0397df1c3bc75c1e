"""virtio devices written in Python: later answers, resets in between, exceptions, requests that wait."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from vmm import Machine
from vmm.devices.virtio.model import Request, VirtioModel
from vmm.devices.virtio.rng_model import RngModel
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Iterator


class Later(VirtioModel):
    """Keeps every request until told otherwise."""

    name = "virtio-later"
    device_id = 42
    queue_sizes = (8,)

    def __init__(self) -> None:
        self.kept: list[Request] = []
        self.came, self.asked = threading.Semaphore(0), threading.Semaphore(0)
        self.held = False
        self.stops = 0

    def handle(self, request: Request) -> None:
        request.later()
        self.kept.append(request)
        self.came.release()

    def waits(self, queue: int) -> bool:
        self.asked.release()
        return self.held

    def stopped(self) -> None:
        self.stops += 1


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory="16M", virtio="mmio", rng=False) as machine:
        yield machine


def test_answers_in_any_order_from_any_thread(machine: Machine) -> None:
    later = Later()
    machine.add(later)
    driver = VirtioDriver.of(machine, later)
    driver.start()
    ids = [driver.submit(0, room=[4]) for _ in range(4)]
    driver.kick(0)
    for _ in ids:
        assert later.came.acquire(timeout=60)
    threads = []
    for n, request in enumerate(reversed(later.kept)):
        request.write(b"%03d!" % n)
        threads.append(threading.Thread(target=request.complete))
        threads[-1].start()
    answers = driver.wait(0, 4)
    for thread in threads:
        thread.join()
    assert [answers[id].data for id in ids] == [b"003!", b"002!", b"001!", b"000!"]


def test_an_answer_after_a_reset_goes_nowhere(machine: Machine) -> None:
    later = Later()
    machine.add(later)
    driver = VirtioDriver.of(machine, later)
    driver.start()
    driver.submit(0, room=[8])
    driver.kick(0)
    assert later.came.acquire(timeout=60)
    old = later.kept.pop()
    driver.start()
    assert later.stops == 1
    room = driver.submit(0, room=[8])
    driver.kick(0)
    assert later.came.acquire(timeout=60)
    assert old.write(b"too late") == 0
    assert old.read() == b""
    old.complete()
    assert driver.collect(0) == {}
    later.kept[0].write(b"in time!")
    later.kept[0].complete()
    later.kept[0].complete()  # once is all it takes
    assert driver.wait(0)[room].data == b"in time!"
    assert driver.collect(0) == {}


def test_requests_wait_in_the_ring_until_the_device_takes_them_up(machine: Machine) -> None:
    later = Later()
    machine.add(later)
    later.held = True
    driver = VirtioDriver.of(machine, later)
    driver.start()
    driver.submit(0, room=[1])
    driver.kick(0)
    assert later.asked.acquire(timeout=60)
    machine.pause()  # the I/O thread has come back from the device
    machine.resume()
    assert not later.kept
    later.held = False
    later.kick(0)
    assert later.came.acquire(timeout=60)
    assert later.queue_statistics()[0]["in_flight"] == 1


def test_an_exception_in_a_device_comes_out_of_the_run_as_itself(guest: object) -> None:
    class Broken(VirtioModel):
        name, device_id = "virtio-broken", 42

        def handle(self, request: Request) -> None:
            raise KeyError("of its own")

    with Machine(kernel=guest("spin"), memory="16M", virtio="mmio", rng=False) as machine:  # type: ignore[operator]
        broken = machine.add(Broken())
        driver = VirtioDriver.of(machine, broken)
        driver.start()
        machine.start()
        driver.submit(0, room=[1])
        driver.kick(0)
        with pytest.raises(KeyError, match="of its own"):
            machine.wait(timeout=120)


def test_what_a_request_holds_bounds_reading_and_writing(machine: Machine) -> None:
    class Echo(VirtioModel):
        name, device_id = "virtio-echo", 42

        def handle(self, request: Request) -> None:
            assert (request.readable, request.writable) == (6, 4)
            assert request.read(2) == b"ab"
            assert request.read(100) == b"cdef"
            assert request.read() == b""
            assert request.write(b"123") == 3
            assert request.write(b"456") == 1

    echo = machine.add(Echo())
    driver = VirtioDriver.of(machine, echo)
    driver.start()
    answer = driver.request(0, [b"abc", b"def"], [2, 2])
    assert (answer.written, answer.data) == (4, b"1234")


def test_the_rng_in_python_fills_what_it_may(machine: Machine) -> None:
    rng = machine.add(RngModel())
    driver = VirtioDriver.of(machine, rng)
    driver.start()
    assert driver.request(0, room=[100]).written == 100
    assert driver.request(0, room=[100000]).written == 65536


def test_a_device_after_the_image_is_too_late(guest: object) -> None:
    from vmm import StateError

    with Machine(kernel=guest("spin"), memory="16M") as machine:  # type: ignore[operator]
        machine.load()
        with pytest.raises(StateError, match="before the image is loaded"):
            machine.add(RngModel())
