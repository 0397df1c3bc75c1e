"""Deaths whose registers the host has taken: a second run finds them, or says why it does not.

Where the host keeps them, both ways are compared: the replay is asked for all the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from test_diagnose import DEATHS

from vmm.cpu.vcpu import was_reset
from vmm.machine import Machine
from vmm.observe import replay
from vmm.observe.diagnose import diagnose
from vmm.observe.postmortem import report
from vmm.outcome import Outcome, Replayed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    GuestPath = Callable[[str], str]

RESUME_FLAG = 1 << 16  # RFLAGS.RF, which the processor or KVM may set at a fault
UD2 = bytes.fromhex("0f0b")


def dead(kernel: str, append: str = "", **fields: Any) -> Machine:
    """A machine that has died of a triple fault."""
    machine = Machine(kernel=kernel, append=append, **{"memory": "16M", "rng": False, **fields})
    assert machine.run(20).reason == "triple-fault"
    return machine


def host_resets(machine: Machine) -> bool:
    """Whether the vCPU that died was reset by the host's KVM."""
    assert machine.outcome is not None
    return was_reset(*machine.vcpus[machine.outcome.vcpu or 0].structs())


HANDLED = pytest.mark.stops("breakpoint")  # where handlers are there, a breakpoint in each tells whether it was entered
WAYS = [
    *(pytest.param(death.values[0], marks=death.marks) for death in DEATHS),
    pytest.param("in-handler", marks=HANDLED),
    "late",
]


@pytest.mark.parametrize("death", WAYS)
def test_a_replay_finds_the_instruction_the_registers_and_the_cause(guest: GuestPath, death: str) -> None:
    with dead(guest("deaths"), f"die={death}") as machine:
        outcome = machine.outcome
        assert outcome is not None
        told = diagnose(machine, outcome)
        known = {**outcome.registers, "rflags": outcome.registers["rflags"] & ~RESUME_FLAG}
        found = machine.replay()
        assert found.why == ""
        assert found.instruction[:15] == outcome.instruction[:15]
        assert {**found.registers, "cr2": known["cr2"]} == known
        outcome.seek(machine.replay)
        assert diagnose(machine, outcome) == told
        assert outcome.replayed
        assert "registers are of a replay that died the same way" in report(machine, outcome)


@HANDLED
def test_a_death_in_a_handler_is_not_blamed_on_what_entered_it(guest: GuestPath) -> None:
    with dead(guest("deaths"), "die=in-handler") as machine:
        found = machine.replay()
        assert str(machine.symbols.name(found.registers["rip"])).startswith("lose")


