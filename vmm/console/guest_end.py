"""The console of a machine: a log of the guest's output, and a bounded queue of its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib, wait
from vmm.errors import ConfigError, ConsoleTimeout, StateError
from vmm.printable import printable

if TYPE_CHECKING:
    import re

INPUT_LIMIT = 64 << 10
LOG_LIMIT = 64 << 20
HIGH_WATER = 1 << 20
OVERLAP = 4 << 10
SILENCE_MS = 50


class Console:
    """Guest output and input. Reading never delays the guest; a pump (:mod:`vmm.console.pump`) can.

    ``position`` is the end of what :meth:`expect` and :meth:`read` have consumed; :attr:`transcript` is everything.
    """

    def __init__(self) -> None:
        out = ffi.new("vmm_console **")
        check(lib.vmm_console_create(INPUT_LIMIT, LOG_LIMIT, HIGH_WATER, out))
        self._native: Any = out[0]
        self.position = 0
        self.inputs = 0
        """Total bytes of input queued so far."""

    @property
    def native(self) -> Any:
        """The native console. Raises :class:`~vmm.errors.StateError` when its machine is closed."""
        if self._native is None:
            raise StateError("the machine is closed, and its console with it: read the transcript before that")
        return self._native

    def send(self, data: bytes | str) -> None:
        """Queue bytes for the guest; blocks while its input queue is full (64 KiB)."""
        data = data.encode() if isinstance(data, str) else data
        while data:
            taken = self.offer(data)
            data = data[taken:]
            if data:
                import select

                select.select([lib.vmm_console_room_fd(self.native)], [], [], 0.1)
                self.clear_room()

    def offer(self, data: bytes) -> int:
        """Queue as many bytes as there is room for; return their number."""
        taken = self._queue(data)
        self.inputs += taken
        return taken

    def _queue(self, data: bytes) -> int:
        return int(lib.vmm_console_send(self.native, data, len(data)))

    def pending(self) -> bytes:
        """Return the input that the guest has not read yet; it stays queued. The machine must not run."""
        queued = self._take_input()
        self._queue(queued)
        return queued

    def rewind(self, queued: bytes) -> None:
        """Roll back to a checkpoint that had this input pending. Output stays in the transcript, and :attr:`position`
        moves to its end."""
        self._take_input()
        self._queue(queued)
        self.position = self.end

    def _take_input(self) -> bytes:
        taken = bytearray()
        while (byte := lib.vmm_console_get(self.native)) >= 0:
            taken.append(byte)
        return bytes(taken)

    @property
    def room(self) -> int:
        """Return the free bytes of the input queue."""
        return int(lib.vmm_console_input_room(self.native))

    @property
    def end(self) -> int:
        """Total bytes of output so far."""
        return int(lib.vmm_console_end(self.native))

    def output(self, start: int, size: int = 1 << 16) -> tuple[bytes, int]:
        """Return up to ``size`` bytes from log position ``start``, and the position of the next read."""
        buffer, position = ffi.new("uint8_t[]", size), ffi.new("uint64_t *", start)
        n = lib.vmm_console_read(self.native, position, buffer, size)
        return bytes(ffi.buffer(buffer, n)), int(position[0])

    def tail(self, size: int = 4096) -> bytes:
        """Return the last ``size`` bytes of output."""
        return self.output(max(0, self.end - size), size)[0]

    @property
    def transcript(self) -> bytes:
        """All output so far (the newest 64 MiB)."""
        at = 0
        parts: list[bytes] = []
        while True:
            part, at = self.output(at)
            if not part:
                return b"".join(parts)
            parts.append(part)

    def read(self) -> bytes:
        """Return the output since the last :meth:`read` or :meth:`expect`."""
        parts: list[bytes] = []
        while True:
            part, self.position = self.output(self.position)
            if not part:
                return b"".join(parts)
            parts.append(part)

    def expect(self, pattern: bytes | str, timeout: float = 10.0) -> re.Match[bytes]:
        """Wait until ``pattern`` (a regular expression) appears in output not yet consumed; consume through it.

        The match is the leftmost in the output so far. One shorter than 4 KiB is found at once; a longer one when the
        guest falls silent, ends, or has doubled its output: so the cost stays proportional to the output.

        Raises :class:`~vmm.errors.ConsoleTimeout` with the transcript after ``timeout`` seconds, or at once if the
        machine has ended and the pattern does not match.
        """
        import time

        deadline = time.monotonic() + timeout
        search = _Search(pattern, self)
        while not (match := search.look()):
            left = deadline - time.monotonic()
            if left > 0 and self._wait(search.at, search.patience(left)):
                continue
            if match := search.conclude(left, timeout):
                break
        self.position = search.start + match.end()
        return match

    def _wait(self, position: int, timeout: float) -> bool:
        """Wait ``timeout`` seconds for output past ``position``; return whether there is any. A closed console has
        none."""

        def turn(milliseconds: int) -> int:
            return int(lib.vmm_console_wait(self.native, position, milliseconds)) or -int(self.closed)

        return wait(turn, timeout) > 0

    async def expect_async(self, pattern: bytes | str, timeout: float = 10.0) -> re.Match[bytes]:
        """:meth:`expect` for asyncio: the event loop goes on meanwhile. One task at a time."""
        import time

        from vmm import aio

        deadline = time.monotonic() + timeout
        search = _Search(pattern, self)
        while not (match := search.look()):
            left = deadline - time.monotonic()
            fd = lib.vmm_console_await(self.native, search.at)
            if left > 0 and await aio.readable(fd, search.patience(left)) and self.end > search.at:
                continue
            if match := search.conclude(left, timeout):
                break
        self.position = search.start + match.end()
        return match

    @property
    def closed(self) -> bool:
        """Whether the machine has ended, so that no more output will come."""
        return bool(lib.vmm_console_closed(self.native))

    # for a pump

    @property
    def output_fd(self) -> int:
        """An eventfd that becomes readable when there is output past the pump's position."""
        return int(lib.vmm_console_output_fd(self.native))

    @property
    def room_fd(self) -> int:
        """An eventfd that becomes readable when the guest reads input after :meth:`offer` queued less than given."""
        return int(lib.vmm_console_room_fd(self.native))

    def clear_room(self) -> None:
        """Reset :attr:`room_fd`."""
        _drain(self.room_fd)

    def clear_output(self) -> None:
        """Reset :attr:`output_fd`."""
        _drain(self.output_fd)

    def pumped(self, position: int | None) -> None:
        """Report that the pump has written everything before ``position``; ``None`` if there is no pump any more."""
        lib.vmm_console_set_pump(self.native, (1 << 64) - 1 if position is None else position)

    def close(self) -> None:
        """Mark the end of output, and wake all waiters."""
        lib.vmm_console_close(self.native)

    def reopen(self) -> None:
        """Undo :meth:`close`, for a machine that runs again."""
        lib.vmm_console_reopen(self.native)

    def destroy(self) -> None:
        """Free the console, after every device that uses it."""
        if self._native is not None:
            lib.vmm_console_destroy(self._native)
            self._native = None


