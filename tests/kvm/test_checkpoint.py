"""Checkpoints and roll-back: memory, registers, devices and the console's input, again and again."""

from __future__ import annotations

import random
import select
from typing import TYPE_CHECKING, Any

import pytest

from vmm import host
from vmm._ffi import check, ffi, lib
from vmm.config import MachineConfig
from vmm.cpu.tiny_guest import TinyGuest
from vmm.errors import StateError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import Device

EXIT = bytes.fromhex("b010e6f4")  # mov al, 16; out 0xf4, al
HEAP = 0x300000
COUNT = 0x200000
SPIN = bytes.fromhex("ff042500002000ebf7")  # again: inc dword [0x200000]; jmp again


def store(address: int, value: int = 1) -> bytes:
    """mov dword [address], value"""
    return b"\xc7\x04\x25" + address.to_bytes(4, "little") + value.to_bytes(4, "little")


def device_of(machine: Machine, name: str) -> Device:
    return next(device for device in machine.devices if device.name == name)


def test_a_run_is_undone_and_can_be_run_again(flat: Callable[..., Machine]) -> None:
    machine = flat(b"".join(store(HEAP + 4096 * i, i + 1) for i in range(10)) + EXIT)
    before = machine.checkpoint()
    start = machine.vcpus[0].registers()
    for _ in range(20):
        assert machine.run(10).reason == "debug-exit"
        assert machine.memory.read(HEAP + 4096 * 9, 4) == b"\x0a\0\0\0"
        machine.rollback(before)
        assert 10 <= before.pages < 20
        assert machine.memory.read(HEAP, 4096 * 10) == bytes(4096 * 10)
        assert machine.vcpus[0].registers() == start


def test_registers_may_be_set_between_a_roll_back_and_the_next_run(flat: Callable[..., Machine]) -> None:
    first = store(HEAP, 1) + EXIT
    machine = flat(first + store(HEAP, 2) + EXIT)
    before = machine.checkpoint()
    start = machine.vcpus[0].registers()["rip"]
    for there, wrote in ((start, 1), (start + len(first), 2), (start, 1)):
        machine.rollback(before)
        if there != start:
            machine.vcpus[0].set_registers(rip=there)
        assert machine.run(10).reason == "debug-exit"
        assert machine.memory.read(HEAP, 1)[0] == wrote


def test_what_is_saved_after_a_roll_back_is_the_checkpoint(flat: Callable[..., Machine]) -> None:
    machine = flat(store(HEAP, 1) + EXIT)
    before = machine.checkpoint()
    then = machine.save()["processors"]["vcpus"][0]
    machine.run(10)
    machine.rollback(before)
    now = machine.save()["processors"]["vcpus"][0]
    assert {name for name in then if then[name] != now[name]} <= {"tsc"}


def test_a_debugger_made_after_a_roll_back_steps_from_the_checkpoint(flat: Callable[..., Machine]) -> None:
    machine = flat(store(COUNT, 0) + SPIN)
    before = machine.checkpoint()
    start = machine.vcpus[0].registers()["rip"]
    machine.start()
    machine.pause()
    machine.rollback(before)
    for _ in range(2):
        stop = machine.debug.step(machine.vcpus[0])
        assert (stop.kind, stop.address) == ("step", start + len(store(COUNT)))
        machine.rollback(before)
    machine.stop()


def test_a_machine_that_runs_goes_on_from_the_checkpoint(flat: Callable[..., Machine]) -> None:
    machine = flat(store(COUNT, 0) + SPIN)
    machine.start()
    checkpoint = machine.checkpoint()
    machine.pause()
    then = int.from_bytes(machine.memory.read(COUNT, 4), "little")
    machine.resume()
    while int.from_bytes(machine.memory.read(COUNT, 4), "little") < then + 1000:
        pass
    machine.pause()
    machine.rollback(checkpoint)
    assert int.from_bytes(machine.memory.read(COUNT, 4), "little") <= then
    machine.resume()
    while int.from_bytes(machine.memory.read(COUNT, 4), "little") < then + 1000:
        pass
    machine.stop()


