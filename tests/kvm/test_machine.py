"""The life of a machine: start, pause, stop, wait, close, from one thread and from several; and Python devices."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from vmm import layout
from vmm.devices.device import Device
from vmm.errors import BusError, ConfigError, GuestMemoryError, StateError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    GuestPath = Callable[[str], str]

DEVICE = 0xD0000000
COUNTER = 0x200000
GPA = layout.MIB  # where a flat binary in long mode starts

# xor eax, eax; mov edi, COUNTER; 1: inc rax; mov [rdi], rax; jmp 1b
COUNT = bytes.fromhex("31c0 bf00002000 48ffc0 488907 ebf8")
EXIT_WITH_5 = bytes.fromhex("b005 e6f4")  # mov al, 5; out 0xf4, al
POINT_AT_DEVICE = bytes.fromhex("bf000000d0")  # mov edi, DEVICE


def counted(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(COUNTER, 8), "little")


def wait_for_count(machine: Machine, more_than: int, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while counted(machine) <= more_than:
        assert time.monotonic() < deadline, "the guest does not run"
        time.sleep(0.002)
    return counted(machine)


class Recorder(Device):
    """Remembers every access, and answers reads with the offset of each byte."""

    name = "recorder"

    def __init__(self) -> None:
        self.accesses: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        value = int.from_bytes(bytes((offset + i) & 0xFF for i in range(size)), "little")
        self.accesses.append(("read", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


# ---- several machines ----


def test_two_machines_run_at_once_and_share_nothing(flat: Any) -> None:
    first, second = flat(COUNT), flat(COUNT)
    first.start()
    second.start()
    wait_for_count(first, 100)
    wait_for_count(second, 100)
    first.pause()
    held = counted(first)
    wait_for_count(second, counted(second) + 100)
    assert counted(first) == held
    first.resume()
    assert second.stop().reason == "stopped"
    wait_for_count(first, held)  # the other's end is not this one's
    assert first.stop().reason == "stopped"


def test_a_machine_after_another_in_the_same_process(guest: GuestPath) -> None:
    for _ in range(5):
        with Machine(kernel=guest("hello"), memory="16M") as machine:
            assert machine.run(timeout=120).status == 33
            assert machine.console.transcript.startswith(b"Hello from long mode\n")


# ---- pause and resume ----


def test_a_paused_vcpu_stands_between_two_instructions(flat: Any, meanwhile: Callable[[], None]) -> None:
    machine = flat(COUNT)
    machine.start()
    before = wait_for_count(machine, 100)
    seen = []
    for _ in range(3):
        machine.pause()
        registers = machine.vcpus[0].registers()
        assert registers["rax"] - counted(machine) in (0, 1)  # between INC and its store, or not
        assert GPA + 7 <= registers["rip"] <= GPA + 13
        meanwhile()
        assert machine.vcpus[0].registers() == registers
        seen.append(registers["rax"])
        machine.resume()
        wait_for_count(machine, seen[-1])
    assert before <= seen[0] < seen[1] < seen[2]


def test_pauses_nest(flat: Any, meanwhile: Callable[[], None]) -> None:
    machine = flat(COUNT)
    machine.start()
    wait_for_count(machine, 10)
    machine.pause()
    machine.pause()
    machine.resume()
    held = counted(machine)
    meanwhile()
    assert counted(machine) == held
    machine.resume()
    wait_for_count(machine, held)


class Holding(Device):
    """Keeps the vCPU that reads it until it is told to let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.let_go = threading.Event(), threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.entered.set()
        self.let_go.wait()
        return 1


def test_a_signal_ends_a_pause_that_a_device_holds_up(flat: Any) -> None:
    class Told(Exception):
        pass

    def told(number: int, frame: Any) -> None:
        raise Told

    machine, device = flat(POINT_AT_DEVICE + bytes.fromhex("8b07") + EXIT_WITH_5), Holding()  # mov eax, [rdi]
    machine.attach(device, address=DEVICE, size=4)
    machine.start()
    assert device.entered.wait(60)
    before = signal.signal(signal.SIGUSR1, told)
    soon = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with pytest.raises(Told):
            soon.start()
            machine.pause()
        assert not machine.paused
    finally:
        soon.join()
        signal.signal(signal.SIGUSR1, before)
        device.let_go.set()
    assert machine.wait(timeout=60).code == 5  # nothing of the pause is left


