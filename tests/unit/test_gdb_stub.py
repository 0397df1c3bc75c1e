"""The stub against clients that send anything: no KVM, a machine of plain Python."""

from __future__ import annotations

import re
import socket
from typing import Any
from xml.etree import ElementTree

import pytest
from effort import bounded, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import ConfigError, LinearMemoryError
from vmm.observe.gdb import Session
from vmm.observe.gdb_packets import INTERRUPT, PACKET_SIZE, Reader, frame
from vmm.observe.gdb_registers import Registers

MEMORY = 0x10000
FPU = re.compile(r"st\d|xmm|mxcsr|f[cst]w|f[oid]p")


class FakeMemory:
    """64 KiB from address 0 on."""

    def __init__(self) -> None:
        self.bytes = bytearray(MEMORY)

    def read(self, linear: int, size: int) -> bytes:
        if not 0 <= linear <= linear + size <= MEMORY:
            raise LinearMemoryError(linear, "not mapped")
        return bytes(self.bytes[linear : linear + size])

    def write(self, linear: int, data: bytes) -> None:
        self.read(linear, len(data))
        self.bytes[linear : linear + len(data)] = data

    def readable(self, linear: int, size: int) -> int:
        return max(0, min(size, MEMORY - linear)) if linear >= 0 else 0


