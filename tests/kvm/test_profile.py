"""The profiler on running guests: samples are where the guest is, and are named."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from vmm.errors import ConfigError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmm.observe.profile import Profile

    GuestPath = Callable[[str], str]

SPIN = bytes.fromhex("48ffc0 ebfb")  # 1: inc rax; jmp 1b


@pytest.fixture
def spinning(tmp_path: Path) -> Any:
    path = tmp_path / "spin.bin"
    path.write_bytes(SPIN)
    with Machine(kernel=str(path), kind="flat", mode="long", memory="16M") as machine:
        yield machine


def sampled(profile: Profile, n: int) -> None:
    deadline = time.monotonic() + 60
    while profile.samples < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_samples_fall_where_the_guest_spends_its_time(spinning: Machine) -> None:
    with spinning.profile(hz=500) as profile:
        spinning.start()
        sampled(profile, 5)
        spinning.stop()
    assert {key for key in profile.counts} <= {(0, (0x100000,)), (0, (0x100003,))}
    assert sum(profile.counts.values()) == profile.samples
    assert 0 < profile.paused < profile.seconds
    taken = profile.samples
    profile.stop()
    assert profile.samples == taken


def test_a_profile_of_a_running_guest_leaves_it_running(spinning: Machine) -> None:
    spinning.start()
    profile = spinning.profile(hz=200)
    sampled(profile, 3)
    assert spinning.running
    profile.stop()
    assert spinning.stop().reason == "stopped"


def test_symbols_and_stacks_are_in_the_results(guest: GuestPath) -> None:
    with Machine(kernel=guest("spin"), memory="16M") as machine:
        machine.start()
        machine.console.expect("spinning", timeout=60)
        with machine.profile(hz=200, stacks=True) as profile:
            sampled(profile, 20)
        machine.stop()
    assert profile.totals()[0][0] == "guest_main"
    line = next(line for line in profile.folded().splitlines() if "guest_main" in line)
    assert line.startswith("vcpu0;start_common;guest_main ") and int(line.split()[-1]) > 0
    assert f"{profile.samples} samples in" in profile.table()


def test_a_frequency_that_cannot_be_is_refused(spinning: Machine) -> None:
    for hz in (0, -1, 1e9, float("nan")):
        with pytest.raises(ConfigError, match="samples a second"):
            spinning.profile(hz)


def test_the_command_prints_a_table_writes_stacks_and_exits_as_the_guest(guest: GuestPath, tmp_path: Path) -> None:
    folded = tmp_path / "folded"
    words = ["profile", "--hz", "300", "--folded", str(folded), "--", "--kernel", guest("spin"), "--timeout", "0.5"]
    done = subprocess.run([sys.executable, "-m", "vmm", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 124, done
    assert "samples in" in done.stderr and "guest_main" in done.stderr
    assert "vcpu0;guest_main " in folded.read_text()
