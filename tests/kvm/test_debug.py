"""Breakpoints, watchpoints and steps with Python callables, on bare-metal code."""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmm import layout
from vmm._ffi import check, ffi, lib
from vmm.errors import ConfigError, HostError, LinearMemoryError, StateError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.cpu.debug import Stop

    GuestPath = Callable[[str], str]

COUNTER = 0x200000
GPA = layout.MIB
LOOP, STORE, JUMP = GPA + 7, GPA + 10, GPA + 13

# xor eax, eax; mov edi, COUNTER; 1: inc rax; mov [rdi], rax; jmp 1b
COUNT = bytes.fromhex("31c0 bf00002000 48ffc0 488907 ebf8")
EXIT_WITH_5 = bytes.fromhex("b005 e6f4")  # mov al, 5; out 0xf4, al

SOFTWARE, HARDWARE, WRITE = (pytest.mark.stops(kind) for kind in ("breakpoint", "hardware", "write"))
EITHER = pytest.mark.parametrize(
    "hardware", [pytest.param(False, marks=SOFTWARE, id="software"), pytest.param(True, marks=HARDWARE, id="hardware")]
)


def symbols_of(path: str) -> dict[str, int]:
    from elftools.elf.elffile import ELFFile

    with open(path, "rb") as file:
        return {
            symbol.name: symbol["st_value"]
            for symbol in cast("Any", ELFFile(file).get_section_by_name(".symtab")).iter_symbols()
        }


@EITHER
def test_a_callback_sees_every_pass_and_may_change_registers(flat: Any, hardware: bool) -> None:
    machine = flat(COUNT)
    seen: list[int] = []
    done = threading.Event()

    def at_store(stop: Stop) -> object:
        rax = stop.vcpu.registers()["rax"]
        seen.append(rax)
        stop.vcpu.set_registers(rax=rax + 10)
        if len(seen) == 5:
            done.set()
            return False
        return None

    machine.breakpoint(STORE, at_store, hardware=hardware)
    machine.start()
    assert done.wait(120)
    assert seen == [1, 12, 23, 34, 45]
    assert int.from_bytes(machine.memory.read(COUNTER, 8), "little") == 44  # 45 + 10 is not stored yet
    machine.stop()


@SOFTWARE
def test_a_stop_without_a_callback_is_waited_for_and_gone_on_from(flat: Any) -> None:
    machine = flat(COUNT)
    machine.breakpoint(STORE)
    machine.start()
    for turn in range(1, 4):
        stop = machine.debug.wait(120)
        assert (stop.kind, stop.address, stop.vcpu.number) == ("breakpoint", STORE, 0)
        assert stop.vcpu.registers()["rax"] == turn
        machine.debug.go()
    assert machine.debug.wait(120).vcpu.registers()["rax"] == 4
    with pytest.raises(TimeoutError, match="came to no breakpoint"):
        machine.debug.wait(0.05)


@SOFTWARE
def test_steps_are_one_instruction_each_also_over_breakpoints(flat: Any) -> None:
    machine = flat(COUNT)
    for address in (LOOP, STORE):
        machine.breakpoint(address)
    machine.start()
    vcpu = machine.debug.wait(120).vcpu
    passed = [vcpu.registers()["rip"]]
    for _ in range(6):
        stop = machine.debug.step(vcpu)
        assert stop.kind == "step"
        passed.append(stop.address)
    assert passed == [LOOP, STORE, JUMP, LOOP, STORE, JUMP, LOOP]


@SOFTWARE
def test_what_a_breakpoint_replaced_is_what_readers_see_and_writers_change(flat: Any) -> None:
    machine = flat(COUNT)
    machine.load()
    first = machine.breakpoint(LOOP)
    second = machine.breakpoint(LOOP)
    assert machine.memory.view(LOOP, 1)[0] == 0xCC
    assert machine.memory.read(GPA, len(COUNT)) == COUNT
    assert machine.vcpus[0].memory.read(LOOP, 3) == COUNT[7:10]
    machine.memory.write(LOOP, b"\x90\x90\x90")
    assert machine.memory.view(LOOP, 3) == b"\xcc\x90\x90"
    assert machine.memory.read(LOOP, 3) == b"\x90\x90\x90"
    first.remove()
    assert machine.memory.view(LOOP, 1)[0] == 0xCC  # the other is there still
    second.remove()
    second.remove()
    assert machine.memory.view(LOOP, 1)[0] == 0x90


