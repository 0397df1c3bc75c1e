"""TLS for native code: a process between a connection of somebody else's and one of our own.

Pages that a machine waits for are asked for by native code, which knows no TLS. A thread of ours in between would not
do: whoever touches a page that is not here waits for it, perhaps with the interpreter's lock, which it would need.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import subprocess
import sys
import threading

from vmm.errors import ConfigError
from vmm.migrate.tls import CONNECT_SECONDS, Tls

_ROOM = 1 << 20  # bytes on their way in one direction; who sends more waits
_PIECE = 1 << 16


def relayed(connection: socket.socket, tls: Tls) -> tuple[socket.socket, int]:
    """What the other side of ``connection`` says in TLS, in the clear; closed when it is no friend.

    The handshake and all that follows is another process's, which ends with either of the two connections, and whose
    pidfd is the second value; ``connection`` is its own from now on.
    """
    ours, inner = socket.socketpair()
    with connection, inner:
        words = [sys.executable, "-m", "vmm.migrate.relay", str(connection.fileno()), str(inner.fileno()), *tls]
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(connection.fileno(), inner.fileno()),
            start_new_session=True,  # Ctrl-C is for the machine, which says when there is no more to relay
        )
    pidfd = os.pidfd_open(process.pid)
    threading.Thread(target=process.wait, name="relay", daemon=True).start()
    return ours, pidfd


def pump(secure: ssl.SSLSocket, inner: socket.socket) -> None:
    """Pass on what comes on either, until one of them ends."""
    secure.setblocking(False)
    inner.setblocking(False)
    out, back = bytearray(), bytearray()  # to the other side; to us
    while True:
        reading = [*([secure] if len(back) < _ROOM else []), *([inner] if len(out) < _ROOM else [])]
        writing = [*([secure] if out else []), *([inner] if back else [])]
        at_once = len(back) < _ROOM and secure.pending() > 0  # select does not see what was decrypted already
        readable, writable, _ = select.select(reading, writing, [], 0 if at_once else None)
        if (at_once or secure in readable) and not _take(secure, back):
            inner.settimeout(CONNECT_SECONDS)
            inner.sendall(back)
            return
        if inner in readable and not _take(inner, out):
            return
        if secure in writable:
            _give(secure, out)
        if inner in writable:
            _give(inner, back)


def _take(source: socket.socket, buffer: bytearray) -> bool:
    """Whether there is more to come."""
    try:
        part = source.recv(_PIECE)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    buffer += part
    return bool(part)


def _give(sink: socket.socket, buffer: bytearray) -> None:
    # A write that TLS did not finish must be made again with what it was given: always from the front, in pieces.
    with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        del buffer[: sink.send(buffer[:_PIECE])]


def main(words: list[str]) -> int:
    """The process: descriptors of both connections, then the three files of TLS."""
    outer, inner = (socket.socket(fileno=int(word)) for word in words[:2])
    outer.settimeout(CONNECT_SECONDS)
    # Whatever goes wrong: who is at the other end finds its connection closed.
    with contextlib.suppress(OSError, ConfigError), inner:
        pump(Tls(*words[2:]).context(server=True).wrap_socket(outer, server_side=True), inner)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
