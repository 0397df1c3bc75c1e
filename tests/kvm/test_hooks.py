"""Hooks: told of accesses and exits, allowed to change values, gone when removed; and what their exceptions do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vmm import layout
from vmm.devices.device import Device
from vmm.errors import BusError, ConfigError
from vmm.hooks import Access
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmm.cpu.vcpu import Exit
    from vmm.hooks import Access

DEVICE = 0xD0000000
UNCLAIMED_PORT = 0x5678
READ_DEVICE_AND_EXIT = bytes.fromhex("bf000000d0 8b07 e6f4")  # mov edi, DEVICE; mov eax, [rdi]; out 0xf4, al
SAY_A_AND_EXIT = bytes.fromhex("66baf803 b041 ee e6f4")  # mov dx, 0x3f8; mov al, 'A'; out dx, al; out 0xf4, al
# 1: out 0x80, al; mov [COUNTER], rax; inc rax; jmp 1b
PORT_80_FOR_EVER = bytes.fromhex("e680 4889042500002000 48ffc0 ebf1")


class Constant(Device):
    """Answers every read with the same number and remembers writes."""

    name = "constant"

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.taken: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.taken.append(value)


@pytest.fixture
def flat(tmp_path: Path) -> Any:
    """Makes machines that run the given long-mode code."""
    made: list[Machine] = []

    def make(code: bytes, **fields: Any) -> Machine:
        path = tmp_path / f"flat{len(made)}.bin"
        path.write_bytes(code)
        made.append(Machine(**{"kernel": str(path), "kind": "flat", "mode": "long", "memory": "16M", **fields}))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


def test_a_port_hook_sees_the_write_and_the_native_device_still_prints(flat: Any) -> None:
    machine = flat(SAY_A_AND_EXIT)
    seen: list[Access] = []
    machine.on_port(range(0x3F8, 0x400), seen.append)
    assert machine.run(timeout=120).code == ord("A")
    assert machine.console.transcript == b"A"
    assert [(a.vcpu, a.address, a.size, a.write, a.value) for a in seen] == [(0, 0x3F8, 1, True, ord("A"))]


def test_an_answer_that_is_no_number_is_said_to_be_none(flat: Any) -> None:
    machine = flat(SAY_A_AND_EXIT)
    machine.on_port(0x3F8, lambda access: "B")
    with pytest.raises(TypeError, match="a hook returned 'B': return a number, or None"):
        machine.run(timeout=60)


def test_a_write_is_replaced_before_the_device_sees_it(flat: Any) -> None:
    machine = flat(SAY_A_AND_EXIT)
    machine.on_port(0x3F8, lambda access: ord("B") if access.write else None)
    machine.run(timeout=120)
    assert machine.console.transcript == b"B"


def test_a_read_is_seen_with_the_device_s_answer_and_may_be_replaced(flat: Any) -> None:
    machine = flat(READ_DEVICE_AND_EXIT)
    device = Constant(5)
    machine.attach(device, address=DEVICE, size=8)
    seen: list[Access] = []

    def double(access: Access) -> int:
        seen.append(access)
        return access.value * 2

    machine.on_access(range(DEVICE, DEVICE + 8), double)
    assert machine.run(timeout=120).code == 10
    assert [(a.address, a.size, a.write, a.value) for a in seen] == [(DEVICE, 4, False, 5)]


def test_hooks_of_one_access_are_called_in_order_each_with_the_value_so_far(flat: Any) -> None:
    machine = flat(READ_DEVICE_AND_EXIT)
    machine.attach(Constant(5), address=DEVICE, size=8)
    machine.on_access(DEVICE, lambda access: access.value + 1)
    machine.on_access(range(DEVICE - 8, DEVICE + 1), lambda access: access.value * 2)
    assert machine.run(timeout=120).code == 12


def test_a_value_a_hook_answers_is_cut_to_the_size_of_the_access(flat: Any) -> None:
    machine = flat(READ_DEVICE_AND_EXIT)
    machine.on_access(DEVICE, lambda access: -1 << 32 | 7)
    assert machine.run(timeout=120).code == 7


def test_an_access_that_only_touches_the_hooked_byte_is_seen_whole(flat: Any) -> None:
    machine = flat(READ_DEVICE_AND_EXIT)
    machine.attach(Constant(0x01020304), address=DEVICE, size=8)
    seen: list[Access] = []
    beside: list[Access] = []
    machine.on_access(DEVICE + 3, seen.append)
    machine.on_access(DEVICE + 4, beside.append)
    machine.run(timeout=120)
    assert [(a.address, a.size, a.value) for a in seen] == [(DEVICE, 4, 0x01020304)]
    assert beside == []


def test_an_address_nobody_claims_can_be_hooked_and_answered(flat: Any) -> None:
    machine = flat(READ_DEVICE_AND_EXIT)
    values = []

    def note(access: Access) -> int:
        values.append(access.value)
        return 0x21

    machine.on_access(DEVICE, note)
    assert machine.run(timeout=120).code == 0x21
    assert values == [0xFFFFFFFF]


def test_a_removed_hook_is_not_called_again(flat: Any) -> None:
    machine = flat(PORT_80_FOR_EVER)
    calls: list[int] = []
    with machine.on_port(0x80, lambda access: calls.append(access.value)) as hook:
        machine.start()
        while len(calls) < 10:
            pass
    after = len(calls)
    counter = machine.memory.view(0x200000, 8)
    before = bytes(counter)
    while bytes(counter) == before:
        pass
    machine.stop()
    assert len(calls) == after
    hook.remove()  # twice is fine
    counter.release()


def test_a_hook_may_remove_itself_and_end_the_machine(flat: Any) -> None:
    machine = flat(PORT_80_FOR_EVER)
    calls = []

    def once(access: Access) -> None:
        calls.append(machine.vcpus[access.vcpu].registers()["rax"])
        hook.remove()
        machine.interrupt(0)

    hook = machine.on_port(0x80, once)
    assert machine.run(timeout=120).reason == "stopped"
    assert len(calls) == 1


def test_removing_after_close_does_nothing(flat: Any) -> None:
    machine = flat(SAY_A_AND_EXIT)
    hooks = [machine.on_port(0x3F8, lambda access: None), machine.on_exit("io", lambda vcpu, event: None)]
    machine.close()
    for hook in hooks:
        hook.remove()


def test_exits_of_the_asked_reasons_are_told_with_their_answer(flat: Any) -> None:
    machine = flat(READ_DEVICE_AND_EXIT)
    machine.attach(Constant(5), address=DEVICE, size=8)
    seen: list[tuple[int, Exit]] = []
    machine.on_exit(["mmio", "shutdown"], lambda vcpu, event: seen.append((vcpu, event)))
    machine.run(timeout=120)
    assert [(vcpu, e.reason, e.address, e.value, e.claimed) for vcpu, e in seen] == [(0, "mmio", DEVICE, 5, True)]


def test_a_triple_fault_is_told_before_the_machine_is_looked_at(flat: Any, tmp_path: Path) -> None:
    machine = flat(bytes.fromhex("0f0b"))  # ud2, with no IDT
    seen: list[str] = []
    machine.on_exit("shutdown", lambda vcpu, event: seen.append(event.reason))
    assert machine.run(timeout=120).reason == "triple-fault"
    assert seen == ["shutdown"]


@pytest.mark.parametrize("how", ["port", "exit"])
def test_an_exception_in_a_hook_comes_out_of_wait_as_itself_and_the_machine_can_be_looked_at(
    flat: Any, how: str
) -> None:
    machine = flat(SAY_A_AND_EXIT)
    error = LookupError("mine")

    def fail(*event: object) -> None:
        raise error

    if how == "port":
        machine.on_port(0x3F8, fail)
    else:
        machine.on_exit("io", fail)
    machine.start()
    with pytest.raises(LookupError) as caught:
        machine.wait(timeout=120)
    assert caught.value is error
    assert machine.outcome is not None
    assert machine.outcome.sentence == "code of a device or hook raised LookupError('mine')"
    registers = machine.vcpus[0].registers()
    assert layout.MIB < registers["rip"] <= layout.MIB + len(SAY_A_AND_EXIT)
    assert registers["rax"] & 0xFF == ord("A")


def test_every_vcpu_is_told_apart(guest: Callable[[str], str]) -> None:
    vcpus = set()
    with Machine(kernel=guest("smp"), memory="16M", cpus=2) as machine:
        machine.on_port(range(0x10000), lambda access: vcpus.add(access.vcpu))
        machine.run(timeout=120)
    assert 0 in vcpus <= {0, 1}


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda m: m.on_port(0x10000, print), BusError, "ports are 0 to 0xffff"),
        (lambda m: m.on_access(0x1000, print), BusError, "use watch"),
        (lambda m: m.on_port(range(8, 4), print), ConfigError, "ascending"),
        (lambda m: m.on_access(range(DEVICE, DEVICE + 8, 2), print), ConfigError, "ascending"),
        (lambda m: m.on_access(-1, print), ConfigError, "ascending"),
        (lambda m: m.on_exit("coffee", print), ConfigError, "no exit reason 'coffee'"),
    ],
)
def test_a_hook_that_cannot_be_is_refused_with_the_reason(flat: Any, call: Any, error: Any, why: str) -> None:
    with pytest.raises(error, match=why):
        call(flat(SAY_A_AND_EXIT))


def test_more_hooks_than_there_is_room_for_are_refused_and_room_comes_back(flat: Any) -> None:
    machine = flat(SAY_A_AND_EXIT)
    hooks = [machine.on_port(0x80, lambda access: None) for _ in range(64)]
    with pytest.raises(BusError, match="more than 64 hooks"):
        machine.on_port(0x80, lambda access: None)
    hooks[0].remove()
    machine.on_port(0x80, lambda access: None).remove()
