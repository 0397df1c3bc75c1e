"""A machine that nothing can wake ends, and no other does."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from vmm._ffi import lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm import Machine

CLI, STI, HLT = b"\xfa", b"\xfb", b"\xf4"
AGAIN = HLT + b"\xeb\xfd"  # hlt; jmp to it
DEAD = CLI + AGAIN


def store(address: int, value: int) -> bytes:
    """mov eax, value; mov rbx, address; mov [rbx], eax"""
    return b"\xb8" + value.to_bytes(4, "little") + b"\x48\xbb" + address.to_bytes(8, "little") + b"\x89\x03"


LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
NMI = 0x400


def pin(number: int, low: int) -> bytes:
    """An entry of the I/O APIC's table; its pin's edge is delivered to the first processor."""
    return store(IOAPIC, 0x10 + 2 * number) + store(IOAPIC + 0x10, low)


@pytest.mark.parametrize("cpus", [1, 3], ids=["one", "others-wait-for-a-sipi"])
def test_a_machine_whose_processors_are_halted_for_good_ends(flat: Callable[..., Machine], cpus: int) -> None:
    outcome = flat(DEAD, cpus=cpus).run(timeout=60)
    assert (outcome.reason, outcome.status, outcome.ok) == ("halt", 18, False)
    assert outcome.registers["rflags"] & 0x200 == 0


def test_it_ends_also_after_it_was_at_work_without_exits(flat: Callable[..., Machine]) -> None:
    count = b"\x48\xb9" + (1 << 16).to_bytes(8, "little") + b"\x48\xff\xc9\x75\xfb"  # mov rcx; dec rcx; jnz
    assert flat(count + DEAD).run(timeout=60).reason == "halt"


def test_it_ends_also_without_devices_of_its_own_and_after_an_exit(flat: Callable[..., Machine]) -> None:
    assert flat(b"\xe6\x80" + DEAD, rng=False).run(timeout=60).reason == "halt"


def test_it_ends_again_after_a_roll_back(flat: Callable[..., Machine]) -> None:
    machine = flat(DEAD)
    checkpoint = machine.checkpoint()
    assert machine.run(timeout=60).reason == "halt"
    machine.rollback(checkpoint)
    assert machine.run(timeout=60).reason == "halt"


ALIVE = {
    "interrupts on": STI + AGAIN,
    "an NMI from the PIT by way of LINT0": store(LAPIC + 0xF0, 0x1FF) + store(LAPIC + 0x350, NMI) + DEAD,
    "an NMI of the performance counter": store(LAPIC + 0xF0, 0x1FF) + store(LAPIC + 0x340, NMI) + DEAD,
    "an NMI from a pin of the I/O APIC": pin(4, NMI) + DEAD,
    "INIT from a pin of the I/O APIC": pin(4, 0x500) + DEAD,
}


def looks(machine: Machine) -> int:
    """How often the processors were parked to find out."""
    return int(lib.vmm_vm_halt_looks(machine.native))


def looked_at(machine: Machine, times: int = 1) -> None:
    deadline = time.monotonic() + 60
    while looks(machine) < times:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("code", ALIVE.values(), ids=ALIVE)
def test_a_machine_that_could_wake_runs_on(flat: Callable[..., Machine], code: bytes) -> None:
    machine = flat(code)
    machine.start()
    looked_at(machine)
    assert machine.running and machine.stop().reason == "stopped"


def wakings() -> int:
    """Times that a thread of this process has gone to sleep, as the kernel counts them."""
    total = 0
    for task in os.listdir("/proc/self/task"):
        if int(task) != os.getpid():
            with open(f"/proc/self/task/{task}/status") as status:
                total += sum(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
    return total


def test_an_idle_machine_is_looked_at_once_and_costs_nothing_then(flat: Callable[..., Machine]) -> None:
    machine = flat(STI + AGAIN)
    machine.start()
    looked_at(machine)
    deadline = time.monotonic() + 120
    before = -1
    while before != (before := wakings()):  # until its threads have slept three times as long as it takes to look
        assert time.monotonic() < deadline
        time.sleep(3)
    assert looks(machine) == 1
