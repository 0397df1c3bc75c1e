"""What the probes decide from measurements: the same on a fast, a slow and a busy host."""

from __future__ import annotations

from random import Random

import pytest

from vmm.cpu.verdicts import (
    LOOKS_COUNTED,
    LOOKS_TIMED,
    ROUNDS_LEAST,
    STEPS_STUCK,
    TIMES_ENDLESS,
    Look,
    due,
    emulation_counted,
    emulation_timed,
    stuck,
)

# ---- emulated or not ----


@pytest.mark.parametrize(
    ("grew", "emulated"),
    [(6000, True), (6003, True), (12_000, True), (3000, True), (2999, False), (17, False), (0, False)],
)
def test_instructions_that_kvm_counted_decide(grew: int, emulated: bool) -> None:
    verdict = emulation_counted(6000, grew)
    assert verdict.value is emulated
    assert verdict.basis == f"insn_emulation grew by {grew} in 6000 instructions"


@pytest.mark.parametrize("slow", [1, 100, 10_000])
@pytest.mark.parametrize(("times", "emulated"), [(1, False), (118, True)])
def test_a_ratio_decides_on_a_host_of_any_speed(slow: int, times: int, emulated: bool) -> None:
    user = [300_000 * slow + n for n in range(ROUNDS_LEAST)]
    verdict = emulation_timed([n * times for n in user], user)
    assert verdict is not None and verdict.value is emulated
    assert f"{times} times" in verdict.basis


def decide(random: Random, times: float, rounds: int = 20) -> bool | None:
    """As the probe does it: rounds of both, until it is clear. Half of the runs are disturbed, some very much."""
    kernel: list[int] = []
    user: list[int] = []

    def took(ns: float) -> int:
        return int(ns * random.choice([1, 1, 1, 1.3, 2, 5, 30, 200]))

    for _ in range(rounds):
        kernel.append(took(300_000 * times))
        user.append(took(300_000))
        if verdict := emulation_timed(kernel, user):
            return verdict.value
    return None


@pytest.mark.parametrize(("times", "emulated"), [(1, False), (150, True)])
def test_disturbed_runs_do_not_change_the_verdict(times: int, emulated: bool) -> None:
    random = Random(1)
    assert {decide(random, times) for _ in range(1000)} == {emulated}


def test_few_rounds_and_a_ratio_between_decide_nothing() -> None:
    few = ROUNDS_LEAST - 1
    assert emulation_timed([1] * few, [1] * few) is None
    assert emulation_timed([100] * few, [1] * ROUNDS_LEAST) is None
    assert emulation_timed([500] * 19, [100] * 19) is None
    assert emulation_timed([0] * 19, [0] * 19) is not None  # a clock that stands: no difference is seen


# ---- going on or not ----

PATIENCE = 1_000_000


def looks(n: int, *, moving: bool = False, **growth: int) -> list[Look]:
    """n looks, at each of which every counter has grown by so much."""
    return [
        Look((1, 2, i if moving else 3), (i + 1) * PATIENCE, {name: 7 + i * by for name, by in growth.items()})
        for i in range(n)
    ]


def test_nothing_is_said_of_a_guest_at_which_no_one_looked() -> None:
    assert stuck([], PATIENCE) == ""


def test_many_instructions_that_change_no_register_are_a_loop() -> None:
    few = looks(LOOKS_COUNTED - 1, insn_emulation=STEPS_STUCK)
    assert stuck(few, PATIENCE) == ""
    why = stuck(looks(LOOKS_COUNTED, insn_emulation=STEPS_STUCK), PATIENCE)
    assert why == f"insn_emulation grew by {(LOOKS_COUNTED - 1) * STEPS_STUCK} with no register changed in 4 looks"


def test_an_interrupted_guest_that_kvm_hardly_entered_is_not_judged_by_counts() -> None:
    assert stuck(looks(LOOKS_TIMED - 1, exits=2, insn_emulation=1), PATIENCE) == ""


def test_registers_that_change_are_progress() -> None:
    assert stuck(looks(100, moving=True, insn_emulation=10**6, exits=10**6), PATIENCE) == ""


def test_one_change_begins_the_count_anew() -> None:
    seen = looks(LOOKS_TIMED)
    seen[1] = seen[1]._replace(registers=(9,))
    assert stuck(seen, PATIENCE) == ""
    assert stuck([*seen, *looks(2)], PATIENCE) != ""


def test_without_counts_it_takes_more_looks() -> None:
    assert stuck(looks(LOOKS_TIMED - 1), PATIENCE) == ""
    assert "processor time" in stuck(looks(LOOKS_TIMED), PATIENCE)


def test_a_guest_that_moves_for_ever_ends_some_time() -> None:
    seen = looks(3, moving=True)
    assert stuck(seen, PATIENCE) == ""
    seen.append(Look((8,), TIMES_ENDLESS * PATIENCE, {}))
    assert "had not ended" in stuck(seen, PATIENCE)


def test_a_thread_that_was_not_on_a_processor_is_left_alone() -> None:
    assert not due([], PATIENCE - 1, PATIENCE)
    assert due([], PATIENCE, PATIENCE)
    one = looks(1)
    assert not due(one, one[0].cpu_ns + PATIENCE - 1, PATIENCE)
    assert due(one, one[0].cpu_ns + PATIENCE, PATIENCE)
