"""The console of a machine: what the guest prints is a log, what it is sent is a bounded queue."""

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
    """Guest output and input. Reading never holds the guest up; a pump (see ``vmm.cli``) may.

    ``position`` is how far :meth:`expect` and :meth:`read` have come; :attr:`transcript` is everything so far.
    """

    def __init__(self) -> None:
        out = ffi.new("vmm_console **")
        check(lib.vmm_console_create(INPUT_LIMIT, LOG_LIMIT, HIGH_WATER, out))
        self._native: Any = out[0]
        self.position = 0
        self.inputs = 0
        """Bytes of input that were queued ever."""

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
        """Queue what there is room for; answers how many bytes were taken."""
        taken = self._queue(data)
        self.inputs += taken
        return taken

    def _queue(self, data: bytes) -> int:
        return int(lib.vmm_console_send(self.native, data, len(data)))

    def pending(self) -> bytes:
        """Input that the guest has not taken yet; it stays queued. While the machine does not run."""
        queued = self._take_input()
        self._queue(queued)
        return queued

    def rewind(self, queued: bytes) -> None:
        """Be as at a checkpoint that had this input pending. What was printed stays in the transcript, and
        :attr:`position` goes behind it."""
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
        """Bytes the input queue can take now."""
        return int(lib.vmm_console_input_room(self.native))

    @property
    def end(self) -> int:
        """Bytes the guest has printed so far."""
        return int(lib.vmm_console_end(self.native))

    def output(self, start: int, size: int = 1 << 16) -> tuple[bytes, int]:
        """Up to ``size`` bytes from log position ``start``; answers them and where the next read starts."""
        buffer, position = ffi.new("uint8_t[]", size), ffi.new("uint64_t *", start)
        n = lib.vmm_console_read(self.native, position, buffer, size)
        return bytes(ffi.buffer(buffer, n)), int(position[0])

    def tail(self, size: int = 4096) -> bytes:
        """The last ``size`` bytes printed."""
        return self.output(max(0, self.end - size), size)[0]

    @property
    def transcript(self) -> bytes:
        """Everything printed so far (the newest 64 MiB)."""
        at = 0
        parts: list[bytes] = []
        while True:
            part, at = self.output(at)
            if not part:
                return b"".join(parts)
            parts.append(part)

    def read(self) -> bytes:
        """What was printed since the last :meth:`read` or :meth:`expect`."""
        parts: list[bytes] = []
        while True:
            part, self.position = self.output(self.position)
            if not part:
                return b"".join(parts)
            parts.append(part)

    def expect(self, pattern: bytes | str, timeout: float = 10.0) -> re.Match[bytes]:
        """Wait until ``pattern`` (a regular expression) appears in output not yet consumed; consume through it.

        The match is the leftmost in what has come. One shorter than 4 KiB is found at once; a longer one when the
        guest falls silent, ends, or has printed as much again: so the cost stays proportional to the output.

        Raises :class:`~vmm.errors.ConsoleTimeout` with the transcript when ``timeout`` seconds pass, or at once
        when the machine has ended and the pattern is not there.
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
        """Wait ``timeout`` seconds for output past ``position``: whether there is. None comes of a closed console."""

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
        """Whether the machine has ended: no more output will come."""
        return bool(lib.vmm_console_closed(self.native))

    # for a pump

    @property
    def output_fd(self) -> int:
        """An eventfd that turns readable when there is output past the pump's position."""
        return int(lib.vmm_console_output_fd(self.native))

    @property
    def room_fd(self) -> int:
        """An eventfd that turns readable when the guest took input after :meth:`offer` took less than given."""
        return int(lib.vmm_console_room_fd(self.native))

    def clear_room(self) -> None:
        """Reset :attr:`room_fd`."""
        _drain(self.room_fd)

    def clear_output(self) -> None:
        """Reset :attr:`output_fd`."""
        _drain(self.output_fd)

    def pumped(self, position: int | None) -> None:
        """The pump has written out everything before ``position``; None: there is no pump any more."""
        lib.vmm_console_set_pump(self.native, (1 << 64) - 1 if position is None else position)

    def close(self) -> None:
        """No more output will come: waiters return."""
        lib.vmm_console_close(self.native)

    def reopen(self) -> None:
        """The machine goes on after an end."""
        lib.vmm_console_reopen(self.native)

    def destroy(self) -> None:
        """Free it, after every device that uses it."""
        if self._native is not None:
            lib.vmm_console_destroy(self._native)
            self._native = None


class _Search:
    """A pattern looked for in output as it comes, at a cost proportional to the output.

    New output is searched together with the :data:`OVERLAP` bytes before it. The whole is searched when that finds
    something (a longer match may begin further left), when it has doubled, and at :meth:`last_look`.
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
        """Read all there is; answers the leftmost match, if the new output completed one."""
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
        """The same once nothing new comes: for matches longer than the overlap."""
        return self.look() or (self._search_all() if self.searched < len(self.seen) else None)

    def conclude(self, left: float, timeout: float) -> re.Match[bytes] | None:
        """Nothing new came while ``left`` seconds of ``timeout`` were left: the match if there is one after all, and
        ``None`` to wait on. Raises :class:`~vmm.errors.ConsoleTimeout` when nothing more can come."""
        over = left <= 0 or self.console.closed  # before the last look: what came until then is seen by it
        match = self.last_look()
        if match is None and over:
            raise self.failure(timeout)
        return match

    def _search_all(self) -> re.Match[bytes] | None:
        self.searched = len(self.seen)
        return self.compiled.search(bytes(self.seen))

    def patience(self, left: float) -> float:
        """Seconds to wait for output when ``left`` seconds are left."""
        return left if self.searched == len(self.seen) else min(left, SILENCE_MS / 1000)

    def failure(self, timeout: float) -> ConsoleTimeout:
        """The pattern did not come."""
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
