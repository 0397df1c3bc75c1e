"""The host's end of a machine's console: the terminal, a pty, a file, a UNIX socket, or nothing.

:func:`serve` moves bytes both ways on the calling thread until the machine ends. It holds the guest back when the
peer reads slowly (no byte is lost), never the monitor: a peer that stops reading altogether does not keep a time
limit, a signal or Ctrl-A x from working.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any

from vmm import slow_reader
from vmm.errors import ConfigError, VmmError
from vmm.printable import printable
from vmm.slow_reader import CHUNK

if TYPE_CHECKING:
    from vmm.console import Console
    from vmm.machine import Machine

ESCAPE = 0x01  # Ctrl-A
HELP = "\nCtrl-A x  quit\nCtrl-A h  this help (also Ctrl-A c)\nCtrl-A Ctrl-A  send Ctrl-A\n"
LAST_WORDS = 256 << 10  # bytes taken of a peer that has closed: what a socket holds by default
UNREAD_SECONDS = 1.0  # how long an ended machine's pty waits for its reader


class PeerGone(VmmError):
    """Whoever read the console went away, or stopped reading until the end."""


class HostEnd:
    """Where console bytes go to and come from. ``None`` for a direction it has not.

    Subclasses open what they need in ``__init__`` and undo it in :meth:`close`. ``listen_fd`` is a file descriptor
    that turns readable when :meth:`accept` should be called; it is looked at only while there is no ``out_fd``.
    ``resumed_fd`` turns readable when :meth:`resumed` should be called.
    """

    in_fd: int | None = None
    out_fd: int | None = None
    listen_fd: int | None = None
    resumed_fd: int | None = None
    escapes = False
    raw = False  # standard error is likely the terminal that was put into raw mode

    def accept(self) -> None:
        """A peer is waiting at ``listen_fd``."""

    def resumed(self) -> None:
        """The process goes on after a stop, or as another job of its terminal."""

    def peer_gone(self) -> None:
        """The peer closed its end. Raises :class:`PeerGone` when there can be no other."""
        raise PeerGone("the console's reader went away; the guest was stopped (use --console none to run without)")

    def say(self, text: str) -> None:
        """Print one line of the monitor's own on standard error, from any thread, without waiting for its reader."""
        newline = "\r\n" if self.raw else "\n"
        slow_reader.say(f"{newline if self.raw else ''}pyvmm: {printable(text)}{newline}", newline)

    def show(self, data: bytes) -> bytes:
        """What of the guest's output goes out."""
        return data

    def close(self) -> None:
        """Give everything back."""


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
            if sys.stdout is None:  # the process was started so; what is on the descriptor now is not for a guest
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
        with contextlib.suppress(ValueError):  # not the main thread, which alone may handle signals
            self._handler = signal.signal(signal.SIGCONT, lambda *_: os.eventfd_write(resumed, 1))

    def resumed(self) -> None:
        """Take the terminal if this is its foreground job now; else leave it alone."""
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
        """Restore the terminal, unless it is another job's."""
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
    """Whether this process may read the terminal and set its mode: also where it is not the controlling one, which
    knows no jobs."""
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
        # Closing hangs the terminal up, and what its reader has not read by then is gone.
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
    """Output into a file, which is truncated; no input."""

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
        """Take a client."""
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
    """The host end for a console of this kind (see ``vmm.config.CONSOLES``)."""
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