def test_registers_set_while_paused_are_what_the_guest_goes_on_with(flat: Any) -> None:
    machine = flat(COUNT)
    machine.start()
    wait_for_count(machine, 10)
    machine.pause()
    machine.vcpus[0].set_registers(rax=1 << 40)
    machine.resume()
    assert wait_for_count(machine, 1 << 40) < 1 << 41


def test_stop_while_paused_ends_the_machine(flat: Any) -> None:
    machine = flat(COUNT)
    machine.start()
    machine.pause()
    assert machine.stop().reason == "stopped"


def test_a_hundred_quick_cycles_of_pause_resume_and_stop(flat: Any) -> None:
    machine = flat(COUNT)
    for _ in range(100):
        machine.start()
        machine.pause()
        machine.resume()
        machine.pause()
        machine.resume()
        assert machine.stop().reason == "stopped"
    assert not machine.running


# ---- the end, and after it ----


def test_stop_from_another_thread_ends_wait(flat: Any) -> None:
    machine = flat(COUNT)
    ends: list[Any] = []
    for _ in range(20):
        machine.start()
        stopper = threading.Thread(target=lambda: ends.append(machine.stop()))
        stopper.start()
        outcome = machine.wait(timeout=120)
        stopper.join()
        assert outcome.reason == "stopped"
        assert ends.pop() is outcome  # both saw the same end


def test_stop_twice_is_the_same_end(flat: Any) -> None:
    machine = flat(COUNT)
    machine.start()
    first = machine.stop()
    assert machine.stop() is first
    assert machine.wait() is first


def test_wait_past_its_timeout_stops_the_machine(flat: Any) -> None:
    machine = flat(COUNT)
    machine.start()
    start = time.monotonic()
    outcome = machine.wait(timeout=0.1)
    assert 0.1 <= time.monotonic() - start < 5
    assert (outcome.reason, outcome.status, outcome.ok) == ("timeout", 124, False)
    assert not machine.running


def test_a_stopped_machine_goes_on_where_it_stood(flat: Any) -> None:
    machine = flat(COUNT)
    machine.start()
    wait_for_count(machine, 100)
    stopped_at = machine.stop().registers["rax"]
    machine.start()
    assert machine.running
    wait_for_count(machine, stopped_at)
    assert machine.stop().registers["rax"] > stopped_at


def test_close_while_running_frees_everything_and_twice_is_fine(flat: Any) -> None:
    machine = flat(COUNT)
    machine.start()
    wait_for_count(machine, 10)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("vcpu")]
    assert threads
    machine.close()
    machine.close()
    assert not any(thread.is_alive() for thread in threads)
    assert machine.outcome is not None and machine.outcome.reason == "stopped"
    for call in (
        machine.start, machine.pause, machine.resume, lambda: machine.interrupt(0), machine.vcpus[0].registers,
        lambda: machine.memory.read(0, 1), lambda: machine.console.transcript, lambda: machine.console.send("x"),
    ):  # fmt: skip
        with pytest.raises(StateError, match="closed"):
            call()


def test_calls_out_of_order_are_refused(flat: Any) -> None:
    machine = flat(COUNT)
    with pytest.raises(StateError, match="not started"):
        machine.wait()
    with pytest.raises(StateError, match="not started"):
        machine.stop()
    machine.start()
    with pytest.raises(StateError, match="runs already"):
        machine.start()


def test_a_triple_fault_is_an_outcome_with_its_registers(guest: GuestPath) -> None:
    with Machine(kernel=guest("triple_fault"), memory="16M") as machine:
        outcome = machine.run(timeout=120)
    assert (outcome.reason, outcome.status, outcome.vcpu) == ("triple-fault", 12, 0)
    assert outcome.instruction[:2] == b"\x0f\x0b"  # UD2, where RIP still stands


