"""Writing to a descriptor whose reader may be slow, or may have stopped reading.

A guest decides what the monitor prints and when: messages, console, trace. No write may wait for a reader without a
bound, because the time limit and signals would wait with it.
"""

from __future__ import annotations

import os
import select
import stat
import threading

from vmm.printable import printable_lines

PATIENCE = 2.0  # seconds without progress after which a reader counts as one that has stopped
CHUNK = 4096  # PIPE_BUF: a pipe that polls writable takes this much without blocking, whole or not at all


class ReaderStopped(Exception):
    """The reader took nothing for :data:`PATIENCE` seconds."""


def nonblocking(fd: int) -> int | None:
    """Open a non-blocking description of the pipe or terminal behind ``fd``; ``None`` where there can be none.

    O_NONBLOCK belongs to the open file description, which our parent shares. A regular file keeps its shared offset
    and never blocks, a socket has no path: both are used as they are.
    """
    mode = os.fstat(fd).st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


class Outlet:
    """Writes to ``fd`` without ever blocking on it. A context manager; ``fd`` itself stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._own = nonblocking(fd)
        self.fd = fd if self._own is None else self._own

    def offer(self, data: bytes) -> int:
        """Write what the reader takes at once, of the first :data:`CHUNK` bytes; return how much that was.

        Raises ``OSError`` where there is no reader.
        """
        if self._own is None and not select.select([], [self.fd], [], 0)[1]:
            return 0
        try:
            return os.write(self.fd, data[:CHUNK])
        except BlockingIOError:
            return 0

    def deliver(self, data: bytes, *, bounded_from: int | None = None) -> None:
        """Write all of it, for as long as the reader takes any.

        Raises :class:`ReaderStopped` when it takes none for :data:`PATIENCE` seconds; with ``bounded_from``, a
        descriptor that turns readable, these count from then on, and until then the reader may take its time.
        Raises ``OSError`` where there is no reader.
        """
        while data:
            n = self.offer(data)
            data = data[n:]
            if n:
                continue
            patient = [] if bounded_from is None or select.select([bounded_from], [], [], 0)[0] else [bounded_from]
            if not any(select.select(patient, [self.fd], [], None if patient else PATIENCE)):
                raise ReaderStopped

    def close(self) -> None:
        """Close what was opened here. Idempotent."""
        if self._own is not None:
            os.close(self._own)
            self._own = None

    def __enter__(self) -> Outlet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_lock = threading.Lock()
_lost = 0  # messages lost since the last one printed; one count per process, as there is one standard error


def _note(newline: str = "\n") -> str:
    return f"pyvmm: {_lost} messages were lost: standard error was not read{newline}" if _lost else ""


def say(text: str, newline: str = "\n") -> None:
    """Print a message on standard error, from any thread, if that takes it at once; else count it as lost.

    The next message that is printed says how many were lost.
    """
    global _lost
    with _lock:
        try:
            with Outlet(2) as outlet:
                taken = outlet.offer(f"{_note(newline)}{text}".encode()[:CHUNK])
        except OSError:  # there is no reader, so nothing is lost
            return
        _lost = 0 if taken else _lost + 1


def report(text: str) -> None:
    """Print the final message of a command on standard error, for as long as the reader accepts bytes.

    Untrusted text in it is escaped: see :mod:`vmm.printable`.
    """
    import sys

    text = printable_lines(text)

    if sys.stderr is None:
        return
    try:
        sys.stderr.flush()
        fd = sys.stderr.fileno()
    except (OSError, ValueError):  # not a file, or one that is gone
        sys.stderr.write(text)
        return
    deliver(fd, f"{_note()}{text}".encode(errors="surrogateescape"))


def deliver(fd: int, data: bytes) -> None:
    """Call :meth:`Outlet.deliver`, and ignore a reader that has stopped or closed."""
    try:
        with Outlet(fd) as outlet:
            outlet.deliver(data)
    except (ReaderStopped, OSError):
        pass
