"""virtio-net through its registers and rings: linked machines, lost peers, limits, and guests that know no rules."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm import Machine
from vmm.devices.virtio.net import Net
from vmm.errors import ConfigError, HostError
from vmm.net.end import End
from vmm.net.link import SocketLink, link
from vmm.net.passt import Passt
from vmm.parts import Net as NetPart
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEADER = struct.Struct("<BBHHHHH")
PLAIN = HEADER.pack(0, 0, 0, 0, 0, 0, 0)
RX, TX, CONTROL = 0, 1, 2
F_MRG_RXBUF, F_CTRL_VQ = 1 << 15, 1 << 17
F_GUEST_ANNOUNCE = 1 << 21
LINK_UP, ANNOUNCE = 1, 2
LOST = "virtio-net0: its host end is gone (Connection reset by peer); the link is down"


class Wire(End):
    """An end whose other side is the test's."""

    def __init__(self, offloads: bool = True, lasting: bool = False) -> None:
        self.offloads = offloads
        self.lasting = lasting
        self.theirs: socket.socket | None = None

    def identity(self) -> str:
        return "wire"

    def connect(self, stop: int) -> socket.socket | None:
        ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(5)
        return ours


def machine_with(end: End, **options: Any) -> tuple[Machine, Net, VirtioDriver]:
    machine = Machine(memory="16M", virtio="mmio", rng=False)
    try:
        net = Net(machine.native, 0, end, **options)
        machine.add(net)
        return machine, net, VirtioDriver.of(machine, net)
    except BaseException:
        machine.close()
        raise


def frame(n: int, size: int = 60) -> bytes:
    return bytes((n + i) & 0xFF for i in range(size))


def receive(wire: socket.socket) -> bytes:
    size = int.from_bytes(wire.recv(4, socket.MSG_WAITALL), "big")
    return wire.recv(size, socket.MSG_WAITALL)