class FakeVcpu:
    """Registers in a dict."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.memory = FakeMemory()
        names = [register.ours for register in Registers(wide=True).table]
        self.values = {name: 0 for name in names if name not in ("", "ftag")}
        self.values["ftw"] = 0

    def registers(self) -> dict[str, int]:
        return {name: value for name, value in self.values.items() if not FPU.match(name)}

    def fpu(self) -> dict[str, int]:
        return {name: value for name, value in self.values.items() if name not in self.registers()}

    def set_registers(self, **values: int) -> None:
        assert values.keys() <= self.registers().keys()
        if any(value >> 64 for value in values.values()):
            raise ConfigError("a register has 64 bits")
        self.values.update(values)

    def set_fpu(self, **values: int) -> None:
        assert values.keys() <= self.fpu().keys()
        self.values.update(values)


class FakePoint:
    def __init__(self, points: list[FakePoint]) -> None:
        self.points = points
        points.append(self)

    def remove(self) -> None:
        self.points.remove(self)


class FakeMachine:
    """Two vCPUs; its own debugger; counts pauses."""

    def __init__(self) -> None:
        self.vcpus = [FakeVcpu(0), FakeVcpu(1)]
        self.debug = self
        self.points: list[FakePoint] = []
        self.pauses = 1
        self.stopped = False

    def pause(self) -> None:
        self.pauses += 1

    def resume(self) -> None:
        self.pauses -= 1

    def interrupt(self, code: int) -> None:
        self.stopped = True

    def go(self, *, step: Any = (), hold: Any = ()) -> None:
        self.pauses -= 1

    def breakpoint(self, address: int, *, hardware: bool, vcpu: Any) -> FakePoint:
        if address >= MEMORY:
            raise LinearMemoryError(address, "not mapped")
        return FakePoint(self.points)

    def watch(self, address: int, size: int, *, reads: bool) -> FakePoint:
        assert size in (1, 2, 4, 8) and address % size == 0
        if len(self.points) >= 4:
            raise ConfigError("none left")
        return FakePoint(self.points)


class Rig:
    """A session with both ends of its connection."""

    def __init__(self) -> None:
        self.machine = FakeMachine()
        self.client, server = socket.socketpair()
        self.client.settimeout(5)
        machine: Any = self.machine
        self.session = Session(machine, Registers(wide=True), server)
        self.server = server

    def send(self, data: bytes) -> bytes:
        """Everything the stub says to these bytes."""
        self.client.sendall(data)
        if not self.session.over:
            self.session.receive()
        said = b""
        self.client.setblocking(False)
        try:
            while part := self.client.recv(1 << 16):
                said += part
        except BlockingIOError:
            pass
        self.client.setblocking(True)
        return said

    def ask(self, payload: bytes) -> bytes:
        said = self.send(frame(payload)).lstrip(b"+")
        packets, _ = Reader().feed(said)
        return packets[0]

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def rig() -> Any:
    made = Rig()
    yield made
    made.close()


# ---- packets ----


@settings(max_examples=examples(300))
@given(st.lists(st.binary(max_size=40), max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=50))
def test_packets_come_through_whole_however_they_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"+".join(frame(payload) for payload in payloads)
    reader, packets, at, turn = Reader(), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        found, answers = reader.feed(stream[at : at + size])
        assert answers == b"+" * len(found)
        packets += found
        at, turn = at + size, turn + 1
    assert packets == payloads


@settings(max_examples=examples(300))
@given(st.binary(max_size=200), st.booleans())
def test_garbage_before_a_packet_costs_at_most_that_packet(garbage: bytes, acknowledge: bool) -> None:
    reader = Reader()
    reader.acknowledge = acknowledge
    reader.feed(garbage + b"#00")  # whatever it began has ended here
    packets, _ = reader.feed(frame(b"qC"))
    assert packets == [b"qC"]


def test_a_packet_without_end_is_dropped_and_memory_stays_bounded() -> None:
    reader = Reader()
    for _ in range(100):
        reader.feed(b"$" + b"m" * 5000)
        assert len(reader._buffer) <= 2 * PACKET_SIZE + 5010
    assert INTERRUPT in reader.feed(INTERRUPT + b"#00" + INTERRUPT)[0]


# ---- anything at all ----

_ODD = [b"0", b"1", b"-1", b"2", b"fff0", b"10000", b"ffffffffffffffff", b"", b"xyz", b"1" * 40]
_NUMBER = st.one_of(st.sampled_from(_ODD), st.integers(0, 1 << 65).map(lambda n: b"%x" % n))
_TEMPLATES = [
    b"?", b"g", b"G%s", b"p%s", b"P%s=%s", b"m%s,%s", b"M%s,%s:%s", b"X%s,%s:%s", b"Hg%s", b"Hc%s", b"T%s",
    b"Z%s,%s,%s",
    b"z%s,%s,%s", b"c%s", b"s%s", b"C%s", b"qC", b"qSupported:%s", b"qXfer:features:read:target.xml:%s,%s",
    b"qXfer:%s",
    b"qfThreadInfo", b"qThreadExtraInfo,%s", b"vCont?", b"vCont;c:%s", b"vCont;s:%s;c", b"vCont;%s", b"vMustReplyEmpty",
    b"qAttached", b"Q%s", b"!", b"%s",
]  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    template = draw(st.sampled_from(_TEMPLATES))
    payload = template % tuple(draw(_NUMBER) for _ in range(template.count(b"%s")))
    return draw(st.sampled_from([payload, payload, payload, payload[: len(payload) // 2], payload + b"\xff"]))


@settings(max_examples=examples(400, fuzzing=100_000), deadline=None)
@given(st.lists(requests(), min_size=1, max_size=12))
def test_every_request_is_answered_and_none_breaks_the_session(payloads: list[bytes]) -> None:
    rig = Rig()
    try:
        for payload in payloads:
            went_on = rig.session.standing
            with bounded():
                said = rig.send(frame(payload)).lstrip(b"+")
            if went_on and not rig.session.standing:
                assert said == b""  # the answer is the stop that comes
                assert rig.machine.pauses == 0
                assert rig.send(INTERRUPT).lstrip(b"+").startswith(b"$T02")
            else:
                assert said.startswith(b"$")
            assert rig.machine.pauses == 1
        rig.session.leave()
        assert rig.machine.points == []
        assert not rig.machine.stopped
    finally:
        rig.close()


@settings(max_examples=examples(300, fuzzing=100_000), deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=10))
def test_bytes_that_are_no_protocol_do_no_harm(chunks: list[bytes]) -> None:
    rig = Rig()
    try:
        for chunk in chunks:
            with bounded():
                rig.send(chunk)
        rig.send(b"#00" + INTERRUPT)
        if not rig.session.over:
            assert rig.ask(b"qC").startswith(b"QC")
    finally:
        rig.close()


# ---- answers ----


def test_memory_is_read_as_far_as_there_is_any(rig: Rig) -> None:
    rig.machine.vcpus[0].memory.bytes[-2:] = b"\x12\x34"
    assert rig.ask(b"mfffe,8") == b"1234"
    assert rig.ask(b"m10000,8") == b"E0e"
    assert len(rig.ask(b"m0,ffffffff")) == PACKET_SIZE


def test_memory_is_written_in_hex_and_in_binary(rig: Rig) -> None:
    assert rig.ask(b"M100,3:0a0b0c") == b"OK"
    assert rig.ask(b"X103,4:#$}*") == b"OK"
    assert rig.ask(b"m100,7") == b"0a0b0c23247d2a"
    assert rig.ask(b"X10000,0:") == b"OK"  # how gdb asks whether X is known


def test_registers_go_out_and_come_back_the_same(rig: Rig) -> None:
    vcpu = rig.machine.vcpus[1]
    vcpu.values.update(rax=0x1122334455667788, rip=0xFFFF800000000000, st7=1 << 79, xmm15=1 << 127, fs_base=5, cr4=0x20)
    vcpu.values["ftw"] = 0b10000001
    assert rig.ask(b"Hg2") == b"OK"
    before, packet = dict(vcpu.values), rig.ask(b"g")
    assert packet.startswith(b"8877665544332211")
    for name in vcpu.values:
        vcpu.values[name] = 0
    assert rig.ask(b"G" + packet) == b"OK"
    assert vcpu.values == before
    assert rig.ask(b"p10") == b"000000000080ffff"
    assert rig.ask(b"P10=0010000000000000") == b"OK"
    assert vcpu.values["rip"] == 0x1000


@pytest.mark.parametrize("wide", [True, False])
def test_the_description_is_xml_that_numbers_every_register_once(wide: bool) -> None:
    registers = Registers(wide)
    target = ElementTree.fromstring(registers.description().split(b'dtd">', 1)[1])
    found = {int(reg.attrib["regnum"]): reg for reg in target.iter("reg")}
    assert sorted(found) == list(range(len(registers.table)))
    for number, register in enumerate(registers.table):
        assert found[number].attrib["name"] == register.name
        assert int(found[number].attrib["bitsize"]) == register.bits
    assert found[8 if not wide else 16].attrib["name"] == ("rip" if wide else "eip")


def test_the_description_comes_in_pieces(rig: Rig) -> None:
    text, at = b"", 0
    while True:
        part = rig.ask(b"qXfer:features:read:target.xml:%x,200" % at)
        text += part[1:]
        at = len(text)
        if part[:1] == b"l":
            break
    assert text == Registers(wide=True).description()


def test_a_watchpoint_of_any_size_is_pieces_that_registers_can_watch_or_nothing(rig: Rig) -> None:
    assert rig.ask(b"Z2,1003,9") == b"OK"  # 1 + 4 + 4 bytes
    assert len(rig.machine.points) == 3
    assert rig.ask(b"Z2,2000,10") == b"E1c"
    assert len(rig.machine.points) == 3
    assert rig.ask(b"z2,1003,9") == b"OK"
    assert rig.machine.points == []


def test_while_the_machine_runs_only_an_interrupt_is_awaited(rig: Rig) -> None:
    rig.send(frame(b"vCont;c"))
    assert rig.ask(b"m0,1") == b"E16"
    assert rig.send(INTERRUPT).startswith(b"$T02thread:1;")
    assert rig.ask(b"m0,1") == b"00"


def test_going_on_at_an_address_sets_rip(rig: Rig) -> None:
    rig.send(frame(b"c1234"))
    assert rig.machine.vcpus[0].values["rip"] == 0x1234


def test_kill_ends_the_machine_and_the_session(rig: Rig) -> None:
    rig.send(frame(b"vKill;1"))
    assert rig.session.over and rig.machine.stopped
