"""Being somebody else for a while: what an ordinary user may do, also where the tests are run by root."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
_PR_SET_DUMPABLE = 4


@contextlib.contextmanager
def ordinary_user() -> Iterator[int]:
    """The process has the rights of a user without any within; programs it starts have no way back. Yields its uid."""
    if os.geteuid() != 0:
        yield os.geteuid()
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    # The kernel gave our /proc files to root when the user changed; those of one who logged in are that user's.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    try:
        yield NOBODY
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)
