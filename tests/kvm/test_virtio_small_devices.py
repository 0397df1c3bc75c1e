"""Console, balloon and socket devices as Python has them, driven through their transport's registers."""

from __future__ import annotations

import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import Machine
from vmm.console import Console
from vmm.devices.virtio.balloon import MEMORY, Balloon
from vmm.devices.virtio.console import VirtioConsole
from vmm.devices.virtio.vsock import PATH_MAX, Vsock
from vmm.errors import ConfigError, HostError
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmm.devices.virtio.device import VirtioDevice

MIB = 1 << 20


class Rig:
    """A machine that does not run, with the three devices and a driver for each."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        vm = machine.native
        self.terminal = Console()
        self.path = str(folder / "v")
        self.console = VirtioConsole(vm, 0, self.terminal, size=(80, 25))
        self.balloon = Balloon(vm)
        self.vsock = Vsock(vm, cid=9, path=self.path)
        low, high = 4 * MIB, 16 * MIB
        self.drivers = {}
        for n, device in enumerate((self.console, self.balloon, self.vsock)):
            machine.add(device)
            arena = (low + n * 4 * MIB, min(low + (n + 1) * 4 * MIB, high))
            self.drivers[device.device_id] = VirtioDriver.of(machine, device, arena=arena)

    def start(self, device: VirtioDevice, **how: Any) -> VirtioDriver:
        driver = self.drivers[device.device_id]
        driver.start(**how)
        return driver


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Machine(memory="16M", virtio="mmio", rng=False) as machine:
        rig = Rig(machine, tmp_path_factory.mktemp("rig"))
        yield rig
    rig.terminal.destroy()
    assert not os.path.exists(rig.path)


# -- console --------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(25), deadline=None)
@given(
    st.booleans(),
    st.lists(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4), max_size=8),
    st.lists(st.binary(min_size=1, max_size=300), max_size=8),
)
def test_bytes_pass_in_order_however_they_are_cut(
    rig: Rig, packed: bool, printed: list[list[bytes]], typed: list[bytes]
) -> None:
    driver, start = rig.start(rig.console, packed=packed), rig.terminal.end
    for pieces in printed:
        driver.request(1, pieces)
    whole = b"".join(b"".join(pieces) for pieces in printed)
    assert rig.terminal.output(start, len(whole) + 1)[0] == whole

    for data in typed:
        rig.terminal.send(data)
    got = bytearray()
    while len(got) < sum(map(len, typed)):
        answer = driver.request(0, room=[7, 40])
        got += answer.data[: answer.written]
    assert got == b"".join(typed)


def test_size_and_state(rig: Rig) -> None:
    driver = rig.start(rig.console)
    assert driver.transport.config(0, 4) == struct.pack("<HH", 80, 25)
    rig.console.resize(100, 40)
    assert driver.transport.config(0, 4) == struct.pack("<HH", 100, 40)
    assert rig.console.save() == {"version": 1, "sent": 0}
    rig.console.load({"version": 1, "sent": 5})
    assert rig.console.save()["sent"] == 5
    for wrong in ({}, {"version": 1}, {"version": 1, "sent": -1}, {"version": 1, "sent": 1 << 32}):
        with pytest.raises(ValueError, match="virtio-console0"):
            rig.console.load(wrong)


# -- balloon --------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(25), deadline=None)
@given(st.booleans(), st.lists(st.integers(0, 0x1FFF) | st.integers(0, 0xFFFFFFFF), max_size=40))
def test_any_page_numbers_are_released_or_refused(rig: Rig, packed: bool, numbers: list[int]) -> None:
    # The machine has pages 0..0xfff; those of the drivers' arenas are left in peace.
    numbers = [n for n in numbers if not 0x400 <= n < 0x1000]
    driver, before = rig.start(rig.balloon, packed=packed), rig.balloon.counters()
    if numbers:
        driver.request(0, [struct.pack(f"<{len(numbers)}I", *numbers)])
    after = rig.balloon.counters()
    ram = sum(n < 0x1000 for n in numbers)
    assert after["inflated"] - before["inflated"] == len(numbers) * 4096
    assert after["released"] - before["released"] == ram * 4096
    assert after["refused"] - before["refused"] == (len(numbers) - ram) * 4096


def test_target_and_actual_are_bytes(rig: Rig) -> None:
    driver = rig.start(rig.balloon)
    rig.balloon.target = 2 * MIB
    assert driver.transport.config(0, 4) == struct.pack("<I", 512)
    driver.transport.set_config(4, struct.pack("<I", 300))
    assert (rig.balloon.target, rig.balloon.actual) == (2 * MIB, 300 * 4096)
    for wrong in (-4096, 4095, 1 << 50, 17 * MIB):
        with pytest.raises(ConfigError, match="balloon of"):
            rig.balloon.target = wrong
    state = rig.balloon.save()
    rig.balloon.target = 0
    rig.balloon.load(state)
    assert rig.balloon.target == 2 * MIB
    for wrong_state in ({**state, "target": 0x1001}, {**state, "progress3": 1 << 32}, {"version": 1}):
        with pytest.raises(ValueError, match="virtio-balloon0"):
            rig.balloon.load(wrong_state)


@settings(max_examples=examples(20), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, (1 << 64) - 1)), max_size=30))
def test_statistics_are_known_tags_of_the_newest_buffer(rig: Rig, entries: list[tuple[int, int]]) -> None:
    driver = rig.start(rig.balloon)
    with pytest.raises(HostError, match="no statistics"):
        rig.balloon.memory(0)
    driver.submit(2, [b"".join(struct.pack("<HQ", *entry) for entry in [(0, 0), *entries])])
    driver.kick(2)
    wanted = {MEMORY[tag]: value for tag, value in [(0, 0), *entries] if tag < len(MEMORY)}

    def answer() -> None:
        driver.wait(2)
        driver.submit(2, [b"".join(struct.pack("<HQ", *entry) for entry in [(0, 0), *entries])])
        driver.kick(2)

    guest = threading.Thread(target=answer)
    guest.start()
    assert rig.balloon.memory(20) == wanted
    guest.join()


# -- vsock ----------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<QQIIIHHIII")
REQUEST, RESPONSE, RST, SHUTDOWN, RW = 1, 2, 3, 4, 5


def packet(op: int, ports: tuple[int, int], data: bytes = b"", **odd: int) -> bytes:
    field = {"src": 9, "dst": 2, "type": 1, "flags": 0, "alloc": 1 << 20, "fwd": 0, "len": len(data), **odd}
    head = (field["src"], field["dst"], *ports, field["len"], field["type"], op)
    return HEADER.pack(*head, field["flags"], field["alloc"], field["fwd"]) + data


def test_a_stream_from_the_host_through_the_registers(rig: Rig) -> None:
    driver = rig.start(rig.vsock)
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(20)
        end.connect(rig.path)
        end.sendall(b"CONNECT 80\n")
        request = HEADER.unpack(driver.request(0, room=[44]).data)
        assert request[:2] == (2, 9) and request[3] == 80 and request[6] == REQUEST
        ports = (80, request[2])
        driver.request(1, [packet(RESPONSE, ports)])
        assert end.recv(64) == b"OK %d\n" % request[2]
        driver.request(1, [packet(RW, ports, b"hello"), b"beyond its length"])
        assert end.recv(64) == b"hello"
        end.sendall(b"answer")
        got = driver.request(0, room=[44, 100])
        assert got.data[44 : got.written] == b"answer"
        assert rig.vsock.connections()["now"] == 1
        rig.vsock.load(rig.vsock.save())
        assert end.recv(64) == b""
    assert driver.request(2, room=[4]).data == b"\0\0\0\0"
    assert rig.vsock.connections()["now"] == 0


@settings(max_examples=examples(40), deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.tuples(st.integers(0, 3), st.integers(0, 3)),
            st.binary(max_size=80),
            st.fixed_dictionaries(
                {},
                optional={
                    "src": st.integers(0, (1 << 64) - 1), "dst": st.integers(0, 4), "type": st.integers(0, 3),
                    "flags": st.integers(0, 7), "alloc": st.integers(0, (1 << 32) - 1), "len": st.integers(0, 200),
                },
            ),
        ),
        max_size=20,
    )
)  # fmt: skip
def test_any_packets_are_taken_refused_or_break_the_device_and_nothing_else(
    rig: Rig, packets: list[tuple[int, tuple[int, int], bytes, dict[str, int]]]
) -> None:
    driver = rig.start(rig.vsock)
    for _ in range(40):
        driver.submit(0, room=[44])
    driver.kick(0)
    refusals = 0
    for op, ports, data, odd in packets:
        lies = odd.get("len", len(data)) > len(data)
        try:
            driver.request(1, [packet(op, ports, data, **odd)])
        except RuntimeError:
            assert lies and driver.broken
            break
        assert not lies
        refusals += op != RST
    else:
        answers = driver.wait(0, refusals) if refusals else {}
        assert {HEADER.unpack(answer.data)[6] for answer in answers.values()} <= {RST}
        assert len(answers) == refusals  # no connection was ever there
    assert rig.vsock.connections()["now"] == 0


def test_what_is_in_the_way_is_said_in_a_sentence(rig: Rig, tmp_path: Path) -> None:
    vm: Any = object()  # refused before it is looked at
    taken = tmp_path / "file"
    taken.write_text("")
    for wrong, said in (
        ({"path": str(taken)}, "is a regular file, not a socket"),
        ({"path": rig.path}, "a program that is running"),
        ({"path": "/" + "x" * PATH_MAX}, "longer than"),
        ({"path": str(tmp_path / "v"), "cid": 2}, "not a guest's context id"),
    ):
        with pytest.raises(ConfigError, match=said):
            Vsock(vm, **wrong)
    with pytest.raises(ConfigError, match="No such file or directory"):
        Vsock(vm, path=str(tmp_path / "none" / "v"))


def test_a_socket_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "v")
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(path)
    with Machine(memory="16M", virtio="mmio", rng=False) as machine:
        machine.add(Vsock(machine.native, path=path))
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(path)
    assert not os.path.exists(path)