@SOFTWARE
def test_a_guest_that_writes_over_a_breakpoint_keeps_what_it_wrote(flat: Any) -> None:
    # mov byte [rip+2], 0x90 (the INT3's place); out
    machine = flat(bytes.fromhex("c6050400000090 b005 e6f4 f4 90"))
    machine.load()
    point = machine.breakpoint(GPA + 11)
    assert machine.memory.view(GPA + 11, 1)[0] == 0xCC
    assert machine.run(timeout=120).code == 5
    point.remove()
    assert machine.memory.read(GPA + 11, 1) == b"\x90"


@WRITE
def test_a_watchpoint_stops_behind_the_write_and_nothing_else(flat: Any) -> None:
    machine = flat(COUNT)
    values: list[tuple[int, int]] = []
    done = threading.Event()

    def written(stop: Stop) -> object:
        values.append((stop.vcpu.registers()["rip"], int.from_bytes(machine.memory.read(COUNTER, 8), "little")))
        if len(values) == 4:
            done.set()
        return len(values) < 4

    machine.watch(COUNTER, 8, written)
    machine.start()
    assert done.wait(120)
    assert values == [(JUMP, 1), (JUMP, 2), (JUMP, 3), (JUMP, 4)]


@SOFTWARE
def test_an_exception_in_a_callback_comes_out_of_wait_as_itself(flat: Any) -> None:
    raised = ValueError("in the callback")

    def fail(stop: Stop) -> object:
        raise raised

    machine = flat(COUNT)
    machine.breakpoint(STORE, fail)
    machine.start()
    with pytest.raises(ValueError, match="in the callback") as caught:
        machine.wait(timeout=120)
    assert caught.value is raised
    assert machine.vcpus[0].registers()["rip"] == STORE


@SOFTWARE
def test_a_removed_breakpoint_is_gone_from_a_running_machine(flat: Any) -> None:
    machine = flat(COUNT)
    hits: list[Stop] = []
    point = machine.breakpoint(STORE, hits.append)
    machine.start()
    while len(hits) < 3:
        time.sleep(0.001)
    point.remove()
    machine.pause()
    count, before = len(hits), int.from_bytes(machine.memory.read(COUNTER, 8), "little")
    machine.resume()
    deadline = time.monotonic() + 60
    while int.from_bytes(machine.memory.read(COUNTER, 8), "little") <= before + 100:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert len(hits) == count


@SOFTWARE
def test_a_guest_runs_to_its_end_under_a_breakpoint_it_passes(flat: Any) -> None:
    machine = flat(bytes.fromhex("b903000000 ffc9 75fc") + EXIT_WITH_5)  # mov ecx, 3; 1: dec ecx; jnz 1b
    passes: list[int] = []
    machine.breakpoint(GPA + 5, lambda stop: passes.append(stop.vcpu.registers()["rcx"]))
    outcome = machine.run(timeout=120)
    assert (outcome.reason, outcome.code) == ("debug-exit", 5)
    assert passes == [3, 2, 1]


@functools.cache
def told(guest: GuestPath, name: str) -> str:
    """What the guest is told to leave out so that it passes here without a debugger; skips where nothing helps."""
    for more in ("", " ac=0", " ac=0 idt_shift=4"):  # guests/traps/traps.c says which processors lack these
        append = f"iopl=0 user_int=0 counts=0 movbe=0{more}"
        with Machine(kernel=guest(name), memory="64M", append=append) as machine:
            if machine.run(timeout=60).status == 33:
                return append
            said = machine.console.tail(200).decode(errors="replace")
    pytest.skip(f"the guest fails on this host without a debugger, too: {said}")


