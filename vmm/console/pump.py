"""Move console bytes between a machine and its back end, on the calling thread.

A slow peer delays the guest, without a loss of bytes, but never the monitor: the time limit, signals and Ctrl-A x work
even if the peer stops reading.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING, Protocol

from vmm import slow_reader
from vmm.console.host_end import PeerGone
from vmm.slow_reader import CHUNK

if TYPE_CHECKING:
    from vmm.console.guest_end import Console
    from vmm.console.host_end import HostEnd

    class Limits(Protocol):
        """Decides when a run must end: :class:`vmm.observe.watch.Watch`."""

        @property
        def left(self) -> float: ...
        def due(self) -> int | None: ...

    class Served(Protocol):
        """A machine that runs while its console is served."""

        @property
        def console(self) -> Console: ...
        @property
        def stop_fd(self) -> int: ...
        def limits(self, timeout: float | None = None) -> Limits | None: ...
        def interrupt(self, code: int) -> None: ...


ESCAPE = 0x01  # Ctrl-A
HELP = "\nCtrl-A x  quit\nCtrl-A h  this help (also Ctrl-A c)\nCtrl-A Ctrl-A  send Ctrl-A\n"
LAST_WORDS = 256 << 10  # bytes read from a peer that has closed: a socket's default buffer


class _Pump:
    def __init__(self, machine: Served, end: HostEnd) -> None:
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
        """Write until there is no more output or the peer takes no more."""
        fd = self.end.out_fd
        self.refill()
        while self.pending and fd is not None:
            try:
                n = os.write(fd, self.pending[:CHUNK])
            except BlockingIOError:
                break
            except OSError:  # EPIPE, ECONNRESET, EIO: the reader has closed
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
            self.take_last_words()  # the next peer gets what this one did not read
        else:
            self.pending = b""
        self.console.pumped(None)
        self.end.peer_gone()

    def take_last_words(self) -> None:
        """Read what the peer wrote before it closed, also if a write detected the close."""
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
        """Wait for events once and handle them; return whether the machine still runs."""
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
        """Write the remaining output, as long as the peer takes any."""
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


def serve(machine: Served, end: HostEnd, timeout: float | None = None) -> None:
    """Move console bytes until the machine has ended. Stop it after ``timeout`` seconds, or when it stalls for the
    configured time.

    Raises :class:`PeerGone`, with the machine stopped, if the only possible peer closed or did not read everything.
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
