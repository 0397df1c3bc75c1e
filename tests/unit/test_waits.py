"""Waits in native code: they end in time, and a signal's handler runs meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from vmm._ffi import wait
from vmm.console import Console
from vmm.errors import ConsoleTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Told(Exception):
    """What the handler raises."""


@pytest.fixture
def signalled() -> Iterator[Callable[[], None]]:
    """A function that has this thread, the main one, take a signal whose handler raises Told, soon."""

    def told(number: int, frame: Any) -> None:
        raise Told

    before = signal.signal(signal.SIGUSR1, told)
    timers: list[threading.Timer] = []

    def soon() -> None:
        timers.append(threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)))
        timers[-1].start()

    yield soon
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGUSR1, before)


def test_a_wait_is_made_of_short_ones_and_returns_what_the_last_said() -> None:
    slices: list[int] = []

    def native(milliseconds: int) -> int:
        slices.append(milliseconds)
        return 7 if len(slices) == 3 else 0

    assert wait(native, None) == 7
    assert wait(lambda milliseconds: -5, 100) == -5
    assert len(slices) == 3 and max(slices) <= 100


def test_a_wait_is_over_when_its_time_is_up() -> None:
    slices: list[int] = []

    def native(milliseconds: int) -> int:
        slices.append(milliseconds)
        time.sleep(milliseconds / 1000)
        return 0

    began = time.monotonic()
    assert wait(native, 0.25) == 0
    assert time.monotonic() - began >= 0.25
    assert wait(native, 0) == 0 and slices[-1] == 0
    assert wait(native, -1) == 0 and slices[-1] == 0


def test_a_signal_ends_a_wait_for_output_that_never_comes(signalled: Callable[[], None]) -> None:
    console = Console()
    try:
        with pytest.raises(Told):
            signalled()
            console.expect("never", timeout=3600)
    finally:
        console.destroy()


def test_output_of_a_closed_console_is_not_waited_for() -> None:
    console = Console()
    try:
        console.close()
        with pytest.raises(ConsoleTimeout, match="before the machine ended"):
            console.expect("never", timeout=3600)
    finally:
        console.destroy()