@pytest.mark.parametrize("name", ["traps", "syscall", "instructions"])
@EITHER
def test_a_guest_s_own_exceptions_and_system_calls_stay_its_own(guest: GuestPath, name: str, hardware: bool) -> None:
    """The guest checks its #BP, single-step #DB, #PF and SYSCALL itself; a debugger has breakpoints meanwhile."""
    with Machine(kernel=guest(name), memory="64M", append=told(guest, name)) as machine:
        passed: list[int] = []
        symbols = symbols_of(guest(name))
        machine.breakpoint(symbols["cpu_init"], lambda stop: passed.append(stop.address), hardware=hardware)
        outcome = machine.run(timeout=120)
        assert outcome.status == 33, machine.console.transcript
        assert passed == [symbols["cpu_init"]]


@SOFTWARE
def test_every_vcpu_stands_at_a_stop(guest: GuestPath, meanwhile: Callable[[], None]) -> None:
    with Machine(kernel=guest("spin"), memory="16M", cpus=2) as machine:
        machine.breakpoint(machine.load().rip)
        machine.start()
        stop = machine.debug.wait(120)
        assert stop.vcpu.number == 0
        first = [vcpu.registers() for vcpu in machine.vcpus]
        meanwhile()
        assert [vcpu.registers() for vcpu in machine.vcpus] == first
        machine.stop()


@HARDWARE
@WRITE
def test_more_points_than_there_are_debug_registers_are_refused(flat: Any) -> None:
    machine = flat(COUNT)
    slots = machine.debug.slots
    assert slots in (2, 4)
    points = [machine.breakpoint(GPA + i, hardware=True) for i in range(slots)]
    machine.breakpoint(GPA, hardware=True)  # shares one
    with pytest.raises(ConfigError, match=f"all {slots} debug registers are in use"):
        machine.watch(COUNTER)
    points[1].remove()
    machine.watch(COUNTER)


