"""Who owns a machine that moves: a file that both sides see, decided by its lock and its one record.

Whoever may run the machine holds the file's lock, and a dead process holds none: that is how one side knows of the
other's death, which no link can tell it. What the record says is final once it is ``kept`` or ``taken``.

========= ======================================================= ==================================================
record    written                                                 found by who gets the lock
========= ======================================================= ==================================================
offered   by the source, before anything is sent                  its source is dead: whoever has all of it goes on
kept      by the source: it goes on itself                        the destination gives up
given     by the source, which lets go of the lock then           no one has it: the first to say so does
taken     by the destination, before its first instruction        the source never goes on again
========= ======================================================= ==================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import time

from vmm.errors import ConfigError, MigrationError

OFFERED, KEPT, GIVEN, TAKEN = b"offered.", b"kept....", b"given...", b"taken..."
TOKEN = 16
_OWNER, _PAGES = 0, 1  # bytes of the file that are locked: the machine; pages that only the source has
_LOOK = 0.02  # seconds between two looks at a lock, in the moments in which a link is lost


class Fence:
    """This process's end of it. ``fd``: the file, opened for it alone; ``token``: of this migration."""

    def __init__(self, fd: int, token: bytes) -> None:
        self._fd = fd
        self.token = token

    @classmethod
    def make(cls, path: str | None) -> Fence:
        """The source's: at ``path``, or without a name. The machine is offered.

        Raises :class:`~vmm.errors.ConfigError` where the file cannot be used, or another machine owns it.
        """
        try:
            if path is None:
                fd = os.memfd_create("pyvmm-fence", os.MFD_CLOEXEC)
            else:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"the fence {path} cannot be opened ({error.strerror}): give another file") from error
        fence = cls(fd, os.urandom(TOKEN))
        if not fence.try_lock() or not fence._lock(_PAGES):
            fence.close()
            raise ConfigError(f"the fence {path} is another machine's: give each its own")
        fence._write(OFFERED)
        return fence

    @classmethod
    def open(cls, path: str, token: bytes) -> Fence:
        """The destination's, by a path. Raises :class:`~vmm.errors.ConfigError`."""
        try:
            fence = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), token)
        except OSError as error:
            raise ConfigError(
                f"the fence {path} cannot be opened here ({error.strerror}): both sides need to see one file"
            ) from error
        return fence._checked()

    @classmethod
    def adopt(cls, fd: int, token: bytes) -> Fence:
        """The destination's, by the descriptor that came with the connection, which it closes."""
        try:
            # With this process's rights: only what the other side could write itself, and no device.
            flags, mode = fcntl.fcntl(fd, fcntl.F_GETFL), os.fstat(fd).st_mode
            if flags & os.O_ACCMODE != os.O_RDWR or flags & os.O_PATH or not stat.S_ISREG(mode):
                raise MigrationError("the other side's fence is no file that it can write")
            # Opened anew: locks are of an open file, and the one that came is the source's as well.
            return cls(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), token)._checked()
        except OSError as error:
            raise MigrationError(f"the other side's fence cannot be used: {error.strerror}") from error
        finally:
            os.close(fd)

    def _checked(self) -> Fence:
        if self.state is None or self.try_lock():
            self.close()
            raise MigrationError("the other side's fence is not locked, or of another migration: do the two see one?")
        return self

    def another(self) -> int:
        """A descriptor to hand over: the file opened once more, without this one's locks."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)

    # ---- the lock ----

    def try_lock(self) -> bool:
        """Have the lock, if nobody else has it."""
        return self._lock(_OWNER)

    def lock_within(self, seconds: float) -> bool:
        """Have the lock within this time."""
        deadline = time.monotonic() + seconds
        while not self.try_lock():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK)
        return True

    def source_lives(self) -> bool:
        """Whether the source still holds pages for the destination."""
        if self._lock(_PAGES):
            self._lock(_PAGES, fcntl.F_UNLCK)
            return False
        return True

    def _lock(self, byte: int, kind: int = fcntl.F_WRLCK) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    # ---- the record ----

    @property
    def state(self) -> bytes | None:
        """What the record says; ``None``: it is not of this migration."""
        record = os.pread(self._fd, TOKEN + 8, 0)
        return record[TOKEN:] if record[:TOKEN] == self.token else None

    def _write(self, state: bytes) -> None:
        os.pwrite(self._fd, self.token + state, 0)
        os.fsync(self._fd)

    def keep(self) -> None:
        """The source goes on; it has the lock."""
        self._write(KEPT)

    def give(self) -> None:
        """The source will not go on, unless it gets the lock again and reads that nobody took the machine."""
        self._write(GIVEN)
        self._lock(_OWNER, fcntl.F_UNLCK)

    def take(self) -> bool:
        """The destination, which has the lock, goes on; false: it must not."""
        if self.state not in (OFFERED, GIVEN):
            return False
        self._write(TAKEN)
        return True

    def close(self) -> None:
        """Let go of it, and of its locks. Twice is fine."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
