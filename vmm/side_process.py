"""Child processes that serve a machine: each ends when its connection closes, and is waited for."""

from __future__ import annotations

import contextlib
import os

PATIENCE = 2.0  # seconds for a process whose connection was closed to end by itself
_DYING = 1.0  # after SIGKILL; a process in uninterruptible sleep ends later and is not waited for


def await_end(pidfd: int) -> None:
    """Wait until the process has ended, and kill it after :data:`PATIENCE` seconds; closes ``pidfd``.

    ``pidfd`` is readable once the process has released its ports, sockets and files (pidfd_open(2)).
    """
    import select
    import signal

    try:
        if select.select([pidfd], [], [], PATIENCE)[0]:
            return
        with contextlib.suppress(OSError):  # it has ended meanwhile, or runs as another user
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], _DYING)
    finally:
        os.close(pidfd)
