"""Commands to a Linux guest that was booted with a session's initramfs, and their results; see init-session.sh."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmm.linux import initramfs

READY = rb"pyvmm: ready\n"
_PLAIN = frozenset(b'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 !"#$%&()*+,-./:;<=>?@[]^_`{|}~')


def archive(busybox: Path | None = None, entries: Iterable[initramfs.Entry] = ()) -> Path:
    """An initramfs whose first process takes commands from the console. HostError: no busybox to be had."""
    from importlib import resources

    init = initramfs.file("init", (resources.files("vmm.linux") / "init-session.sh").read_bytes())
    return initramfs.default(busybox, [*entries, init])


def request(command: str, token: str) -> bytes:
    """The line that has the guest run ``command`` in its shell, whatever characters are in it."""
    quoted = b"".join(
        bytes([byte]) if byte in _PLAIN else b"\\%03o" % byte for byte in command.encode(errors="surrogateescape")
    )
    return b"run %s $'%s'\n" % (token.encode(), quoted)


def answer(token: str) -> bytes:
    """The pattern of the line that ends the output of a command; its group is the exit status."""
    return rb"pyvmm: %s (\d+)\n" % token.encode()
