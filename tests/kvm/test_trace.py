"""The exit trace of running guests: exactly what they did, in order, with names; switched on and off; overrun."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from vmm import host, layout
from vmm.devices.device import Device
from vmm.errors import ConfigError, StateError
from vmm.machine import Machine
from vmm.observe.recording import DOORBELL, INTERNAL_ERROR, INTERRUPT, IO, MMIO, REQUESTS, Recording

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    GuestPath = Callable[[str], str]

DEVICE = 0xD0000000
EXIT_WITH_5 = bytes.fromhex("b005 e6f4")  # mov al, 5; out 0xf4, al
PORT = 0x510

# The guest of most tests: every kind of access there is, then its end.
#   mov edi, DEVICE; mov dword [rdi+4], 0x11223344; mov rax, [rdi+8]; mov dx, PORT; mov al, 0x41; out dx, al;
#   in eax, dx; mov rsi, 0x200000; mov ecx, 3; rep outsb
ACCESSES = bytes.fromhex(
    "bf000000d0 c7470444332211 488b4708 66ba1005 b041 ee ed 48c7c600002000 b903000000 f36e"
) + EXIT_WITH_5  # fmt: skip


class Answering(Device):
    """Remembers accesses; a read is answered with 0x5a in each byte."""

    name = "answering"
    registers = {0: "data/command", 4: "control", 8: "status"}

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int, int, int]] = []
        self.on_write: Callable[[int], object] = lambda value: None

    def read(self, offset: int, size: int) -> int:
        value = int.from_bytes(b"\x5a" * size, "little")
        self.seen.append((False, offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((True, offset, size, value))
        self.on_write(value)


@pytest.fixture
def traced(tmp_path: Path) -> Any:
    """Makes a machine of long-mode code with the device at a port and at an address; closed in the end."""
    made: list[Machine] = []

    def make(code: bytes, **fields: Any) -> tuple[Machine, Answering]:
        path = tmp_path / f"flat{len(made)}.bin"
        path.write_bytes(code)
        machine = Machine(kernel=str(path), kind="flat", mode="long", memory="16M", **fields)
        made.append(machine)
        device = Answering()
        machine.attach(device, address=DEVICE, size=0x1000)
        machine.attach(device, port=PORT, size=8)
        machine.memory.write(0x200000, b"xyz")
        return machine, device

    yield make
    for machine in made:
        machine.close()


def test_the_events_of_a_guest_are_its_accesses_in_order(traced: Any) -> None:
    machine, device = traced(ACCESSES)
    with machine.trace() as trace:
        assert machine.run(timeout=120).code == 5
    events = trace.events
    mine = [event for event in events if trace.device(event) == "answering"]
    accesses = [tuple(event[field].item() for field in ("write", "register", "size", "value")) for event in mine]
    assert accesses[:4] == device.seen[:4]
    # A string instruction is one event, with the last value, or one for each byte: that is KVM's to decide.
    assert sum(int(event["count"]) for event in mine) == len(device.seen) == 7
    assert accesses[-1] == device.seen[-1] == (True, 0, 1, ord("z"))
    assert trace.describe(events[-1]) == "debug-exit exit <- 0x5"
    assert (events["vcpu"] == 0).all() and events["claimed"].all()
    assert (np.diff(events["time"]) > 0).all() and (events["duration"] > 0).all()
    assert not trace.missing


def test_events_have_the_names_of_devices_registers_and_instructions(traced: Any) -> None:
    machine, _ = traced(ACCESSES)
    with machine.trace() as trace:
        machine.run(timeout=120)
    said = [(trace.reason(e), trace.describe(e), trace.instruction(e)) for e in trace.events[:4]]
    assert said == [
        ("mmio", "answering control <- 0x11223344", "mov dword ptr [rdi + 4], 0x11223344"),
        ("mmio", "answering status -> 0x5a5a5a5a5a5a5a5a", "mov rax, qword ptr [rdi + 8]"),
        ("io", "answering command <- 0x41 'A'", "out dx, al"),
        ("io", "answering data -> 0x5a5a5a5a", "in eax, dx"),
    ]
    assert trace.instruction(trace.events[4]) == "rep outsb dx, byte ptr [rsi]"


def test_what_no_device_answers_is_in_the_trace_too(traced: Any) -> None:
    # in al, dx of a port that is nobody's
    machine, _ = traced(bytes.fromhex("66ba1806 ec") + EXIT_WITH_5)
    with machine.trace() as trace:
        machine.run(timeout=120)
    assert trace.describe(trace.events[0]) == "(unclaimed) 0x618 -> 0xff"
    assert not trace.events[0]["claimed"]


def test_an_elf_guest_s_own_symbols_name_where_it_was(guest: GuestPath) -> None:
    with Machine(kernel=guest("hello"), memory="16M") as machine, machine.trace() as trace:
        machine.run(timeout=120)
    written = [event for event in trace.events if event["write"] and trace.register(event) == "THR"]
    assert bytes(written_value(written)).startswith(b"Hello from long mode\n")
    assert trace.symbol(written[0]).startswith("print+0x")  # the machine is closed: the file is still there
    assert "uart THR <- 0x48 'H'" in trace.line(written[0])


def test_rip_is_right_after_instructions_that_pyvmm_completes(guest: GuestPath) -> None:
    native = host.findings().native
    words = "" if native else "counts=0 movbe=0"
    with Machine(kernel=guest("instructions"), memory="16M", append=words) as machine, machine.trace() as trace:
        assert machine.run(timeout=120).code == 0x10
    completed = [event for event in trace.events if event["reason"] == INTERNAL_ERROR]
    names = {trace.instruction(event).split()[0] for event in completed}
    assert native or {"popcnt", "ldmxcsr"} <= names
    ports = [event for event in trace.events if event["reason"] == IO]
    assert {trace.instruction(event).split()[0] for event in ports} == {"in", "out"}


def written_value(events: list[Any]) -> list[int]:
    return [int(event["value"]) for event in events]


def test_tracing_goes_on_and_off_while_the_guest_runs(traced: Any) -> None:
    # 1: mov dx, PORT; out dx, al; jmp 1b
    machine, _ = traced(bytes.fromhex("66ba1005 ee ebf9"))
    machine.start()
    lengths = []
    for _ in range(3):
        with machine.trace() as trace:
            with pytest.raises(StateError, match="traced already"):
                machine.trace()
            for _event in zip(range(10), trace, strict=False):
                pass
        lengths.append(len(trace))
        assert set(trace.events["reason"].tolist()) == {IO}
        before = len(trace)
        assert len(trace.collect()) == 0 and len(trace) == before  # off: nothing more comes
    assert min(lengths) >= 10
    assert machine.stop().reason == "stopped"


def test_iterating_follows_the_guest_to_its_end(traced: Any) -> None:
    machine, _ = traced(ACCESSES)
    trace = machine.trace()
    followed: list[str] = []
    reader = threading.Thread(target=lambda: followed.extend(trace.describe(event) for event in trace))
    reader.start()
    machine.run(timeout=120)
    reader.join(120)
    assert not reader.is_alive()
    trace.stop()
    assert followed == [trace.describe(event) for event in trace.events]
    assert followed[-1] == "debug-exit exit <- 0x5"


# mov ecx, N; mov dx, PORT; 1: mov eax, ecx; out dx, eax; dec ecx; jnz 1b
def counting(n: int) -> bytes:
    return b"\xb9" + struct.pack("<I", n) + bytes.fromhex("66ba1005 89c8 ef ffc9 75f9") + EXIT_WITH_5


def test_what_a_full_ring_lost_is_counted_and_the_newest_are_kept(traced: Any) -> None:
    machine, _ = traced(counting(1000))
    with machine.trace(capacity=64) as trace:
        machine.run(timeout=120)
    # 64, less the one a writer might have been at
    assert len(trace) == 64 and trace.lost == 1001 - 64
    assert trace.events["value"].tolist() == [*range(63, 0, -1), 5]
    assert trace.missing.startswith(f"{1001 - 64} events were lost")


def test_only_so_many_events_are_kept(traced: Any) -> None:
    machine, device = traced(counting(1000))
    trace = machine.trace(keep=100)
    device.on_write = lambda value: trace.collect() if value % 50 == 0 else None
    machine.run(timeout=120)
    trace.stop()
    assert 100 <= len(trace) <= 200 and trace.dropped == 1001 - len(trace) and trace.lost == 0
    assert trace.events["value"].tolist() == [*range(len(trace) - 1, 0, -1), 5]


def test_a_capacity_that_no_ring_can_have_is_refused(traced: Any) -> None:
    machine, _ = traced(ACCESSES)
    for capacity in (0, 63, 100, 1 << 25):
        with pytest.raises(ConfigError, match="power of two"):
            machine.trace(capacity=capacity)


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_virtio_s_doorbells_requests_and_interrupts_are_named(guest: GuestPath, transport: str) -> None:
    places = f"virtio_mmio.device=4K@{layout.VIRTIO_MMIO_START:#x}:{layout.VIRTIO_MMIO_GSIS[0]}"
    words = places if transport == "mmio" else "msix=1"
    settings: dict[str, Any] = {"append": words, "memory": "16M", "virtio": transport}
    with Machine(kernel=guest("virtio_irq"), **settings) as machine, machine.trace() as trace:
        assert machine.run(timeout=120).code == 0x10
        machine.pause()  # the guest may be quicker than the I/O thread, which writes an event behind the act
    said = {kind: [trace.describe(e) for e in trace.events if e["reason"] == kind]
            for kind in (DOORBELL, REQUESTS, INTERRUPT)}  # fmt: skip
    assert len(said[INTERRUPT]) == 8
    # While the I/O thread looks for more the guest need not ring; and a device may ring for itself.
    assert set(said[DOORBELL]) == {"virtio-rng0 QueueNotify 0"}
    assert set(said[INTERRUPT]) == {"virtio-rng0 interrupt queue 0"}
    served = [e for e in trace.events if e["reason"] == REQUESTS]
    assert sum(int(e["value"]) for e in served) == 8 and all(trace.thread(e) == "io" for e in served)
    registers = {trace.register(e) for e in trace.events if e["reason"] == MMIO and trace.device(e) == "virtio-rng0"}
    assert ("Status" if transport == "mmio" else "device_status") in registers


def test_every_vcpu_is_in_the_trace(guest: GuestPath) -> None:
    with Machine(kernel=guest("smp"), memory="16M", cpus=2) as machine, machine.trace() as trace:
        assert machine.run(timeout=120).code == 0x10
    assert {0, 1} >= set(np.unique(trace.events["vcpu"]).tolist()) >= {0}
    assert (np.diff(trace.events["time"]) >= 0).all()


def test_a_saved_trace_names_everything_without_the_machine(traced: Any, tmp_path: Path) -> None:
    machine, _ = traced(ACCESSES)
    with machine.trace() as trace:
        machine.run(timeout=120)
    lines = [trace.line(event) for event in trace.events]
    trace.save(str(tmp_path / "t.trace"))
    machine.close()
    loaded = Recording.load(str(tmp_path / "t.trace"))
    assert (loaded.events == trace.events).all()
    assert [loaded.line(event) for event in loaded.events] == lines