def test_checkpoints_are_gone_back_to_in_any_order(flat: Callable[..., Machine]) -> None:
    machine = flat(EXIT)
    made: dict[Any, Any] = {}
    image = bytearray(64 * 4096)
    choose = random.Random(5)
    machine.load()
    for step in range(200):
        act = choose.random()
        if act < 0.1 and len(made) < 5:
            made[machine.checkpoint()] = bytes(image)
        elif act < 0.5 and made:
            back = choose.choice(list(made))
            machine.rollback(back)
            image[:] = made[back]
        elif act < 0.55 and made:
            gone = choose.choice(list(made))
            del made[gone]
            gone.close()
        else:
            page = choose.randrange(64)
            data = choose.randbytes(16)
            machine.memory.write(HEAP + 4096 * page, data)
            image[4096 * page : 4096 * page + 16] = data
        assert machine.memory.read(HEAP, len(image)) == image, f"step {step}"


def test_devices_and_pending_input_go_back(flat: Callable[..., Machine]) -> None:
    machine = flat(EXIT)
    machine.console.send(b"early")
    checkpoint = machine.checkpoint()
    before = {device.name: device.save() for device in machine.devices if device.name in ("uart", "i8042")}
    index = device_of(machine, "rtc").save()["index"]
    machine.bus.write(0, 0x3F8 + 7, 1, 0x5A)
    machine.bus.write(0, 0x3F8 + 3, 1, 0x03)
    machine.bus.write(0, 0x70, 1, 0x0F)
    machine.console.send(b" and late")
    machine.rollback(checkpoint)
    assert {name: d.save() for d in machine.devices if (name := d.name) in before} == before
    assert device_of(machine, "rtc").save()["index"] == index
    assert machine.console.pending() == b"early"


def test_a_guest_that_died_is_brought_back(flat: Callable[..., Machine]) -> None:
    machine = flat(store(HEAP, 7) + bytes.fromhex("0f010c2500000000 0f0b".replace(" ", "")))  # sidt; ud2: no handler
    checkpoint = machine.checkpoint()
    for _ in range(3):
        assert machine.run(10).reason == "triple-fault"
        machine.rollback(checkpoint)
        assert machine.memory.read(HEAP, 1) == b"\0"


def test_a_guest_that_ends_while_it_is_rolled_back_has_the_outcome_of_its_end(
    flat: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_it = bytes.fromhex("803c250000300000 74f6")  # again: cmp byte [HEAP], 0; je again
    machine = flat(wait_for_it + EXIT)
    checkpoint = machine.checkpoint()
    start = machine.vcpus[0].registers()["rip"]
    machine.start()
    pause = machine.vm.pause

    def just_too_late() -> None:
        machine.memory.write(HEAP, b"\1")
        assert select.select([machine.stop_fd], [], [], 10)[0]
        pause()

    monkeypatch.setattr(machine.vm, "pause", just_too_late)
    machine.rollback(checkpoint)
    assert machine.outcome is not None
    assert machine.outcome.reason == "debug-exit"
    assert machine.outcome.registers["rip"] > start + len(wait_for_it)
    assert machine.vcpus[0].registers()["rip"] == start


def test_state_saved_and_loaded_is_the_same_state(guest: Callable[[str], str]) -> None:
    with Machine(kernel=guest("smp"), memory="64M", cpus=3) as machine:
        machine.load()
        saved = machine.save()
        machine.load_state(saved)
        again = machine.save()
        for state in (saved, again):  # time goes on
            state["processors"]["chips"]["clock"] = state["processors"]["chips"]["realtime"] = 0
            for channel in state["processors"]["chips"]["pit"]["channels"]:
                channel["count_load_time"] = 0
            for vcpu in state["processors"]["vcpus"]:
                vcpu["tsc"] = 0
            state["devices"].pop("pm-timer", None), state["devices"].pop("rtc", None)
        assert again == saved
        assert machine.run(20).reason == "debug-exit"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: s["processors"]["vcpus"].pop(), "not of 1 vCPUs"),
        (lambda s: s["processors"]["vcpus"][0].pop("regs"), "regs"),
        (lambda s: s["processors"]["vcpus"][0]["regs"].update(rip=-1), "rip is -0x1, which does not fit"),
        (lambda s: s["processors"]["vcpus"][0].update(lapic=b"short"), "lapic is not 1024 bytes"),
        (lambda s: s["processors"]["vcpus"][0]["msrs"].append([1]), "an index and a value"),
        (lambda s: s["devices"].pop("uart"), "other devices: uart"),
        (lambda s: s.update(version=2), "version 1"),
        (lambda s: s.update(input="text"), "version 1"),
    ],
)
def test_what_is_no_state_of_the_machine_is_refused(
    flat: Callable[..., Machine], spoil: Callable[..., object], match: str
) -> None:
    machine = flat(EXIT)
    state = machine.save()
    spoil(state)
    with pytest.raises(ValueError, match=match):
        machine.load_state(state)
    machine.load_state(machine.save())
    assert machine.run(10).reason == "debug-exit"