def test_an_emulation_failure_names_the_instruction(flat: Any) -> None:
    # FBLD from memory-mapped I/O: no KVM's emulator knows it, whoever runs the rest.
    machine = flat(POINT_AT_DEVICE + bytes.fromhex("df27") + EXIT_WITH_5, compat="off")
    outcome = machine.run(timeout=120)
    assert (outcome.reason, outcome.status) == ("emulation-failure", 14)
    assert outcome.instruction[:2] == b"\xdf\x27"
    assert outcome.registers["rip"] == GPA + len(POINT_AT_DEVICE)


# ---- devices in Python ----


def test_a_python_device_sees_offset_and_size_of_every_access(flat: Any) -> None:
    recorder = Recorder()
    code = POINT_AT_DEVICE + bytes.fromhex(
        "8b4704"  # mov eax, [rdi+4]
        "c647015a"  # mov byte [rdi+1], 0x5a
        "66c747023412"  # mov word [rdi+2], 0x1234
        "488b4708"  # mov rax, [rdi+8]
        "48894703"  # mov [rdi+3], rax
        "f4"  # hlt
    )
    machine = flat(code)
    machine.attach(recorder, address=DEVICE, size=0x2000)
    machine.start()
    deadline = time.monotonic() + 60
    while len(recorder.accesses) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    outcome = machine.stop()
    assert recorder.accesses == [
        ("read", 4, 4, 0x07060504),
        ("write", 1, 1, 0x5A),
        ("write", 2, 2, 0x1234),
        ("read", 8, 8, 0x0F0E0D0C0B0A0908),
        ("write", 3, 8, 0x0F0E0D0C0B0A0908),
    ]
    assert outcome.registers["rax"] == 0x0F0E0D0C0B0A0908


def test_an_access_across_a_page_reaches_the_device_in_two(flat: Any) -> None:
    recorder = Recorder()
    # mov rax, [rdi+0xffd]: three bytes on one page, five on the next
    machine = flat(POINT_AT_DEVICE + bytes.fromhex("488b87fd0f0000") + EXIT_WITH_5)
    machine.attach(recorder, address=DEVICE, size=0x2000)
    outcome = machine.run(timeout=120)
    bytes_read = [offset + i for _, offset, size, _ in recorder.accesses for i in range(size)]
    assert bytes_read == list(range(0xFFD, 0x1005))
    assert all(size in (1, 2, 4, 8) for _, _, size, _ in recorder.accesses)
    # AL was overwritten by the exit code
    assert outcome.registers["rax"] >> 8 == 0x04030201_00FFFEFD >> 8


def test_what_lies_past_a_device_reads_as_ones(flat: Any) -> None:
    recorder = Recorder()
    machine = flat(POINT_AT_DEVICE + bytes.fromhex("8b470e") + EXIT_WITH_5)  # mov eax, [rdi+14]
    machine.attach(recorder, address=DEVICE, size=16)
    outcome = machine.run(timeout=120)
    assert [offset + i for _, offset, size, _ in recorder.accesses for i in range(size)] == [14, 15]
    assert outcome.registers["rax"] >> 8 == 0xFFFF0F


class Refusal(Exception):
    pass


def test_an_exception_in_a_device_comes_out_of_wait_as_itself(flat: Any) -> None:
    raised = Refusal("offset 4")

    class Faulty(Device):
        def read(self, offset: int, size: int) -> int:
            raise raised

    machine = flat(POINT_AT_DEVICE + bytes.fromhex("8b4704") + EXIT_WITH_5)
    machine.attach(Faulty(), address=DEVICE, size=16)
    machine.start()
    with pytest.raises(Refusal) as caught:
        machine.wait(timeout=120)
    assert caught.value is raised
    # Stopped, and all of it can be looked at.
    assert machine.vcpus[0].registers()["rdi"] == DEVICE
    assert machine.memory.read(GPA, 5) == POINT_AT_DEVICE
    assert machine.wait().reason == "stopped"  # said once


def test_a_device_may_not_wait_for_its_own_machine(flat: Any) -> None:
    refused: list[StateError] = []

    class Impatient(Device):
        def read(self, offset: int, size: int) -> int:
            for call in (machine.stop, machine.wait, machine.close, machine.pause):
                try:
                    call()
                except StateError as error:
                    refused.append(error)
            machine.interrupt(0)
            return 0

    machine = flat(POINT_AT_DEVICE + bytes.fromhex("8b4704") + EXIT_WITH_5)
    machine.attach(Impatient(), address=DEVICE, size=16)
    machine.start()
    assert machine.wait(timeout=120).reason == "stopped"
    assert len(refused) == 4


