"""A budget: parts that end when they are spent, and leave something to those behind them."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.observe.budget import Budget, Spent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = type("Clock", (), {"at": 100.0, "pace": 1.0})()
    monkeypatch.setattr("time.thread_time", lambda: now.at)
    monkeypatch.setattr("time.monotonic", lambda: now.at * now.pace)
    return now


def test_a_part_that_is_spent_ends_with_what_it_has_and_a_note(clock: Any) -> None:
    budget, found = Budget(seconds=8.0), []
    with budget.part("the search for it") as part:
        for n in range(100):
            found.append(n)
            clock.at += 1.0
            part.spend(looked=1)
    assert found == [0, 1, 2, 3, 4]
    assert budget.notes == ["the search for it was ended: it takes too long; what was found until then is shown"]


def test_a_busy_host_gives_a_budget_four_times_as_long_and_no_longer(clock: Any) -> None:
    for pace, steps in ((3.0, 5), (8.0, 3)):
        clock.pace = pace
        found = 0
        with Budget(seconds=8.0).part("the search for it") as part:
            while True:
                found += 1
                clock.at += 1.0
                part.spend()
        assert found == steps


@pytest.mark.parametrize(
    ("what", "why"), [("looked", "after 2 MiB of guest memory"), ("kept", "it takes too much of the host's memory")]
)
def test_bytes_are_limited_too(what: str, why: str) -> None:
    budget = Budget(looked=4 << 20, kept=4 << 20)
    spent = 0
    with budget.part("reading") as part:
        while True:
            part.spend(**{what: 4096})
            spent += 4096
    assert spent == 2 << 20
    assert why in budget.notes[0]


def test_each_part_has_half_of_what_the_others_left(clock: Any) -> None:
    budget, seconds = Budget(seconds=16.0), []
    for _ in range(4):
        begun = clock.at
        with budget.part("a part") as part:
            while True:
                clock.at += 0.125
                part.spend()
        seconds.append(clock.at - begun)
    assert seconds == pytest.approx([8, 4, 2, 1], abs=0.3)


def test_what_a_part_did_not_use_is_there_for_the_next() -> None:
    budget = Budget(looked=1000, kept=1000)
    for _ in range(3):
        with budget.part("a little") as part:
            part.spend(looked=100, kept=100)
    with budget.part("the rest") as part:
        part.spend(looked=350, kept=350)
    assert not budget.notes
    with budget.part("more") as part:
        part.spend(kept=200)
    assert len(budget.notes) == 1


def test_a_budget_without_parts_raises_and_other_errors_come_through() -> None:
    with pytest.raises(Spent, match="looking at the guest was ended"):
        Budget(looked=10).spend(looked=11)
    with pytest.raises(KeyError), Budget().part("x"):
        raise KeyError("x")


def test_time_in_which_another_machine_runs_is_not_spent(clock: Any) -> None:
    budget = Budget(seconds=8.0)
    with budget.aside():
        clock.at += 100.0
    with budget.part("the rest") as part:
        part.spend()
    assert not budget.notes