def test_a_death_long_after_the_last_exit_is_closed_in_on(guest: GuestPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_FIRST_LOOK", 0.001)
    with dead(guest("deaths"), "die=late") as machine:
        found = machine.replay()
        assert found.why == ""
        assert str(machine.symbols.name(found.registers["rip"])).startswith("late")


def test_registers_are_found_after_the_machine_is_closed(guest: GuestPath) -> None:
    with dead(guest("triple_fault")) as machine:
        outcome = machine.outcome
        assert outcome is not None
        outcome.seek(machine.replay_of(outcome))
    assert outcome.instruction[:2] == UD2
    assert outcome.replayed


def test_nothing_is_replayed_before_somebody_asks() -> None:
    asked = []

    def ask() -> Replayed:
        asked.append(1)
        return Replayed({"rip": 7}, 32, UD2)

    outcome = Outcome("triple-fault", registers={"rip": 0xFFF0}, bits=16)
    outcome.seek(ask)
    assert (outcome.status, outcome.sentence[:12], repr(outcome)[:8], asked) == (12, "triple fault", "<Outcome", [])
    assert (outcome.registers, outcome.bits, outcome.instruction) == ({"rip": 7}, 32, UD2)
    assert (outcome.replayed, outcome.lost, asked) == (True, "", [1])


# ---- from a checkpoint ----


def test_a_replay_begins_at_the_last_checkpoint_and_leaves_the_dead_machine_as_it_was(guest: GuestPath) -> None:
    with Machine(kernel=guest("deaths"), append="die=pte", memory="16M", rng=False) as machine:
        machine.console.send("sent before")  # is a part of the checkpoint
        with machine.checkpoint() as checkpoint:
            for _ in range(2):
                outcome = machine.run(20)
                printed = machine.console.transcript
                memory, registers = machine.memory.read(0, 16 << 20), machine.vcpus[0].registers()
                found = machine.replay()
                assert found.why == ""
                assert str(machine.symbols.name(found.registers["rip"])).startswith("pte")
                assert host_resets(machine) or found.registers["rip"] == outcome.registers["rip"]
                assert machine.memory.read(0, 16 << 20) == memory
                assert machine.vcpus[0].registers() == registers
                assert machine.console.transcript == printed
                machine.rollback(checkpoint)
        assert "rolled back to a checkpoint that is closed" in _why_not(machine)


def _why_not(machine: Machine) -> str:
    machine.run(20)
    return machine.replay().why


# ---- what cannot be repeated, and what is another way ----


def test_what_came_from_outside_is_not_repeated(guest: GuestPath, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    for fields, why in (
        ({"vsock": str(tmp_path / "socket")}, "it has a vsock"),
        ({"disks": [str(disk)]}, "what was on the disk .* give it temporary, or ro"),
        ({"disks": [f"{disk},ro"]}, "^$"),
        ({"disks": [f"{disk},temporary"]}, "^$"),
    ):
        with dead(guest("triple_fault"), **fields) as machine:
            assert re.search(why, machine.replay().why), machine.replay().why


@pytest.mark.parametrize(
    ("touch", "why"),
    [
        (lambda machine: machine.console.send("x"), "it was sent console input"),
        (lambda machine: machine.on_port(0x80, lambda access: None), "it has hooks"),
        (lambda machine: (machine.load(), machine.vcpus[0].set_registers(rbx=1)), "registers were set from outside"),
        (lambda machine: machine.load_state(machine.save()), "it went on from a snapshot"),
    ],
)
def test_a_run_that_was_touched_is_not_repeated(guest: GuestPath, touch: Callable[[Machine], object], why: str) -> None:
    with Machine(kernel=guest("triple_fault"), memory="16M", rng=False) as machine:
        touch(machine)
        outcome = machine.run(20)
        outcome.seek(machine.replay)
        assert why in outcome.lost
        assert not outcome.replayed
        found = machine.diagnose()
        assert (found.cause, why in found.sentence) == ("unknown", True)
        assert "the host's KVM has reset the vCPU" in " ".join(report(machine, outcome).split())


def test_an_image_that_changed_meanwhile_is_not_taken_for_the_one_that_ran(flat: Any) -> None:
    machine = flat(UD2)
    machine.run(20)
    with open(machine.config.kernel, "wb") as image:
        image.write(b"\x90" + UD2)
    assert "is not what it was" in machine.replay().why


def test_other_exits_are_another_way(flat: Any) -> None:
    machine = flat(bytes.fromhex("0f31 e780 0f0b"))  # rdtsc; out 0x80, eax; ud2
    machine.run(20)
    assert "the last of 1 exits are not those of the first run" in machine.replay().why


def test_other_memory_is_another_way_where_there_are_no_exits(flat: Any) -> None:
    machine = flat(bytes.fromhex("0f31 890425 00002000 0f0b"))  # rdtsc; mov [0x200000], eax; ud2
    machine.run(20)
    assert "1 pages of memory are not as the first run left them" in machine.replay().why


def test_a_replay_has_not_more_time_than_it_is_given(guest: GuestPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SECONDS_MAX", 0.0)
    with dead(guest("triple_fault")) as machine:
        assert "there was not enough time" in machine.replay().why