def eventually(condition: Any, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_two_machines_on_a_link_exchange_frames(packed: bool) -> None:
    ends = link()
    (one, first, here), (other, second, there) = machine_with(ends[0]), machine_with(ends[1])
    with one:
        with other:
            here.start(packed=packed)
            there.start(packed=not packed)
            assert first.mac != second.mac
            ids = [there.submit(RX, room=[2000]) for _ in range(10)]
            there.kick(RX)
            for n in range(10):
                here.submit(TX, [PLAIN, frame(n, 60 + 100 * n)])
            here.kick(TX)
            answers = there.wait(RX, 10)
            got = [answers[id].data[: answers[id].written] for id in ids]
            assert got == [HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(n, 60 + 100 * n) for n in range(10)]
            assert first.statistics()[0]["frames_out"] == second.statistics()[0]["frames_in"] == 10
        eventually(lambda: one.messages == [LOST])


def test_two_machines_meet_at_a_socket_and_again_when_one_returns(tmp_path: Path) -> None:
    path = str(tmp_path / "link")
    one, first, here = machine_with(SocketLink(path))
    with one:
        here.start()
        assert not first.link_up
        macs = set()
        for round in range(2):
            other, second, there = machine_with(SocketLink(path))
            with other:
                macs.add(second.mac)
                there.start()
                eventually(lambda first=first, second=second: first.link_up and second.link_up)
                assert here.transport.config(6, 1)[0] == LINK_UP
                there.submit(RX, room=[2000])
                there.kick(RX)
                here.submit(TX, [PLAIN, frame(round)])
                here.kick(TX)
                (answer,) = there.wait(RX).values()
                assert answer.data[12:72] == frame(round)
            eventually(lambda first=first: not first.link_up)
            here.wait_interrupt(2)
            assert here.transport.config(6, 1)[0] == 0
        assert len(macs) == 1 and first.mac not in macs


def test_a_lost_end_that_lasts_comes_back_and_one_that_does_not_stays_lost() -> None:
    for lasting in (True, False):
        wire = Wire(lasting=lasting)
        machine, net, driver = machine_with(wire)
        with machine:
            driver.start()
            eventually(lambda net=net: net.link_up)
            before = wire.theirs
            assert before is not None
            before.close()
            if lasting:
                eventually(lambda wire=wire, before=before, net=net: wire.theirs is not before and net.link_up)
            else:
                eventually(lambda net=net: not net.link_up)
            assert len(machine.messages) == 1


def test_the_cable_can_be_pulled() -> None:
    machine, net, driver = machine_with(Wire())
    with machine:
        driver.start()
        net.link_up = False
        driver.wait_interrupt(2)
        assert not net.link_up
        driver.request(TX, [PLAIN, frame(1)])
        assert net.statistics()[0]["dropped_out"] == 1
        net.link_up = True
        driver.wait_interrupt(2)
        assert driver.transport.config(6, 1)[0] == LINK_UP


def test_a_driver_hears_that_its_machine_has_moved_and_says_that_it_does() -> None:
    for agrees in (True, False):
        machine, net, driver = machine_with(Wire())
        with machine:
            driver.start(features=F_CTRL_VQ | agrees * F_GUEST_ANNOUNCE)
            assert driver.transport.config(6, 1)[0] == LINK_UP
            net.announce()
            assert driver.transport.config(6, 1)[0] == LINK_UP | agrees * ANNOUNCE
            if agrees:
                driver.wait_interrupt(2)
            assert net.save()["announces"] == 5 * agrees
            ack = driver.request(CONTROL, [b"\3\0"], room=[1]).data
            assert ack == (b"\0" if agrees else b"\1")
            assert net.save()["announces"] == 4 * agrees


def test_a_machine_that_is_restored_as_itself_announces_where_it_is_and_a_copy_does_not(tmp_path: Path) -> None:
    link = NetPart("socket", socket=str(tmp_path / "link"))
    with Machine(
        memory="16M", kernel=str(halting(tmp_path)), kind="flat", mode="long", rng=False, nets=[link]
    ) as first:
        driver = VirtioDriver.of(first, first.virtio[0])
        driver.start()
        first.snapshot(tmp_path / "snapshot").close()
    for identity in ("same", "new"):
        with Machine.restore(tmp_path / "snapshot", identity=identity, nets=[link]) as again:
            assert again.virtio[0].save()["announces"] == 5 * (identity == "same")


def halting(folder: Path) -> Path:
    path = folder / "halt.bin"
    path.write_bytes(b"\xf4")
    return path


def test_offloads_are_offered_where_the_end_carries_headers() -> None:
    offloads = 0b11 | 0b11 << 7 | 1 << 9 | 0b11 << 11 | 1 << 13
    for carries in (True, False):
        machine, net, _ = machine_with(Wire(offloads=carries))
        with machine:
            assert (net.info()["offered"] & offloads) == (offloads if carries else 0)


def test_mac_and_mtu_are_told_and_several_queues_only_to_a_tap() -> None:
    machine, net, driver = machine_with(Wire(), mac="52:54:00:12:34:56", mtu=9000)
    with machine:
        assert net.mac == "52:54:00:12:34:56"
        assert struct.unpack("<HH", driver.transport.config(8, 4)) == (1, 9000)
        assert net.info()["offered"] & 1 << 3
    with pytest.raises(ConfigError, match=r"2 pairs of queues: a wire network has one.*tap=NAME"):
        machine_with(Wire(), queues=2)


def test_the_state_goes_over_to_another_device() -> None:
    machine, net, driver = machine_with(Wire())
    with machine:
        driver.start()
        assert driver.request(CONTROL, [b"\1\1" + b"\2abcde"], room=[1]).data == b"\0"
        assert driver.request(CONTROL, [b"\0\0\1"], room=[1]).data == b"\0"
        driven, state = net.save_driven(), net.save()
        assert driven["config"][:6] == b"\2abcde" and state["filter"] == 1
        other, twin, _ = machine_with(Wire())
        with other:
            other.memory.write(0, machine.memory.read(0, machine.memory.size))  # its rings are there
            twin.load_driven(driven)
            twin.load(state)
            assert twin.save() == state and twin.mac == net.mac
            for wrong in ({"pairs": 0}, {"pairs": 2}, {"accepted": 16}, {"filter": "x"}, {"announces": 6}):
                with pytest.raises(ValueError, match="virtio-net0"):
                    twin.load({**state, **wrong})


def test_frames_beyond_the_limit_wait() -> None:
    wire = Wire()
    machine, _, driver = machine_with(wire, pps=20)
    with machine:
        driver.start()
        assert wire.theirs is not None
        begun = time.monotonic()
        for n in range(26):
            driver.submit(TX, [PLAIN, frame(n)])
        driver.kick(TX)
        assert [receive(wire.theirs)[12:] for _ in range(26)] == [frame(n) for n in range(26)]
        assert time.monotonic() - begun > 0.2  # 20 at once, five or six at 20 a second


@pytest.fixture(scope="module")
def hostile() -> Iterator[tuple[Machine, Net, VirtioDriver, Wire]]:
    wire = Wire()
    machine, net, driver = machine_with(wire)
    with machine:
        yield machine, net, driver, wire


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=st.integers(0, (1 << 24) - 1),
    packed=st.booleans(),
    requests=st.lists(
        st.tuples(
            st.sampled_from([RX, TX, CONTROL]),
            st.lists(st.binary(min_size=1, max_size=80), max_size=3),
            st.lists(st.integers(1, 3000), max_size=3),
            st.booleans(),
        ),
        max_size=12,
    ),
    arriving=st.lists(st.tuples(st.binary(min_size=12, max_size=12), st.integers(14, 4000)), max_size=6),
)
def test_no_guest_and_no_peer_stops_the_device_for_the_next_driver(
    hostile: tuple[Machine, Net, VirtioDriver, Wire],
    features: int,
    packed: bool,
    requests: list[tuple[int, list[bytes], list[int], bool]],
    arriving: list[tuple[bytes, int]],
) -> None:
    machine, _, driver, wire = hostile
    assert wire.theirs is not None
    driver.start(packed=packed, features=features & driver.transport.features() | 1 << 32 | 1 << 28)
    for queue, data, room, indirect in requests:
        if queue in driver.rings and (data or room):
            driver.submit(queue, data, room, indirect=indirect)
            driver.kick(queue, always=True)
    for header, size in arriving:
        wire.theirs.sendall((12 + size).to_bytes(4, "big") + header + bytes(size))
    driver.start(packed=packed)
    wire.theirs.setblocking(False)
    end = b"the end" + bytes(60)
    driver.request(TX, [PLAIN, end])
    wire.theirs.settimeout(5)
    while (got := receive(wire.theirs))[12:] != end:
        flags, gso, _, size, start, offset, buffers = HEADER.unpack(got[:12])
        assert not flags & ~1 and not buffers
        assert not flags or 14 <= start <= len(got) - 12 - offset - 2
        assert not gso or (flags and size >= 48)
    assert machine.outcome is None


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is missing: apt-get install passt")
def test_a_passt_that_dies_is_started_again() -> None:
    try:
        machine, net, driver = machine_with(Passt())
    except HostError as error:
        pytest.skip(f"no passt here: {error}")
    with machine:
        driver.start()
        eventually(lambda: net.link_up)
        (pid,) = passts_of(os.getpid())
        os.kill(pid, signal.SIGKILL)
        driver.wait_interrupt(2)
        eventually(lambda: net.link_up and passts_of(os.getpid()) not in ([], [pid]))
        assert machine.messages == [LOST]
    eventually(lambda: passts_of(os.getpid()) == [])


def passts_of(owner: int) -> list[int]:
    """Processes of passt in the sessions this process started: by the socket that they share with it."""
    found = subprocess.run(["pgrep", "-x", "passt(\\.avx2)?"], capture_output=True, text=True, check=False)
    ours = []
    for word in found.stdout.split():
        try:
            with open(f"/proc/{word}/environ", "rb") as file:
                if f"PYVMM_TEST={owner}".encode() in file.read().split(b"\0"):
                    ours.append(int(word))
        except OSError:
            continue
    return ours


@pytest.fixture(autouse=True)
def mark_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_TEST", str(os.getpid()))