@pytest.mark.parametrize("base", [DEVICE - 8, DEVICE, DEVICE + 15])
def test_a_device_over_another_is_refused(flat: Any, base: int) -> None:
    machine = flat(COUNT)
    machine.attach(Recorder(), address=DEVICE, size=16)
    with pytest.raises(BusError, match="choose a free range"):
        machine.attach(Recorder(), address=base, size=16)
    machine.attach(Recorder(), address=DEVICE + 16, size=16)


@pytest.mark.parametrize("base", [0, 0x1000, 16 * layout.MIB - 1])
def test_a_device_over_ram_is_refused(flat: Any, base: int) -> None:
    machine = flat(COUNT)
    with pytest.raises(BusError):
        machine.attach(Recorder(), address=base, size=16)


@pytest.mark.parametrize("where", [{"port": layout.COM1}, {"port": 0xFFFF}, {"address": (1 << 64) - 8}])
def test_a_device_on_taken_ports_or_beyond_the_space_is_refused(flat: Any, where: dict[str, int]) -> None:
    machine = flat(COUNT)
    with pytest.raises(BusError):
        machine.attach(Recorder(), size=16, **where)


@pytest.mark.parametrize("where", [{}, {"port": 0x700, "address": DEVICE}])
def test_a_device_is_attached_to_ports_or_to_addresses(flat: Any, where: dict[str, int]) -> None:
    machine = flat(COUNT)
    with pytest.raises(ConfigError, match="one of the two"):
        machine.attach(Recorder(), size=16, **where)


# ---- what a machine is made of ----


def test_more_vcpus_than_the_host_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="give --cpus 1 to"):
        Machine(cpus=1 << 20)


def test_memory_beyond_three_gigabytes_goes_on_above_the_hole() -> None:
    with Machine(memory="5G") as machine:
        assert machine.memory.regions == [(0, 3 << 30), (4 << 30, 2 << 30)]
        for gpa in (0, (3 << 30) - 8, 4 << 30, (6 << 30) - 8):
            machine.memory.write(gpa, b"8 bytes.")
            assert machine.memory.read(gpa, 8) == b"8 bytes."
        for gpa in (3 << 30, (3 << 30) - 4, (4 << 30) - 4, (6 << 30) - 4, 6 << 30):
            with pytest.raises(GuestMemoryError):
                machine.memory.read(gpa, 8)


def resident() -> int:
    """Proportional set size of this process, in bytes."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))


def test_memory_nobody_touched_costs_nothing(guest: GuestPath) -> None:
    with Machine(kernel=guest("hello"), memory="16M") as machine:
        machine.run(timeout=120)  # what the first machine of a process costs once
    before = resident()
    with Machine(kernel=guest("hello"), memory="5G") as machine:
        machine.run(timeout=120)
        assert resident() - before < 8 << 20


def test_a_search_finds_what_lies_across_its_pieces_and_may_be_ended(guest: GuestPath) -> None:
    with Machine(kernel=guest("hello"), memory="16M", rng=False) as machine:
        memory = machine.memory
        memory.fill(0x100000, 10 << 20, 1)
        places = [0x100000 + (4 << 20) - 3, 0x100000 + (8 << 20) - 1, 0x100000 + (10 << 20) - 6]
        for at in places:
            memory.write(at, b"needle")
        found, start = [], 0
        while (at_ := memory.search(b"needle", start)) is not None:
            found.append(at_)
            start = at_ + 1
        assert found == places
        assert memory.search(b"needle", 0, places[0] + 5) is None
        assert memory.search(b"needle", places[0] + 1, places[1] + 6) == places[1]
        looked: list[int] = []
        assert memory.search(b"needle", 0x100000, spend=looked.append) == places[0]
        assert sum(looked) == places[0] + 6 - 0x100000

        def refuse(n: int) -> None:
            raise KeyError(n)

        with pytest.raises(KeyError):
            memory.search(b"nothing of the kind", spend=refuse)
