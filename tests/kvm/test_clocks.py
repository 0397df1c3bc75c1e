"""The guest's clocks after every way of going on: TSC, kvmclock, the time of day and the RTC."""

from __future__ import annotations

import calendar
import contextlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from test_migrate import Arriving

from vmm._ffi import lib
from vmm.errors import ConfigError, HostError
from vmm.machine import Machine
from vmm.machine.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HOUR = 3600
NS = 10**9
SLACK = 2  # seconds: readings are in whole ones, and kvmclock goes by another rate than the host's corrected clock
KVM_CAP_TSC_CONTROL = 60

Way = "Callable[[Machine, Path, str], Machine]"


class Told(NamedTuple):
    """What the guest read, and the host's time before and after."""

    before: float
    wall: int
    rtc: int
    after: float
    stable: bool


def told(machine: Machine) -> Told:
    before = time.time()
    machine.console.send(b"t")
    match = machine.console.expect(rb"time (\d+) (\S+) (\d)\n", 60)
    after = time.time()
    wall, rtc, stable = match.groups()
    date = time.strptime(rtc.decode(), "%Y-%m-%dT%H:%M:%S")
    return Told(before, int(wall), calendar.timegm(date), after, stable == b"1")


def is_between(low: float, value: float, high: float) -> bool:
    return low - SLACK <= value <= high + SLACK


def loaded(machine: Machine, folder: Path, clock: str) -> Machine:
    machine.pause()
    machine.load_state(machine.save(), clock=clock)
    machine.resume()
    return machine


def restored(machine: Machine, folder: Path, clock: str) -> Machine:
    machine.snapshot(folder / "snapshot").close()
    machine.close()
    again = Machine.restore(folder / "snapshot", clock=clock)
    again.start()
    return again


def cloned(machine: Machine, folder: Path, clock: str) -> Machine:
    [clone] = machine.clone(clock=clock)
    machine.close()
    clone.start()
    return clone


def moved(machine: Machine, folder: Path, clock: str, postcopy: bool = False) -> Machine:
    there = Arriving(f"unix:{folder}/there", clock=clock)
    machine.migrate(there.address, postcopy=postcopy)
    machine.close()
    return there.machine()


def moved_before_its_memory(machine: Machine, folder: Path, clock: str) -> Machine:
    return moved(machine, folder, clock, postcopy=True)


WAYS = [loaded, restored, cloned, moved, moved_before_its_memory]


