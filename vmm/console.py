"""The console of a machine: what the guest prints is a log, what it is sent is a bounded queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.errors import ConsoleTimeout

if TYPE_CHECKING:
    import re

INPUT_LIMIT = 64 << 10
LOG_LIMIT = 64 << 20
HIGH_WATER = 1 << 20


class Console:
    """Guest output and input. Reading never holds the guest up; a pump (see ``vmm.cli``) may.

    ``position`` is how far :meth:`expect` and :meth:`read` have come; :attr:`transcript` is everything so far.
    """

    def __init__(self) -> None:
        out = ffi.new("vmm_console **")
        check(lib.vmm_console_create(INPUT_LIMIT, LOG_LIMIT, HIGH_WATER, out))
        self.native: Any = out[0]
        self.position = 0

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
        return int(lib.vmm_console_send(self.native, data, len(data)))

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

        Raises :class:`~vmm.errors.ConsoleTimeout` with the transcript when ``timeout`` seconds pass, or at once
        when the machine has ended and the pattern is not there.
        """
        import re
        import time

        compiled = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        deadline = time.monotonic() + timeout
        start, seen, at = self.position, b"", self.position
        while True:
            part, at = self.output(at)
            seen += part
            match = compiled.search(seen)
            if match:
                self.position = start + match.end()
                return match
            if part:
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not lib.vmm_console_wait(self.native, at, max(1, int(left * 1000))):
                if self.end > at:
                    continue
                why = f"within {timeout:g} s" if time.monotonic() >= deadline else "before the machine ended"
                raise ConsoleTimeout(
                    f"the guest did not print {pattern!r} {why}; the end of what it printed: "
                    f"{self.tail(200).decode(errors='replace')!r}",
                    self.transcript,
                )

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

    def destroy(self) -> None:
        """Free it, after every device that uses it."""
        if self.native is not None:
            lib.vmm_console_destroy(self.native)
            self.native = None


def _drain(fd: int) -> None:
    import contextlib
    import os

    with contextlib.suppress(BlockingIOError):
        os.read(fd, 8)
