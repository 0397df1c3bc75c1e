"""Post-copy: pages are sent on demand after the machine runs at the destination, and all others in the background.

Pages have a connection of their own (protocol: ``native/include/vmmlazy.h``). At the destination native code requests
them, because a thread that faults on a page may hold the GIL while it waits. The source keeps the paused machine until
it is told that every page has arrived. When the connection breaks, faulting threads wait and the source reconnects.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from vmm.errors import MigrationError, VmmError
from vmm.migrate import wire
from vmm.migrate.address import Address, Listener, connect
from vmm.migrate.tls import Tls
from vmm.migrate.wire import Channel, Kind, LinkLost
from vmm.snapshot.regions import Region, bitmap_size, pages_in
from vmm.snapshot.serving import answer_requests, answer_with

if TYPE_CHECKING:
    from vmm.memory import DirtyLog, GuestMemory
    from vmm.migrate.fence import Fence
    from vmm.migrate.subject import Arriving
    from vmm.snapshot.lazy import LazyMemory

_AGAIN = 0.5  # seconds between two attempts to connect
_NOTHING = bytes(wire.PAGE)


def greeting(token: bytes) -> dict[str, Any]:
    """Return the HELLO of a connection for pages."""
    return {"version": wire.VERSION, "how": "pages", "token": token}


# ---- the source ----


class Touched:
    """The pages that were ever touched, found while the guest runs to keep the downtime short."""

    def __init__(self, memory: GuestMemory, log: DirtyLog) -> None:
        self._regions = memory.regions
        self._log = log  # opened before the scan, so that it has every later write
        self._before = [pages_in(gpa, size, memory.in_use(number)) for number, (gpa, size) in enumerate(self._regions)]

    def bitmaps(self) -> list[bytes]:
        """Return a bitmap for each region. The machine must be paused."""
        self._log.collect()
        runs = self._log.take()
        both = zip(self._before, (pages_in(gpa, size, runs) for gpa, size in self._regions), strict=True)
        return [
            (int.from_bytes(old, "little") | int.from_bytes(new, "little")).to_bytes(len(old), "little")
            for old, new in both
        ]


class Pages:
    """The source's end: serve requests for pages of a paused machine, and reconnect after a lost connection."""

    def __init__(self, address: Address, tls: Tls | None, memory: GuestMemory, token: bytes) -> None:
        self._address = address
        self._tls = tls
        self._memory = memory
        self._token = token
        self._over = threading.Event()
        self.sent = 0
        self._connection = self._connect()
        self._thread = threading.Thread(target=self._serve, name="pages", daemon=True)

    def _connect(self) -> socket.socket:
        connection = connect(self._address, self._tls)
        channel = Channel(connection)
        try:
            channel.send_value(Kind.HELLO, greeting(self._token))
            channel.receive(Kind.ACCEPT)
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return connection

    def start(self) -> None:
        """Start to serve requests. The machine must be paused."""
        self._thread.start()

    def _serve(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError, ValueError), self._connection:  # ValueError: TLS was shut down
                answer_requests(self._connection, self._answer)
            while not self._over.wait(_AGAIN):
                with contextlib.suppress(VmmError):
                    self._connection = self._connect()
                    break

    def _answer(self, gpa: int) -> bytes:
        if gpa % wire.PAGE:
            raise OSError(f"{gpa:#x} is not the address of a page")
        try:
            page = self._memory.read(gpa, wire.PAGE)
        except VmmError as error:
            raise OSError(str(error)) from error
        answered = answer_with(gpa, None if page == _NOTHING else page)
        self.sent += len(answered)
        return answered

    def close(self) -> None:
        """Stop and wait for the thread. Idempotent."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        if self._thread.is_alive():
            self._thread.join()


def await_all(channel: Channel, fence: Fence | None, address: Address, tls: Tls | None, token: bytes) -> None:
    """Wait until the destination has every page; reconnect and ask again after a lost connection.

    Raises :class:`~vmm.errors.MigrationError` if the destination died, and the machine with it.
    """
    while True:
        try:
            channel.receive(Kind.ALL, timeout=None)
            # If OVER is lost, the destination asks again and finds no listener, which means the same.
            with contextlib.suppress(LinkLost):
                channel.send(Kind.OVER)
            return
        except LinkLost:
            channel.close()
        while True:
            if fence is not None and fence.try_lock():
                raise MigrationError("the machine ended there before all of its memory was there: it is lost")
            time.sleep(_AGAIN)
            with contextlib.suppress(VmmError):
                channel = Channel(connect(address, tls))
                channel.send_value(Kind.HELLO, {**greeting(token), "how": "all"})
                break


# ---- the destination ----


def await_pages(listener: Listener, token: bytes) -> socket.socket:
    """Accept the connection for pages of the migration with this token."""
    how, connection = _greet(listener, token, wire.PATIENCE)
    if how != "pages":
        connection.close()
        raise MigrationError("the other side did not connect for pages")
    return connection


def _greet(listener: Listener, token: bytes, timeout: float) -> tuple[str, socket.socket]:
    try:
        connection, fd, until = listener.accept(timeout, native=True)
    except TimeoutError:
        raise LinkLost("the other side did not connect again") from None
    if fd is not None:
        os.close(fd)
    channel = Channel(connection)
    try:
        hello = channel.receive(Kind.HELLO, within=until).value
        if not isinstance(hello, dict) or hello.get("token") != token or hello.get("how") not in ("pages", "all"):
            raise MigrationError("the connection for pages is not of this migration: it was refused")
        if hello["how"] == "pages":
            channel.send_value(Kind.ACCEPT, {"version": wire.VERSION})
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return str(hello["how"]), connection


def expect(machine: Arriving, bitmaps: Any, connection: socket.socket) -> LazyMemory:
    """Set up lazy memory from ``connection``: the pages of ``bitmaps``, one bitmap for each region."""
    from vmm.snapshot.lazy import LazyMemory

    regions = machine.memory.regions
    if not isinstance(bitmaps, list) or len(bitmaps) != len(regions):
        raise MigrationError("the other side does not say which pages are to come")
    lazy = LazyMemory(machine.native, machine.memory)
    for number, ((gpa, size), bitmap) in enumerate(zip(regions, bitmaps, strict=True)):
        if not isinstance(bitmap, bytes) or len(bitmap) != bitmap_size(size):
            raise MigrationError("the other side does not say which pages are to come")
        if int.from_bytes(bitmap, "little") >> size // wire.PAGE:
            raise MigrationError("the other side speaks of pages that there are not")
        lazy.want(number, Region(gpa, size, 0, bitmap, b""))
    lazy.start()
    lazy.connect(connection)
    return lazy


class PageWatch:
    """Watch a machine's lazy memory until all pages have arrived, then tell the source on ``channel``.

    It starts before the machine is :meth:`taken`, because loading devices and vCPUs touches memory. Before that a lost
    source is awaited for ``patience`` seconds, afterwards for as long as the machine lives, unless the ``fence`` shows
    that it is dead. It closes ``listener`` and ``fence`` at the end.
    """

    def __init__(
        self,
        machine: Arriving,
        lazy: LazyMemory,
        channel: Channel,
        listener: Listener,
        fence: Fence | None,
        token: bytes,
        patience: float,
    ) -> None:
        self._lazy = lazy
        self._channel = channel
        self._listener = listener
        self._fence = fence
        self._token = token
        self._patience = patience
        self._lost_at = 0.0
        self._taken = threading.Event()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._tend, name="memory to come", daemon=True)
        self._thread.start()
        machine.run_beside(self)
        machine.on_close(listener.end_relays)  # by then native code has closed its connection

    def taken(self) -> None:
        """Start to fetch all remaining pages, since the machine runs here now."""
        self._lazy.fetch_rest()
        self._taken.set()

    def _tend(self) -> None:
        try:
            while (state := self._lazy.state) not in ("done", "abandoned"):
                self._look_for_source(state == "lost")
                listening = self._listener.fileno()
                readable = select.select([self._lazy.fd, listening, self._stop], [], [], _AGAIN)[0]
                if self._stop in readable:
                    return
                if listening in readable:
                    self._connected()
                if self._lazy.fd in readable:
                    os.eventfd_read(self._lazy.fd)
            while not self._taken.is_set():
                if select.select([self._stop], [], [], _AGAIN)[0]:
                    return
            if state == "done":
                self._tell()
        finally:
            self._channel.close()
            self._listener.close()
            if self._fence is not None:
                self._fence.close()

    def _look_for_source(self, lost: bool) -> None:
        now = time.monotonic()
        self._lost_at = (self._lost_at or now) if lost else 0.0
        if not lost:
            return
        dead = self._fence is not None and not self._fence.source_lives()
        if dead or (not self._taken.is_set() and now - self._lost_at > self._patience):
            self._lazy.abandon("the process that had the rest of its memory is gone")

    def _connected(self) -> None:
        with contextlib.suppress(VmmError, TimeoutError):
            how, connection = _greet(self._listener, self._token, 0.0)
            if how == "all":
                self._channel.close()
                self._channel = Channel(connection)
                return
            with connection:
                self._lazy.connect(connection)

    def _tell(self) -> None:
        """Send ALL until the source confirms it; a source that lost the connection connects again."""
        while not self._is_heard():
            if self._fence is not None and not self._fence.source_lives():
                return
            listening = self._listener.fileno()
            readable = select.select([listening, self._stop], [], [], _AGAIN)[0]
            if self._stop in readable:
                return
            if listening in readable:
                self._connected()

    def _is_heard(self) -> bool:
        with contextlib.suppress(MigrationError):
            self._channel.send(Kind.ALL)
            # OVER, or the end of the connection; the source may also have reconnected and not read this one.
            told = self._channel.fileno()
            if told in select.select([told, self._listener.fileno(), self._stop], [], [])[0]:
                self._channel.receive(Kind.OVER)
                return True
        return False

    def stop(self) -> None:
        """Stop and wait for the thread, before the machine is closed. Idempotent."""
        os.eventfd_write(self._stop, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()