@pytest.fixture
def running(guest: Callable[[str], str]) -> Iterator[Callable[..., Machine]]:
    with contextlib.ExitStack() as stack:

        def make(cpus: int = 1) -> Machine:
            machine = stack.enter_context(Machine(kernel=guest("clocks"), memory="32M", cpus=cpus))
            machine.start()
            machine.console.expect(rb"%d CPUs\n" % cpus, 60)
            return machine

        yield make


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has :meth:`Machine.save` give a state whose clocks are so many seconds further than they were."""
    real = Timeline.save

    def change(**seconds: int) -> None:
        def save(timeline: Timeline) -> dict[str, Any]:
            state = real(timeline)
            for name, more in seconds.items():
                state["processors"]["chips"][name] += more * NS
            return state

        monkeypatch.setattr(Timeline, "save", save)

    return change


def ended(machine: Machine) -> None:
    with machine:
        machine.console.send(b"e")
        outcome = machine.wait(60)
        assert outcome.status == 33, outcome.console


@pytest.mark.parametrize("way", WAYS)
def test_the_time_that_has_passed_has_passed_for_the_guest(
    running: Callable[..., Machine], changed: Callable[..., None], tmp_path: Path, way: Any
) -> None:
    machine = running()
    then = told(machine)
    assert is_between(then.before, then.wall, then.after) and is_between(then.before, then.rtc, then.after)
    changed(realtime=-HOUR)
    machine = way(machine, tmp_path, "advanced")
    now = told(machine)
    assert is_between(now.before + HOUR, now.wall, now.after + HOUR)
    assert is_between(now.before, now.rtc, now.after)  # the host's own clock has not gone on by that hour
    ended(machine)


@pytest.mark.parametrize("way", WAYS)
def test_clocks_that_are_kept_go_on_from_where_they_stood(
    running: Callable[..., Machine], changed: Callable[..., None], tmp_path: Path, way: Any
) -> None:
    machine = running()
    then = told(machine)
    changed(realtime=-HOUR)
    machine = way(machine, tmp_path, "kept")
    now = told(machine)
    assert is_between(then.wall, now.wall, now.after)
    assert is_between(then.rtc - HOUR, now.rtc, now.after - HOUR)
    ended(machine)


def test_a_host_whose_clock_was_set_back_does_not_take_the_guests_with_it(
    running: Callable[..., Machine], changed: Callable[..., None], tmp_path: Path
) -> None:
    machine = running()
    then = told(machine)
    changed(realtime=HOUR)
    machine = restored(machine, tmp_path, "advanced")
    now = told(machine)
    assert is_between(then.wall, now.wall, now.after)
    assert is_between(then.rtc + HOUR, now.rtc, now.after + HOUR)
    ended(machine)


def test_a_restore_does_not_have_kvm_write_the_wall_clock_into_memory_again(
    running: Callable[..., Machine], changed: Callable[..., None], tmp_path: Path
) -> None:
    machine = running()
    changed(clock=HOUR)
    machine = restored(machine, tmp_path, "kept")
    now = told(machine)
    assert is_between(now.before + HOUR - 60, now.wall, now.after + HOUR)
    ended(machine)


def rolled_back(machine: Machine, folder: Path, clock: str) -> Machine:
    with machine.checkpoint() as checkpoint:
        for _ in range(3):
            told(machine)
            machine.rollback(checkpoint)
    return machine


@pytest.mark.parametrize("way", [rolled_back, *WAYS])
def test_two_processors_keep_one_time(running: Callable[..., Machine], tmp_path: Path, way: Any) -> None:
    machine = running(cpus=2)
    stable = told(machine).stable
    machine = way(machine, tmp_path, "advanced")
    now = told(machine)
    assert now.stable == stable
    machine.pause()
    tscs = {vcpu["tsc"] for vcpu in machine.save()["processors"]["vcpus"]}
    assert len(tscs) == 1 or not stable
    machine.resume()
    ended(machine)


def test_a_tsc_of_another_rate_is_scaled_or_refused(running: Callable[..., Machine]) -> None:
    machine = running()
    machine.pause()
    state = machine.save()
    rates = [vcpu["tsc_khz"] for vcpu in state["processors"]["vcpus"]]
    for vcpu in state["processors"]["vcpus"]:
        vcpu["tsc_khz"] *= 2
    if int(lib.vmm_vm_check_extension(machine.native, KVM_CAP_TSC_CONTROL)) > 0:
        machine.load_state(state)
        assert [vcpu["tsc_khz"] for vcpu in machine.save()["processors"]["vcpus"]] == [2 * rate for rate in rates]
    else:
        with pytest.raises(HostError, match="it cannot scale"):
            machine.load_state(state)


@pytest.mark.parametrize("words", [[], ["--clock", "kept"]])
@pytest.mark.parametrize("command", ["restore", "receive", "standby"])
def test_the_commands_hand_on_which_clock_is_wanted(
    monkeypatch: pytest.MonkeyPatch, command: str, words: list[str]
) -> None:
    import importlib

    seen: list[object] = []

    def stopped(*_: object, **how: object) -> None:
        seen.append(how["clock"])
        raise ConfigError("far enough")

    monkeypatch.setattr(Machine, "restore", stopped)
    monkeypatch.setattr("vmm.migrate.Receiver", stopped)
    with pytest.raises(ConfigError, match="far enough"):
        importlib.import_module(f"vmm.cli.{command}").run([*words, "unix:nowhere"])
    assert seen == ["kept" if words else "advanced"]


def test_a_clock_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no clock 'broken'"):
        Machine.restore(tmp_path, clock="broken")