class _Pump:
    def __init__(self, machine: Machine, end: HostEnd) -> None:
        self.machine = machine
        self.console: Console = machine.console
        self.end = end
        self.position = 0
        self.pending = b""
        self.typed = b""
        self.in_escape = False
        self.input_open = True
        self.quit = False

    # output: guest -> peer

    def refill(self) -> None:
        if not self.pending:
            data, self.position = self.console.output(self.position)
            self.pending = self.end.show(data)

    def write(self) -> None:
        """Write until there is no more or the peer is full."""
        fd = self.end.out_fd
        self.refill()
        while self.pending and fd is not None:
            try:
                n = os.write(fd, self.pending[:CHUNK])
            except BlockingIOError:
                break
            except OSError:  # EPIPE, ECONNRESET, EIO: the reading side is closed
                self.gone()
                return
            self.pending = self.pending[n:]
            self.refill()
            if self.pending and not select.select([], [fd], [], 0)[1]:
                break  # also for descriptors that could not be made non-blocking
        if fd is not None:
            self.console.pumped(self.position - len(self.pending))

    def gone(self) -> None:
        if self.end.listen_fd is not None:
            self.take_last_words()  # and what it did not get is the next one's
        else:
            self.pending = b""
        self.console.pumped(None)
        self.end.peer_gone()

    def take_last_words(self) -> None:
        """What the peer wrote before it closed is the guest's, also where a write was the first to notice."""
        assert self.end.in_fd is not None
        with contextlib.suppress(OSError):
            while len(self.typed) < LAST_WORDS and (data := os.read(self.end.in_fd, CHUNK)):
                self.typed += data
        self.type()

    # input: peer -> guest

    def read(self) -> None:
        assert self.end.in_fd is not None
        try:
            data = os.read(self.end.in_fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if self.end.listen_fd is not None:
                self.gone()
            else:
                self.input_open = False
            return
        self.typed += self.unescape(data) if self.end.escapes else data
        self.type()

    def type(self) -> None:
        self.typed = self.typed[self.console.offer(self.typed) :] if self.typed else b""

    def unescape(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            if not self.in_escape:
                if byte == ESCAPE:
                    self.in_escape = True
                else:
                    out.append(byte)
                continue
            self.in_escape = False
            if byte in b"xX":
                self.quit = True
                return bytes(out)
            if byte in b"hHcC?":
                slow_reader.say(HELP)
            elif byte == ESCAPE:
                out.append(byte)
        return bytes(out)

    # both

    def wait(self, timeout: float | None) -> bool:
        """One round: wait for something to do and do it. Answers whether the machine goes on."""
        end, console = self.end, self.console
        reading = [self.machine.stop_fd]
        writing = []
        if end.listen_fd is not None and end.out_fd is None:
            reading.append(end.listen_fd)
        if end.in_fd is not None and self.input_open and not self.typed:
            reading.append(end.in_fd)
        if end.resumed_fd is not None:
            reading.append(end.resumed_fd)
        if self.typed:
            reading.append(console.room_fd)
        if self.pending and end.out_fd is not None:
            writing.append(end.out_fd)
        elif end.out_fd is not None:
            reading.append(console.output_fd)
        readable, writable, _ = select.select(reading, writing, [], timeout)
        if end.resumed_fd in readable:
            end.resumed()
        if end.listen_fd in readable:
            end.accept()
            if end.out_fd is not None:
                console.pumped(self.position - len(self.pending))
        if console.output_fd in readable:
            console.clear_output()
            self.write()
        elif writable:
            self.write()
        if console.room_fd in readable:
            console.clear_room()
            self.type()
        if end.in_fd is not None and end.in_fd in readable:
            self.read()
        return self.machine.stop_fd not in readable

    def drain(self) -> None:
        """Write out what is left, as long as the peer takes any."""
        deadline = time.monotonic() + slow_reader.PATIENCE
        while self.end.out_fd is not None:
            before = self.position - len(self.pending)
            self.write()
            if not self.pending:
                return
            if self.position - len(self.pending) > before:
                deadline = time.monotonic() + slow_reader.PATIENCE
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([], [self.end.out_fd], [], left)[1]:
                lost = self.console.end - self.position + len(self.pending)
                raise PeerGone(f"the console's reader stopped reading: {lost} bytes were not delivered")


def serve(machine: Machine, end: HostEnd, timeout: float | None = None) -> None:
    """Move console bytes until the machine has ended or ``timeout`` seconds have passed (it is stopped then), or it has
    stalled as its configuration has it.

    Raises :class:`PeerGone` (machine stopped) when the only possible peer went away or did not take everything.
    """
    pump = _Pump(machine, end)
    if end.out_fd is not None:
        machine.console.pumped(0)
        pump.write()
    limits = machine.limits(timeout)
    try:
        while True:
            if not pump.wait(limits.left if limits else None):
                break
            if pump.quit:
                machine.interrupt(0)
            elif limits and (code := limits.due()):
                machine.interrupt(code)
        pump.drain()
    except PeerGone:
        machine.interrupt(0)
        raise
    finally:
        machine.console.pumped(None)
