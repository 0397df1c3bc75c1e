"""Listening UNIX sockets: one policy for every part of pyvmm that has one.

- A socket that no process has open (its owner was killed) is replaced. Anything else at the path - a file, a
  directory, a socket in use - is left as it is, and the error names it.
- Only the owner of the process can connect: the mode is 0600 from the moment the name exists.
- The process's umask is not changed, since all of its threads share it.

The socket is bound and listens under a temporary name first. It then takes ``path`` by ``link``, which fails if the
name is taken, or, if a stale socket has the name, by exchanging the two names (``RENAME_EXCHANGE``) under a lock on
the directory. The file that the exchange removed is checked again and put back unless it is that stale socket. So a
name in use is never removed, whatever starts at the same time.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import TYPE_CHECKING

from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH_MAX = 107  # bytes of sun_path, without the zero that ends it: unix(7)
LOCK_SECONDS = 5.0  # for another process that replaces a socket in the directory: it takes milliseconds
_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class PrivateSocket:
    """A listening stream socket at ``path``; the attribute ``socket`` is the Python object.

    Raises :class:`~vmm.errors.ConfigError`, whose text starts with ``failed``, if it cannot listen there.
    """

    def __init__(self, path: str, failed: str, backlog: int = 4) -> None:
        import socket

        self.path = os.path.abspath(path)
        if len(os.fsencode(path)) > PATH_MAX:
            raise ConfigError(f"{failed}: the path is longer than a socket's may be, {PATH_MAX} bytes: choose another")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._made = self._listen(backlog)
        except OSError as error:
            self.socket.close()
            raise ConfigError(f"{failed}: {error.strerror or error}") from error
        except _Taken as taken:
            self.socket.close()
            raise ConfigError(f"{failed}: {taken}") from None

    def _listen(self, backlog: int) -> tuple[int, int]:
        """Bind, listen, take the name; return the device and inode of the name."""
        os.fchmod(self.socket.fileno(), 0o600)  # before bind: Linux makes the name with the mode of the socket
        folder, name = os.path.split(self.path)
        directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            beside = f"/proc/self/fd/{directory}"  # a short way to the directory: sun_path has little room
            new = os.path.join(beside, f".pyvmm-{os.urandom(8).hex()}")
            self.socket.bind(new)
            try:
                self.socket.listen(backlog)
                made = os.lstat(new)
                _take_name(new, os.path.join(beside, name))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(new)
        finally:
            os.close(directory)
        return made.st_dev, made.st_ino

    def detach(self) -> int:
        """Hand the descriptor over to the caller; :meth:`close` still removes the name."""
        return self.socket.detach()

    def close(self) -> None:
        """Stop listening, and remove the name if it is still this socket's. Idempotent."""
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._made:
                os.unlink(self.path)
        self._made = (-1, -1)
        self.socket.close()


class _Taken(Exception):
    """The path is taken by something else, which the text names."""


def _take_name(new: str, path: str) -> None:
    """Give the listening socket ``new`` the name ``path``. Raises :class:`_Taken`, ``OSError``."""
    while True:
        try:
            os.link(new, path, follow_symlinks=False)
            return
        except FileExistsError:
            _refuse_what_is_there(path)
        with _locked(os.path.dirname(path)), contextlib.suppress(FileNotFoundError):  # the entry is gone by now
            _refuse_what_is_there(path)
            _exchange(new, path)
            try:
                _refuse_what_is_there(new)
            except _Taken:  # a program that takes no lock created it
                _exchange(new, path)
                raise
            return


def _exchange(one: str, other: str) -> None:
    from vmm._ffi import lib

    rc = lib.vmm_rename(os.fsencode(one), os.fsencode(other), 1)
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Hold an exclusive lock on the directory against other processes that replace a socket in it."""
    import fcntl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _Taken("another program has a lock on its directory: choose another path") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _refuse_what_is_there(path: str) -> None:
    """Raise :class:`_Taken` unless ``path`` does not exist, or is a socket that no process has open.

    The check does not disturb a socket in use: connecting a datagram socket to it fails with EPROTOTYPE, and with
    ECONNREFUSED if no process has it open (unix(7)).
    """
    import socket

    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise _Taken(f"it is {kind}, not a socket, and is left as it is: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
    raise _Taken("it is the socket of a program that is running: choose another path, or end that program")
