"""Addresses and connections of a migration: ``unix:PATH`` or ``tcp:HOST:PORT``, optionally with TLS."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from vmm import deadline
from vmm.deadline import Deadline
from vmm.errors import ConfigError, MigrationError
from vmm.migrate.tls import CONNECT_SECONDS, Tls
from vmm.private_socket import PrivateSocket

PREFACE = b"PYVMM MIGRATION\n"  # in the clear, before TLS: another protocol's server refuses it at once
GREETING_SECONDS = 10.0  # for the whole greeting of an unknown peer: preface, TLS handshake, HELLO


class Address(NamedTuple):
    """A parsed address; ``port`` is -1 for a UNIX socket."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse ``text``. Raises :class:`~vmm.errors.ConfigError`."""
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls(rest, -1)
        host, colon, port = rest.rpartition(":")
        if kind == "tcp" and colon and port.isascii() and port.isdigit() and int(port) < 65536:
            return cls(host.strip("[]"), int(port))
        raise ConfigError(f"{text!r} is no address for a migration: write unix:PATH or tcp:HOST:PORT")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.host}" if self.port < 0 else f"tcp:{host}:{self.port}"


def connect(address: Address, tls: Tls | None, *, given: int | None = None) -> socket.socket:
    """Connect to the listener at ``address``. ``given`` is a descriptor to pass along, on a UNIX socket.

    Raises :class:`~vmm.errors.MigrationError`.
    """
    context = tls.context(server=False) if tls else None
    connection: socket.socket | None = None
    try:
        if address.port < 0:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(address.host)
            socket.send_fds(connection, [PREFACE], [] if given is None else [given])
        else:
            connection = socket.create_connection((address.host, address.port), CONNECT_SECONDS)
            _keep(connection)
            connection.sendall(PREFACE)
        return context.wrap_socket(connection) if context else connection
    except OSError as error:
        if connection is not None:
            connection.close()
        raise MigrationError(f"cannot connect to {address}: {error.strerror or error}") from error


def _keep(connection: socket.socket) -> None:
    """Set TCP_NODELAY, and keep-alives that detect a dead host within half a minute."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
    ):
        connection.setsockopt(level, option, value)


def _listen_tcp(address: Address) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(4)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
    return listener


class Listener:
    """Listen for one source. A context manager; a UNIX socket is open to its owner only, and removed at the end."""

    def __init__(self, address: Address, tls: Tls | None) -> None:
        self._context = tls.context(server=True) if tls else None
        self._tls = tls
        self._relays: list[int] = []  # pidfds
        self._named: PrivateSocket | None
        if address.port < 0:
            self._named = PrivateSocket(address.host, f"cannot listen on {address}")
            self._socket = self._named.socket
        else:
            self._named = None
            self._socket = _listen_tcp(address)
            address = address._replace(port=self._socket.getsockname()[1])
        self.address = address

    def accept(self, timeout: float | None, *, native: bool = False) -> tuple[socket.socket, int | None, Deadline]:
        """Accept a connection; return it, the descriptor passed with it (the caller owns it), and the deadline of its
        greeting.

        ``native``: the connection is for native code, which has no TLS; a relay process does the handshake, and an
        unauthenticated peer then shows as a closed connection.

        Raises ``TimeoutError``, or :class:`~vmm.errors.MigrationError` for a peer that does not migrate: accept again.
        """
        self._socket.settimeout(timeout)
        connection, _ = self._socket.accept()
        fds: list[int] = []
        until = Deadline(GREETING_SECONDS)
        try:
            connection.settimeout(until.left)
            if self.address.port < 0:
                preface, fds, _, _ = socket.recv_fds(connection, len(PREFACE), 1)
            else:
                _keep(connection)
                preface = b""
            if preface or self.address.port >= 0:
                preface += deadline.receive(connection, len(PREFACE) - len(preface), until)
            connection.settimeout(until.left)
            if preface != PREFACE:
                raise MigrationError("a peer connected that is not a machine in migration: it was refused")
            if self._tls and native:
                from vmm.migrate.relay import relayed

                connection, relay = relayed(connection, self._tls)
                self._relays.append(relay)
            elif self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
        except (OSError, MigrationError) as error:
            connection.close()
            for fd in fds:
                os.close(fd)
            if isinstance(error, MigrationError):
                raise
            raise MigrationError(f"a connection was refused: {error}") from error
        return connection, fds[0] if fds else None, until

    def end_relays(self) -> None:
        """Wait until the TLS relay processes have ended. Close their connections first."""
        from vmm.side_process import await_end

        while self._relays:
            await_end(self._relays.pop())

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._named is not None:
            self._named.close()
        self._socket.close()
