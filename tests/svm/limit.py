"""A pytest plugin that ends a test which takes too long, whatever its threads are doing.

pytest-timeout has the same limit, and goes first where the interpreter still runs: it costs the test alone. Where it
does not, ``faulthandler`` writes every thread's stack and ends the process from a thread of its own that needs no
interpreter lock. Under pytest-xdist that process is a worker: the test is reported as the one that crashed it, by name,
and the run goes on in another worker.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

SECONDS = float(os.environ.get("SVM_TEST_LIMIT", "600"))

# pytest replaces descriptor 2 while a test runs; a worker that ends so leaves the replacement behind, unread.
_stderr = os.fdopen(os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2), "w")

_GRACE = float(os.environ.get("SVM_TEST_GRACE", "60"))  # seconds that pytest-timeout goes before

_limit = pytest.StashKey[float]()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give the test twice its own limit, or :data:`SECONDS`."""
    marker = item.get_closest_marker("timeout")
    own = float(marker.args[0]) if marker is not None and marker.args else 0.0
    item.stash[_limit] = max(SECONDS, 2 * own)
    item.add_marker(pytest.mark.timeout(item.stash[_limit]), append=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Have the process ended when the test, with its fixtures, is not over in time."""
    _stderr.flush()
    faulthandler.dump_traceback_later(item.stash[_limit] + _GRACE, exit=True, file=_stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
