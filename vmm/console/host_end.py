"""Back ends of a machine's console: the terminal, a pty, a file, a UNIX socket, or nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from vmm import slow_reader
from vmm.errors import ConfigError, VmmError
from vmm.printable import printable

UNREAD_SECONDS = 1.0  # seconds that an ended machine's pty waits for its reader


class PeerGone(VmmError):
    """The console's reader closed its end, or stopped reading until the end of the run."""


class HostEnd:
    """Back end of a console: descriptors for output and input, ``None`` for a direction it lacks.

    Subclasses open what they need in ``__init__`` and release it in :meth:`close`. ``listen_fd`` becomes readable when
    :meth:`accept` is to be called, and is polled only while there is no ``out_fd``. ``resumed_fd`` becomes readable
    when :meth:`resumed` is to be called.
    """

    in_fd: int | None = None
    out_fd: int | None = None
    listen_fd: int | None = None
    resumed_fd: int | None = None
    escapes = False
    raw = False  # standard error is probably the terminal that is in raw mode

    def accept(self) -> None:
        """Accept a peer that waits at ``listen_fd``."""

    def resumed(self) -> None:
        """React to SIGCONT: the process continues after a stop, or as another job of its terminal."""

    def peer_gone(self) -> None:
        """React to a peer that closed its end. Raises :class:`PeerGone` if there can be no other."""
        raise PeerGone("the console's reader went away; the guest was stopped (use --console none to run without)")

    def say(self, text: str) -> None:
        """Print a message of the monitor on standard error, from any thread, without waiting for its reader."""
        newline = "\r\n" if self.raw else "\n"
        slow_reader.say(f"{newline if self.raw else ''}pyvmm: {printable(text)}{newline}", newline)

    def show(self, data: bytes) -> bytes:
        """Return the part of the guest's output to print."""
        return data

    def close(self) -> None:
        """Release all resources."""


class Stdio(HostEnd):
    """Standard input and output; a terminal is put into raw mode and restored by :meth:`close`.

    Without ``keyboard`` it is the output alone, and the terminal stays as it is: Ctrl-C is SIGINT. A job in the
    background of its terminal may neither read it nor set its mode (the kernel would stop the process: SIGTTIN,
    SIGTTOU): it runs without input, and takes the terminal when it is continued in the foreground (SIGCONT).
    """

    def __init__(self, *, keyboard: bool = True) -> None:
        self._saved: Any = None
        self._handler: Any = None
        self._own: int | None = None
        try:
            os.fstat(0)
            self.in_fd = 0 if keyboard else None
        except OSError:
            self.in_fd = None
        try:
            if sys.stdout is None:  # started without standard output; descriptor 1 is something else
                raise OSError
            self._own = slow_reader.nonblocking(1)
        except OSError as error:
            raise ConfigError("standard output is closed: use --console none, file:PATH or unix:PATH") from error
        self.out_fd = 1 if self._own is None else self._own
        if self.in_fd is not None and os.isatty(0):
            self._follow_job_control()
            self._take_terminal()
            if not self.raw:
                self.say("in the background of its terminal, the guest gets no input: bring it to the foreground (fg)")

    def _follow_job_control(self) -> None:
        import signal

        resumed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.resumed_fd = resumed
        with contextlib.suppress(ValueError):  # only the main thread can set signal handlers
            self._handler = signal.signal(signal.SIGCONT, lambda *_: os.eventfd_write(resumed, 1))

    def resumed(self) -> None:
        """Take the terminal if this is its foreground job now."""
        assert self.resumed_fd is not None
        os.eventfd_read(self.resumed_fd)
        self._take_terminal()

    def _take_terminal(self) -> None:
        import termios

        if not _in_foreground(0):
            self.in_fd = None
            self.raw = self.escapes = False
            return
        if self._saved is None:
            self._saved = termios.tcgetattr(0)
        raw = termios.tcgetattr(0)
        raw[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON | termios.INLCR)
        raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
        termios.tcsetattr(0, termios.TCSADRAIN, raw)
        self.in_fd = 0
        self.raw = self.escapes = True

    def close(self) -> None:
        """Restore the terminal, unless another job has it."""
        if self._saved is not None and _in_foreground(0):
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
        self._saved = None
        self.raw = False
        if self._handler is not None:
            import signal

            signal.signal(signal.SIGCONT, self._handler)
            self._handler = None
        for fd in (self._own, self.resumed_fd):
            if fd is not None:
                os.close(fd)
        self._own = self.resumed_fd = None


def _in_foreground(terminal: int) -> bool:
    """Return whether this process may read the terminal and set its mode. It always may if it is not its controlling
    terminal, to which job control does not apply."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


class Pty(HostEnd):
    """A new pseudo-terminal; its path is printed so that a terminal program can open it."""

    def __init__(self) -> None:
        import tty

        master, self._slave = os.openpty()  # the slave stays open: without a reader, output waits in the pty
        tty.setraw(self._slave)
        os.set_blocking(master, False)
        self.in_fd = self.out_fd = master
        self.path = os.ttyname(self._slave)
        self.say(f"console is {self.path}")

    def _let_it_be_read(self) -> None:
        # Closing hangs up the terminal, which discards output that was not read.
        import fcntl
        import termios

        deadline = time.monotonic() + UNREAD_SECONDS
        while int.from_bytes(fcntl.ioctl(self._slave, termios.FIONREAD, bytes(4)), "little"):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)

    def close(self) -> None:
        """Close both ends."""
        if self.in_fd is not None:
            self._let_it_be_read()
            os.close(self.in_fd)
            os.close(self._slave)
            self.in_fd = self.out_fd = None


class File(HostEnd):
    """Write output to a file, which is truncated; no input."""

    def __init__(self, path: str) -> None:
        try:
            self.out_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write the console to {path}: {error.strerror}; choose another file") from error

    def close(self) -> None:
        """Close the file."""
        if self.out_fd is not None:
            os.close(self.out_fd)
            self.out_fd = None


class Unix(HostEnd):
    """A listening UNIX socket. One client at a time, the next one waits; without one, output is only logged."""

    def __init__(self, path: str) -> None:
        from vmm.private_socket import PrivateSocket

        self._client: Any = None
        self._named = PrivateSocket(path, f"cannot listen on console socket {path}", 1)
        self._server = self._named.socket
        self._server.setblocking(False)
        self.listen_fd = self._server.fileno()

    def accept(self) -> None:
        """Accept a client."""
        try:
            client, _ = self._server.accept()
        except BlockingIOError:
            return
        client.setblocking(False)
        self._client = client
        self.in_fd = self.out_fd = client.fileno()

    def peer_gone(self) -> None:
        """Wait for the next client."""
        self._client.close()
        self._client = self.in_fd = self.out_fd = None

    def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._client is not None:
            self.peer_gone()
        if self.listen_fd is not None:
            self._named.close()
            self.listen_fd = None


def open_end(kind: str) -> HostEnd:
    """Return the back end of a console of this kind (``vmm.config.CONSOLES``)."""
    name, _, path = kind.partition(":")
    if name == "stdio":
        return Stdio()
    if name == "pty":
        return Pty()
    if name == "file":
        return File(path)
    if name == "unix":
        return Unix(path)
    return HostEnd()