@SOFTWARE
@WRITE
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: m.breakpoint(1 << 64), ConfigError, "not a 64-bit address"),
        (lambda m: m.breakpoint(0xFFFF800000000000), LinearMemoryError, "no breakpoint can be planted"),
        (lambda m: m.breakpoint(1 << 47), LinearMemoryError, "not canonical"),
        (lambda m: m.watch(COUNTER, 3), ConfigError, "1, 2, 4 or 8 bytes"),
        (lambda m: m.watch(COUNTER + 1, 2), ConfigError, "at a multiple of that"),
    ],
)
def test_impossible_points_are_refused_with_a_reason(flat: Any, call: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call(flat(COUNT))


@SOFTWARE
def test_a_breakpoint_that_cannot_be_planted_says_why_and_not_that_devices_overlap(flat: Any) -> None:
    machine = flat(COUNT)
    machine.debug.breakpoint(0x100000)
    original = ffi.new("uint8_t *")
    with pytest.raises(StateError, match="a breakpoint is at 0x100000 already"):
        check(lib.vmm_debug_plant(machine.native, 0x100000, original))
    gpas = range(0x200000, 0x200000 + 4095)
    for gpa in gpas:
        check(lib.vmm_debug_plant(machine.native, gpa, original))
    with pytest.raises(ConfigError, match="more than 4096 software breakpoints: that is as many as there can be"):
        check(lib.vmm_debug_plant(machine.native, 0x300000, original))
    for gpa in gpas:
        check(lib.vmm_debug_lift(machine.native, gpa, 0))


def test_closing_a_machine_that_stands_ends_who_waits(flat: Any) -> None:
    machine = flat(COUNT)
    debug = machine.debug
    waiting: list[BaseException] = []

    def wait() -> None:
        try:
            debug.wait(120)
        except StateError as error:
            waiting.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    machine.start()
    machine.close()
    thread.join(120)
    assert waiting and "closed" in str(waiting[0])


# ---- all four registers, CPL 3, several vCPUs ----


def all_registers(machine: Machine) -> None:
    if machine.debug.slots < 4:
        pytest.skip("the remedy for SYSCALL keeps two of the debug registers on this host")


@HARDWARE
def test_each_debug_register_stops_at_its_own_address(flat: Any) -> None:
    machine = flat(b"\x90" * 8 + EXIT_WITH_5)
    passed: list[int] = []
    addresses = [GPA + 1 + 2 * i for i in range(machine.debug.slots)]
    for address in reversed(addresses):
        machine.breakpoint(address, lambda stop: passed.append(stop.address), hardware=True)
    assert machine.run(timeout=120).code == 5
    assert passed == addresses


@HARDWARE
@WRITE
def test_breakpoints_watchpoints_and_steps_at_once_in_all_registers(flat: Any) -> None:
    machine = flat(COUNT)
    all_registers(machine)
    machine.breakpoint(LOOP, hardware=True)
    machine.breakpoint(JUMP, hardware=True)
    machine.watch(COUNTER, 4)
    machine.debug.watch(COUNTER + 4, 4, reads=True)
    machine.start()
    seen = []
    for _ in range(6):
        stop = machine.debug.wait(120)
        seen.append((stop.kind, stop.vcpu.registers()["rip"]))
        machine.debug.go()
    assert seen[0] == ("hardware", LOOP)
    assert ("hardware", JUMP) in seen
    assert all(rip == JUMP for kind, rip in seen if kind in ("write", "access"))
    assert {"write", "access"} & {kind for kind, _ in seen}
    vcpu = machine.debug.wait(120).vcpu
    before = vcpu.registers()["rip"]
    assert machine.debug.step(vcpu).vcpu.registers()["rip"] == {LOOP: STORE, STORE: JUMP, JUMP: LOOP}[before]


@WRITE
def test_an_access_watchpoint_stops_behind_reads_too(flat: Any) -> None:
    # mov edi, COUNTER; mov rax, [rdi]; nop; mov [rdi], rax; nop; out
    machine = flat(bytes.fromhex("bf00002000 488b07 90 488907 90") + EXIT_WITH_5)
    all_registers(machine)
    stops: list[tuple[str, int]] = []
    machine.debug.watch(COUNTER, 8, lambda stop: stops.append((stop.kind, stop.vcpu.registers()["rip"])), reads=True)
    assert machine.run(timeout=120).code == 5
    assert stops == [("access", GPA + 8), ("access", GPA + 12)]


@EITHER
def test_a_breakpoint_in_user_code_is_stopped_at_and_stepped_over(guest: GuestPath, hardware: bool) -> None:
    with Machine(kernel=guest("traps"), memory="64M", append=told(guest, "traps")) as machine:
        all_registers(machine)
        seen: list[tuple[int, int]] = []
        place = symbols_of(guest("traps"))["user_add"]

        def at_user_add(stop: Stop) -> None:
            seen.append((stop.address, stop.vcpu.registers()["cs"] & 3))

        machine.breakpoint(place, at_user_add, hardware=hardware)
        assert machine.run(timeout=120).status == 33, machine.console.transcript
        assert seen and set(seen) == {(place, 3)}


@EITHER
def test_each_of_several_vcpus_stops_at_the_same_breakpoint(guest: GuestPath, hardware: bool) -> None:
    with Machine(kernel=guest("smp"), memory="16M", cpus=3, append="cpus=3") as machine:
        seen: list[int] = []
        place = symbols_of(guest("smp"))["idt_load"]
        machine.breakpoint(place, lambda stop: seen.append(stop.vcpu.number), hardware=hardware)
        assert machine.run(timeout=120).status == 33, machine.console.transcript
        assert set(seen) >= {1, 2}  # what vCPU 0 calls may be inlined


# ---- a host whose KVM does not stop ----


@pytest.mark.parametrize(
    ("unstopped", "instead"),
    [
        (["breakpoint"], "set hardware breakpoints or watchpoints instead"),
        (["breakpoint", "hardware", "write"], "single steps work"),
    ],
)
def test_a_point_that_the_guest_would_run_past_is_refused(flat: Any, unstopped: list[str], instead: str) -> None:
    machine = flat(COUNT)
    machine.host.unstopped = unstopped
    with pytest.raises(HostError, match=f"does not stop a guest at software breakpoints .*: {instead}"):
        machine.breakpoint(STORE)
    assert machine.memory.view(STORE, 1)[0] == COUNT[STORE - GPA]
    if "write" in unstopped:
        with pytest.raises(HostError, match="watchpoints"):
            machine.debug.watch(COUNTER, 8, reads=True)
