"""Ownership of a migrating machine: a file that both sides see, with a lock and one record.

The side that may run the machine holds the file's lock, and the kernel releases a dead process's locks: this is how
one side detects the other's death, which a lost link does not prove. The records ``kept`` and ``taken`` are final.

========= ======================================================= ==================================================
record    written                                                 meaning for the side that gets the lock
========= ======================================================= ==================================================
offered   by the source, before anything is sent                  the source is dead: a complete destination goes on
kept      by the source: it goes on itself                        the destination gives up
given     by the source, which then releases the lock             there is no owner: the first to write the record is
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
_LOOK = 0.02  # seconds between two attempts to lock, after a link was lost


class Fence:
    """One side's handle of the fence. ``fd`` is the file, opened for it alone; ``token`` identifies the migration."""

    def __init__(self, fd: int, token: bytes) -> None:
        self._fd = fd
        self.token = token

    @classmethod
    def make(cls, path: str | None) -> Fence:
        """Create the source's fence at ``path``, or as a memfd, with the record ``offered``.

        Raises :class:`~vmm.errors.ConfigError` if the file cannot be used, or another machine has locked it.
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
        """Open the destination's fence by path. Raises :class:`~vmm.errors.ConfigError`."""
        try:
            fence = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), token)
        except OSError as error:
            raise ConfigError(
                f"the fence {path} cannot be opened here ({error.strerror}): both sides need to see one file"
            ) from error
        return fence._checked()

    @classmethod
    def adopt(cls, fd: int, token: bytes) -> Fence:
        """Open the destination's fence from the descriptor that came with the connection; closes that descriptor."""
        try:
            # This process opens it with its own rights: accept only a regular file that the peer could write itself.
            flags, mode = fcntl.fcntl(fd, fcntl.F_GETFL), os.fstat(fd).st_mode
            if flags & os.O_ACCMODE != os.O_RDWR or flags & os.O_PATH or not stat.S_ISREG(mode):
                raise MigrationError("the other side's fence is no file that it can write")
            # Reopen it: locks belong to the open file description, which the descriptor shares with the source.
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
        """Return a descriptor to pass to the peer: the file opened again, without this handle's locks."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)

    # ---- the lock ----

    def try_lock(self) -> bool:
        """Try to take the owner lock; return whether it is held now."""
        return self._lock(_OWNER)

    def lock_within(self, seconds: float) -> bool:
        """Try to take the owner lock for ``seconds``; return whether it is held now."""
        deadline = time.monotonic() + seconds
        while not self.try_lock():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK)
        return True

    def source_lives(self) -> bool:
        """Return whether the source still holds pages for the destination."""
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
        """The record; ``None`` if it belongs to another migration."""
        record = os.pread(self._fd, TOKEN + 8, 0)
        return record[TOKEN:] if record[:TOKEN] == self.token else None

    def _write(self, state: bytes) -> None:
        os.pwrite(self._fd, self.token + state, 0)
        os.fsync(self._fd)

    def keep(self) -> None:
        """Record that the source goes on. It must hold the lock."""
        self._write(KEPT)

    def give(self) -> None:
        """Record that the source gives the machine away. It goes on only if it gets the lock again and reads that the
        machine was not taken."""
        self._write(GIVEN)
        self._lock(_OWNER, fcntl.F_UNLCK)

    def take(self) -> bool:
        """Record that the destination, which holds the lock, goes on; return false if it must not."""
        if self.state not in (OFFERED, GIVEN):
            return False
        self._write(TAKEN)
        return True

    def close(self) -> None:
        """Close the file, which releases its locks. Idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
