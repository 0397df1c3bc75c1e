"""A guest that checks its own memory and clocks is taken back a thousand times, and notices nothing."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

ROLLBACKS = 1000
RUN = 0.004  # seconds, at most, between two of them
TSC_JUMP = 600_000  # ms: where the TSC cannot be set it goes on through all of them; kvmclock is checked closely


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_thousand_rollbacks_from_random_moments(guest: Callable[[str], str], cpus: int) -> None:
    choose = random.Random(1000 + cpus)
    with Machine(
        kernel=guest("self_check"), memory="32M", cpus=cpus, append=f"pages=32 ballast=8 jump=2000 tsc_jump={TSC_JUMP}"
    ) as machine:
        machine.start()
        machine.console.expect("clock 1\n.*round 0\n", timeout=20)
        checkpoints = [machine.checkpoint()]
        copied = 0
        for _ in range(ROLLBACKS):
            time.sleep(choose.random() * RUN)
            if len(checkpoints) < 3 and choose.random() < 0.1:
                checkpoints.append(machine.checkpoint())
            back = choose.choice(checkpoints)
            machine.rollback(back)
            copied += back.pages
            assert not machine.console.closed, machine.stop().console
        assert copied > ROLLBACKS  # it did run in between
        machine.console.send(b"e")
        outcome = machine.wait(20)
        assert (outcome.reason, outcome.status) == ("debug-exit", 33), outcome.console
