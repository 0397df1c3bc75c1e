"""Processes beside ours that serve a machine: each ends when its connection does, and is waited for."""

from __future__ import annotations

import contextlib
import os

PATIENCE = 2.0  # seconds for a process whose connection was closed to end by itself
_DYING = 1.0  # one that sleeps in the kernel dies later: not worth hanging for


def await_end(pidfd: int) -> None:
    """Wait until the process has ended, and kill it when it does not; closes ``pidfd``.

    It is readable once the process has let go of all that it had: ports, sockets, files (pidfd_open(2)).
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
