"""A guest that checks its own memory and clocks is taken back a thousand times, and notices nothing."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from effort import PATIENCE

from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

ROLLBACKS = 1000
RUN = 0.004  # seconds, at most, between two of them
AHEAD_EVERY = 50
AHEAD = (
    3600 * 10**9
)  # ns, by which clocks are set ahead before a roll-back: only that can take the guest beyond its limit,
JUMP = 1_800_000  # which is in ms and far longer than a busy host, or a TSC that cannot be set, lets it miss


def set_clocks_ahead(machine: Machine) -> None:
    state = machine.save()
    state["processors"]["chips"]["realtime"] -= AHEAD
    machine.load_state(state)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_thousand_rollbacks_from_random_moments(guest: Callable[[str], str], cpus: int) -> None:
    choose = random.Random(1000 + cpus)
    with Machine(
        kernel=guest("self_check"), memory="32M", cpus=cpus, append=f"pages=32 ballast=8 jump={JUMP} tsc_jump={JUMP}"
    ) as machine:
        machine.start()
        machine.console.expect("clock 1\n.*round 0\n", timeout=PATIENCE)
        checkpoints = [machine.checkpoint()]
        copied = 0
        for number in range(ROLLBACKS):
            time.sleep(choose.random() * RUN)
            if len(checkpoints) < 3 and choose.random() < 0.1:
                checkpoints.append(machine.checkpoint())
            back = choose.choice(checkpoints)
            if number % AHEAD_EVERY:
                machine.rollback(back)
            else:
                machine.pause()
                set_clocks_ahead(machine)
                machine.rollback(back)
                machine.resume()
            copied += back.pages
            assert not machine.console.closed, machine.stop().console
        assert copied > ROLLBACKS  # it did run in between
        machine.console.send(b"e")
        outcome = machine.wait(PATIENCE)
        assert (outcome.reason, outcome.status) == ("debug-exit", 33), outcome.console