class _Search:
    """Incremental search for a pattern, at a cost proportional to the output.

    New output is searched together with the :data:`OVERLAP` bytes before it. The whole is searched when that matches (a
    longer match may begin further left), when it has doubled, and by :meth:`last_look`.
    """

    def __init__(self, pattern: bytes | str, console: Console) -> None:
        import re

        try:
            self.compiled = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error
        self.pattern = pattern
        self.console = console
        self.start = self.at = console.position
        self.seen = bytearray()
        self.searched = 0  # bytes of `seen` that were searched as a whole

    def look(self) -> re.Match[bytes] | None:
        """Read the new output; return the leftmost match if it completed one."""
        while True:
            part, self.at = self.console.output(self.at)
            if not part:
                return None
            overlap = max(0, len(self.seen) - OVERLAP)
            self.seen += part
            if len(self.seen) >= 2 * self.searched or self.compiled.search(self.seen, overlap):
                match = self._search_all()
                if match:
                    return match

    def last_look(self) -> re.Match[bytes] | None:
        """Search the whole, for matches longer than the overlap, when no new output comes."""
        return self.look() or (self._search_all() if self.searched < len(self.seen) else None)

    def conclude(self, left: float, timeout: float) -> re.Match[bytes] | None:
        """After a wait without output, with ``left`` seconds of ``timeout`` left: return a match, or ``None`` to wait
        again. Raises :class:`~vmm.errors.ConsoleTimeout` when nothing more can come."""
        over = left <= 0 or self.console.closed  # read before the last search, which then sees all output until now
        match = self.last_look()
        if match is None and over:
            raise self.failure(timeout)
        return match

    def _search_all(self) -> re.Match[bytes] | None:
        self.searched = len(self.seen)
        return self.compiled.search(bytes(self.seen))

    def patience(self, left: float) -> float:
        """Return the seconds to wait for output when ``left`` seconds are left."""
        return left if self.searched == len(self.seen) else min(left, SILENCE_MS / 1000)

    def failure(self, timeout: float) -> ConsoleTimeout:
        """Return the exception for a pattern that did not match."""
        why = "before the machine ended" if self.console.closed else f"within {timeout:g} s"
        return ConsoleTimeout(
            f"the guest did not print {self.pattern!r} {why}; the end of what it printed: "
            f"{printable(repr(self.console.tail(200).decode(errors='replace')))}",
            self.console.transcript,
        )


def _drain(fd: int) -> None:
    import contextlib
    import os

    with contextlib.suppress(BlockingIOError):
        os.read(fd, 8)
