"""TLS for native code: a relay process between the peer's connection and a local socket pair.

Native code requests the pages of lazy memory and has no TLS. A Python thread could deadlock as relay: a thread that
faults on a missing page may hold the GIL while it waits, and the relay would need the GIL to bring the page.
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

_ROOM = 1 << 20  # bytes buffered in one direction; beyond that the sender waits
_PIECE = 1 << 16


def relayed(connection: socket.socket, tls: Tls) -> tuple[socket.socket, int]:
    """Start a relay for ``connection``; return a socket with the decrypted stream, and the relay's pidfd.

    The relay does the handshake, closes the socket if the peer is not authenticated, and ends with either connection.
    It owns ``connection`` from now on.
    """
    ours, inner = socket.socketpair()
    with connection, inner:
        words = [sys.executable, "-m", "vmm.migrate.relay", str(connection.fileno()), str(inner.fileno()), *tls]
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(connection.fileno(), inner.fileno()),
            start_new_session=True,  # Ctrl-C must reach the machine only, which closes the connection when it is done
        )
    pidfd = os.pidfd_open(process.pid)
    threading.Thread(target=process.wait, name="relay", daemon=True).start()
    return ours, pidfd


def pump(secure: ssl.SSLSocket, inner: socket.socket) -> None:
    """Forward bytes both ways until one connection ends."""
    secure.setblocking(False)
    inner.setblocking(False)
    out, back = bytearray(), bytearray()  # to the peer; from the peer
    while True:
        reading = [*([secure] if len(back) < _ROOM else []), *([inner] if len(out) < _ROOM else [])]
        writing = [*([secure] if out else []), *([inner] if back else [])]
        at_once = len(back) < _ROOM and secure.pending() > 0  # select does not report decrypted bytes
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
    """Read into ``buffer``; return false at the end of the stream."""
    try:
        part = source.recv(_PIECE)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    buffer += part
    return bool(part)


def _give(sink: socket.socket, buffer: bytearray) -> None:
    # An unfinished TLS write must be repeated with the same bytes: always write from the front, in pieces.
    with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        del buffer[: sink.send(buffer[:_PIECE])]


def main(words: list[str]) -> int:
    """Run the relay process. Arguments: descriptors of both connections, then the three TLS files."""
    outer, inner = (socket.socket(fileno=int(word)) for word in words[:2])
    outer.settimeout(CONNECT_SECONDS)
    # Any error ends the process, which closes both connections.
    with contextlib.suppress(OSError, ConfigError), inner:
        pump(Tls(*words[2:]).context(server=True).wrap_socket(outer, server_side=True), inner)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
