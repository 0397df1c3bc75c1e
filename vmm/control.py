"""Control socket of a running machine: a UNIX socket, open to its owner only, with one JSON object per line.

A request is ``{"do": NAME, ...}``; the reply is ``{"ok": VALUE}`` or ``{"error": SENTENCE}``, which any number of
``{"progress": {...}}`` precede during a migration. :data:`REQUESTS` lists the names and their fields. Paths are
resolved in the machine's process.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from vmm import deadline
from vmm.deadline import Deadline
from vmm.errors import ConfigError, HostError, StateError, VmmError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from vmm.machine import Machine

LINE_MAX = 64 << 10  # bytes of a request: room for two paths and some numbers
ANSWER_SECONDS = 2.0  # that an ended machine waits for a client to read its reply
REQUEST_SECONDS = 10.0  # from the first byte of a request to its last, and for a client to read a reply
IDLE_SECONDS = 300.0  # without a request, after which the connection is closed to make room for another client
CLIENTS_MAX = 8  # at once; further clients wait until one disconnects

# The requests: fields beside "do", with their types; all but those of NEEDED are optional.
REQUESTS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "status": {},
    "pause": {},
    "resume": {},
    "snapshot": {"path": str, "differential": bool},
    "migrate": {
        "to": str, "postcopy": bool, "mirror": (bool, list), "downtime": (int, float), "bandwidth": int, "fence": str,
        "certificate": str, "key": str, "authority": str,
    },
    "cancel": {},
}  # fmt: skip
NEEDED = {"snapshot": {"path"}, "migrate": {"to"}}


class Control:
    """Listen at ``path`` and carry out requests on ``machine``. A context manager.

    Raises :class:`~vmm.errors.ConfigError` when it cannot listen there.
    """

    def __init__(self, machine: Machine, path: str) -> None:
        import threading

        from vmm.private_socket import PrivateSocket

        self._machine = machine
        self._lock = threading.Lock()  # one request at a time, except status and cancel
        self._busy = 0  # requests that were read and have no reply yet
        self._answered = threading.Condition()
        self._room = threading.Semaphore(CLIENTS_MAX)
        self._closing = False
        self._clients: set[socket.socket] = set()
        self._named = PrivateSocket(path, f"cannot listen on control socket {path}", CLIENTS_MAX)
        self._socket = self._named.socket
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    # ---- connections ----

    def _accept(self) -> None:
        import threading

        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return  # closed
            self._room.acquire()
            if self._closing:
                client.close()
                return
            self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), name="control client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError):
                for line in _requests(client):
                    with self._request():
                        _send_line(
                            client, self._answer(line, lambda progress: _send_if_ready(client, {"progress": progress}))
                        )
        finally:
            self._clients.discard(client)
            self._room.release()

    @contextlib.contextmanager
    def _request(self) -> Iterator[None]:
        with self._answered:
            if self._socket.fileno() < 0:
                raise OSError("closed")
            self._busy += 1
        try:
            yield
        finally:
            with self._answered:
                self._busy -= 1
                self._answered.notify_all()

    def _answer(self, line: bytes, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        try:
            name, fields = _parse(line)
            if name == "status":
                return {"ok": self._status()}
            if name == "cancel":
                self._cancel()
                return {"ok": None}
            if not self._lock.acquire(blocking=False):
                raise StateError("something else is being done to the machine: wait for that, or cancel it")
            try:
                return {"ok": getattr(self, f"_{name}")(progress=progress, **fields)}
            finally:
                self._lock.release()
        except VmmError as error:
            return {"error": str(error)}

    # ---- requests ----

    def _status(self) -> dict[str, Any]:
        machine = self._machine
        state = "paused" if machine.paused else "running" if machine.running else "not running"
        return {
            "state": "moving" if machine.migration is not None else state,
            "memory": machine.config.memory,
            "cpus": machine.config.cpus,
            "messages": machine.messages[-10:],
        }

    def _pause(self, progress: object) -> None:
        if self._machine.paused:
            raise StateError("the machine is held already")
        self._machine.pause()

    def _resume(self, progress: object) -> None:
        if not self._machine.paused:
            raise StateError("the machine is not held")
        self._machine.resume()

    def _snapshot(self, progress: object, path: str, differential: bool = False) -> dict[str, Any]:
        with self._machine.snapshot(path, differential=differential) as snapshot:
            return {"id": snapshot.id.hex(), "pages": sum(region.pages_held for region in snapshot.regions)}

    def _migrate(self, progress: Callable[[dict[str, Any]], None], to: str, **how: Any) -> dict[str, Any]:
        from vmm.migrate.tls import Tls

        files = [how.pop(name, None) for name in ("certificate", "key", "authority")]
        if any(files) and not all(files):
            raise ConfigError("TLS takes three files: a certificate, its key, and the authority of the other side's")
        tls = Tls(*map(str, files)) if all(files) else None
        gone = False

        def show(value: Any) -> None:
            nonlocal gone
            try:
                if not gone:
                    progress(value._asdict())
            except (OSError, ValueError):
                gone = True  # the client has disconnected; the migration continues without it

        return self._machine.migrate(to, tls=tls, progress=show, **how)._asdict()

    def _cancel(self) -> None:
        migration = self._machine.migration
        if migration is None:
            raise StateError("the machine is not on its way anywhere: there is no migration to cancel")
        migration.cancel()

    def close(self) -> None:
        """Stop listening, remove the socket, and wait for the request in progress. Idempotent."""
        import socket

        if self._socket.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._closing = True
            self._socket.shutdown(socket.SHUT_RDWR)  # ends accept()
            self._room.release()  # ends its wait for a free place
        self._thread.join()
        with self._answered:
            self._named.close()
            self._answered.wait_for(lambda: not self._busy, ANSWER_SECONDS)
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)  # a client that does not read must not delay the end
        with self._answered:
            self._answered.wait_for(lambda: not self._busy)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    import json

    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"a request is a JSON object in one line of at most {LINE_MAX} bytes: {error}") from None
    name = request.pop("do", None) if isinstance(request, dict) else None
    if not isinstance(name, str) or name not in REQUESTS:
        raise ConfigError(f"a request does one of {', '.join(REQUESTS)}")
    known = REQUESTS[name]
    for field, value in request.items():
        kind = known.get(field)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if kind is None or not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{name} takes {', '.join(known) or 'nothing'}: {field} is not one of these, or is wrong")
    if missing := NEEDED.get(name, set()) - request.keys():
        raise ConfigError(f"{name} needs {', '.join(sorted(missing))}")
    return name, request


def _requests(client: socket.socket) -> Iterator[bytes]:
    """Yield lines, each complete within :data:`REQUEST_SECONDS` of its first byte; a longer line is cut at
    :data:`LINE_MAX`. Raises ``OSError``."""
    pending = b""
    while True:
        until = Deadline(REQUEST_SECONDS if pending else IDLE_SECONDS)
        while b"\n" not in pending and len(pending) < LINE_MAX:
            client.settimeout(until.left)
            part = client.recv(LINE_MAX - len(pending))
            if not part:
                if pending:
                    yield pending
                return
            if not pending:
                until = Deadline(REQUEST_SECONDS)
            pending += part
        end = pending.find(b"\n") + 1 or LINE_MAX
        line, pending = pending[:end], pending[end:]
        yield line


def _send_line(connection: socket.socket, value: dict[str, Any]) -> None:
    import json

    deadline.send(connection, json.dumps(value).encode() + b"\n", Deadline(REQUEST_SECONDS))


def _send_if_ready(client: socket.socket, value: dict[str, Any]) -> None:
    """Send a line if the client can take it at once: the machine, which may be paused, must not wait for a client that
    does not read. A socket that polls writable has room for a short line."""
    import json
    import select

    if select.select([], [client], [], 0)[1]:
        client.sendall(json.dumps(value).encode() + b"\n")


def ask(path: str, request: dict[str, Any], progress: Callable[[dict[str, Any]], object] | None = None) -> Any:
    """Send a request to the machine whose control socket is ``path``; return the value of ``ok``.

    Raises :class:`~vmm.errors.StateError` with the sentence of ``error``, :class:`~vmm.errors.HostError` when no
    machine listens there.
    """
    import json
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(path)
        except OSError as error:
            raise HostError(
                f"no machine answers at {path} ({error.strerror}): was it started with --control?"
            ) from error
        _send_line(connection, request)
        connection.settimeout(None)
        with connection.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "progress" in answer:
                    if progress:
                        progress(answer["progress"])
                elif "error" in answer:
                    raise StateError(answer["error"])
                else:
                    return answer["ok"]
    raise HostError(f"the machine at {path} ended before it replied: look at its own messages")
