"""How hard property tests try: each says its own number of examples; `make fuzz` multiplies it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

_FUZZING = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
FUZZ_TIMES = 100

PATIENCE = 120.0
"""Seconds for what takes one on an idle host: only what hangs needs them."""


def examples(usual: int, fuzzing: int = 0) -> int:
    """``usual``, or under `make fuzz` ``fuzzing``, without which a hundred times as many."""
    return (fuzzing or usual * FUZZ_TIMES) if _FUZZING else usual


@contextlib.contextmanager
def bounded(*, seconds: float = 10.0, mebibytes: int = 256) -> Iterator[None]:
    """Fail what takes more processor time than that, be it without end, or makes this process so much larger."""

    def over(number: int, frame: object) -> NoReturn:
        raise AssertionError(f"it took more than {seconds:g} s of processor time")

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest
    assert grown < mebibytes << 10, f"it took {grown >> 10} MiB of memory"