def test_a_closed_checkpoint_or_anothers_is_refused(flat: Callable[..., Machine]) -> None:
    machine, other = flat(EXIT), flat(EXIT)
    with machine.checkpoint() as checkpoint, pytest.raises(StateError, match="no checkpoint of this machine"):
        other.rollback(checkpoint)
    assert checkpoint.closed
    with pytest.raises(StateError, match="it was closed"):
        machine.rollback(checkpoint)
    kept = machine.checkpoint()
    machine.close()
    assert kept.closed


@pytest.mark.stops("breakpoint")
def test_a_debuggers_breakpoint_outlives_a_rollback_and_is_not_in_it(flat: Callable[..., Machine]) -> None:
    machine = flat(store(HEAP, 7) + b"\x90" + EXIT)
    machine.load()
    rip = machine.vcpus[0].registers()["rip"]
    hits = []
    plain = machine.checkpoint()
    point = machine.breakpoint(rip + 11, lambda stop: hits.append(stop.address))
    with_point = machine.checkpoint()
    machine.run(10)
    machine.rollback(plain)
    machine.run(10)
    assert len(hits) == 2
    point.remove()
    machine.rollback(with_point)
    assert machine.memory.read(rip + 11, 1) == b"\x90"
    assert machine.run(10).reason == "debug-exit"
    assert len(hits) == 2


def test_page_tables_that_went_back_are_those_the_guest_is_translated_by() -> None:
    table, first, second, data = 0x6000, 0x20000, 0x21000, 0x10000
    look = bytes.fromhex("8b06 8903 e610")  # mov eax, [rsi]; mov [rbx], eax; out 0x10, al
    remap = b"\x48\xc7\x04\x25" + table.to_bytes(4, "little") + (second | 7).to_bytes(4, "little")  # mov qword [table]
    guest = TinyGuest("/dev/kvm")
    check(lib.vmm_compat_enable(guest.vm, host.check("/dev/kvm", MachineConfig()).remedies & lib.VMM_COMPAT_SHADOW))
    made = ffi.new("vmm_checkpoint **")
    try:
        for gpa, value in ((0x3008, table | 7), (table, first | 7), (first, 1), (second, 2)):
            guest.memory.write(gpa, value.to_bytes(8, "little"))
        for code, after in ((look, 1), (remap + look, 2), (look, 1)):
            guest.enter(code, cpl=3, rsi=2 << 20, rbx=data)  # user code, which no KVM emulates
            if not made[0]:
                check(lib.vmm_checkpoint_create(guest.vm, made))
            assert guest.run() == "done"
            assert guest.memory.read(data, 1) == bytes([after])
            check(lib.vmm_checkpoint_roll_back_memory(made[0]))
            check(lib.vmm_checkpoint_roll_back_processors(made[0]))
    finally:
        lib.vmm_checkpoint_destroy(made[0])
        guest.close()
