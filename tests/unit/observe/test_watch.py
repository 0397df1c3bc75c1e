"""What counts as progress: a guest is never ended while it does something new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vmm.observe import watch
from vmm.observe.samples import Sample
from vmm.observe.watch import STALLED, TIMEOUT, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

STALL = 3.2  # of 32 rounds, 0.1 s each


class Vcpu:
    """One that is where it is told to be."""

    number = 0
    bits = 64

    def __init__(self) -> None:
        self.rip, self.rcx = 0x1000, 0
        self.mp_state = "runnable"
        self.exits: list[Any] = []

    def registers(self) -> dict[str, int]:
        return {"rip": self.rip, "cs_base": 0, "rcx": self.rcx}

    def exit_counts(self) -> dict[str, int]:
        return {"io": len(self.exits), "intr": 9}

    def last_exits(self) -> list[Any]:
        return self.exits


class Exit:
    """An access to a port."""

    reason, size, write = "io", 1, False

    def __init__(self, address: int, value: int) -> None:
        self.address, self.value = address, value


class Machine:
    """What a watch asks of a machine."""

    class Console:
        end = 0

    class Queues:
        requests = 0

        def queue_statistics(self) -> list[dict[str, int]]:
            return [{"requests": self.requests, "doorbells": 0}]

    class Bus:
        def find(self, space: int, address: int) -> Any:
            return type("Attachment", (), {"name": "pit" if address == 0x40 else "uart"})

    def __init__(self) -> None:
        self.vcpus = [Vcpu()]
        self.console, self.bus = self.Console(), self.Bus()
        self.disk = self.Queues()
        self.virtio = [self.disk]
        self.samples: list[list[Sample]] = []
        self.paused = False

    ran = 0.0

    def processor_seconds(self, vcpu: int) -> float:
        self.ran += self.pace
        return self.ran

    pace = 0.01

    def pause(self) -> None: ...
    def resume(self) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = type("Clock", (), {"at": 100.0})()
    monkeypatch.setattr("time.monotonic", lambda: now.at)
    return now


def run(
    clock: Any, machine: Any, step: Callable[[Machine, int], object], *, seconds: float = 10.0, **limits: Any
) -> Any:
    """(code, after how many seconds) of a machine that does ``step(machine, n)`` before each round."""
    limits = {"timeout": None, "stall": STALL, **limits}
    watched, begun, n = Watch(machine, limits["timeout"], limits["stall"]), clock.at, 0
    while clock.at - begun < seconds:
        step(machine, n)
        if code := watched.due():
            return code, clock.at - begun
        clock.at += max(watched.left, 0.001)
        n += 1
    return None


def test_a_guest_that_does_nothing_stalls_when_its_time_is_over(clock: Any) -> None:
    code, after = run(clock, Machine(), lambda machine, n: None)
    assert code == STALLED
    assert STALL <= after < STALL + 0.3


def _move(machine: Machine, n: int) -> None:
    machine.vcpus[0].rip = 0x1000 + 64 * n


def _print(machine: Machine, n: int) -> None:
    machine.console.end = n // 20


def _request(machine: Machine, n: int) -> None:
    machine.disk.requests = n // 20


def _new_accesses(machine: Machine, n: int) -> None:
    machine.vcpus[0].exits = [Exit(0x3F8, n // 20)]


def _copy(machine: Machine, n: int) -> None:
    """REP MOVSB: one instruction, and RCX counts down."""
    machine.vcpus[0].rcx = (1 << 30) - n


def _fill(machine: Machine, n: int) -> None:
    """A loop of three instructions with a pointer in it."""
    machine.vcpus[0].rip, machine.vcpus[0].rcx = 0x1000 + n % 3, 0x200000 + 8 * n


def _starve(machine: Machine, n: int) -> None:
    """A loop that counts, on a host so busy that it seldom runs between two samples."""
    machine.pace, machine.vcpus[0].rcx = 0.0001, n // 7


def _never_run(machine: Machine, n: int) -> None:
    machine.pace = 0.0001


def _be_robbed(machine: Machine, n: int) -> None:
    """A loop that counts, where the host is a guest itself: time that it was robbed of seems to be the vCPU's own."""
    machine.pace, machine.vcpus[0].rcx = 0.05, n - (n % 10 == 1)


def _one_works(machine: Machine, n: int) -> None:
    """A vCPU that spins until the other has done its work."""
    if n == 0:
        machine.vcpus.append(Vcpu())
        machine.vcpus[1].number = 1
    machine.vcpus[1].rcx = n


@pytest.mark.parametrize(
    "step", [_move, _print, _request, _new_accesses, _copy, _fill, _one_works, _starve, _be_robbed, _never_run]
)
def test_progress_of_any_kind_is_no_stall(clock: Any, step: Callable[[Machine, int], None]) -> None:
    assert run(clock, Machine(), step) is None


def _poll(machine: Machine, n: int) -> None:
    machine.vcpus[0].exits = [Exit(0x3FD, 0x60), Exit(0x3FD, 0x60)]


def _scan(machine: Machine, n: int) -> None:
    """More ports than the ring of exits holds, over and over."""
    machine.vcpus[0].exits = [Exit(0x100 + (64 * n + i) % 200, 0xFF) for i in range(64)]


def _program_a_timer(machine: Machine, n: int) -> None:
    machine.vcpus[0].exits = [Exit(0x40, n % 256)]


def _jump_to_itself(machine: Machine, n: int) -> None:
    machine.pace = 0.001


def _loop(machine: Machine, n: int) -> None:
    machine.vcpus[0].rip = 0x1000 + n % 3


def _tick_now_and_then(machine: Machine, n: int) -> None:
    machine.vcpus[0].mp_state = "runnable" if n % 2 else "halted"
    machine.vcpus[0].rip = 0x1000 + 64 * n if n % 2 else 0x500


@pytest.mark.parametrize("step", [_poll, _scan, _program_a_timer, _jump_to_itself, _loop, _tick_now_and_then])
def test_the_same_over_and_over_is_a_stall(clock: Any, step: Callable[[Machine, int], None]) -> None:
    assert run(clock, Machine(), step)[0] == STALLED


def test_time_that_somebody_holds_the_machine_does_not_count(clock: Any) -> None:
    def hold(machine: Machine, n: int) -> None:
        machine.paused = n < 50

    code, after = run(clock, Machine(), hold)
    assert code == STALLED
    assert after >= 5.0 + STALL - 0.3


def test_a_vcpu_that_was_never_started_is_not_looked_at(clock: Any) -> None:
    machine = Machine()
    machine.vcpus.append(Vcpu())
    machine.vcpus[1].mp_state = "uninitialized"
    assert run(clock, machine, lambda machine, n: None)[0] == STALLED
    assert {sample.vcpu for taken in machine.samples for sample in taken} == {0}


def test_a_time_limit_ends_on_time_with_samples_of_its_last_quarter(clock: Any) -> None:
    machine = Machine()
    code, after = run(clock, machine, _move, timeout=8.0, stall=None)
    assert (code, after) == (TIMEOUT, pytest.approx(8.0, abs=0.01))
    assert 25 <= len(machine.samples) <= watch.ROUNDS
    assert machine.samples[0][0].at >= 100 + 6.0


def test_a_time_limit_of_nothing_is_over_at_once(clock: Any) -> None:
    assert Watch(Machine(), 0, None).due() == TIMEOUT  # type: ignore[arg-type]
