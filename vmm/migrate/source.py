"""Source of a migration: memory and mirrored disks are sent while the machine runs; then it is paused and handed
over."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from vmm.errors import MigrationError, StateError, VmmError
from vmm.migrate import fence as record
from vmm.migrate import wire
from vmm.migrate.address import Address, connect
from vmm.migrate.fence import TOKEN, Fence
from vmm.migrate.precopy import Brake, MemoryPart, Part, Progress, Rounds, open_log, send_rest
from vmm.migrate.tls import Tls
from vmm.migrate.wire import Channel, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmm.devices.device import State
    from vmm.migrate.mirror import MirroredDisk
    from vmm.migrate.subject import Mover

    Runs = Iterable[tuple[int, int]]


class Migrated(NamedTuple):
    """Result: ``rounds`` sent while the machine ran, ``bytes`` sent, seconds of downtime and in total."""

    rounds: int
    bytes: int
    downtime: float
    seconds: float


class Cancelled(MigrationError):
    """The migration was cancelled; the machine stays at the source."""


class Migration:
    """Migration of one machine to ``destination``. Call :meth:`run` once; :meth:`cancel` from any thread.

    ``downtime`` is the number of seconds the guest may be paused for the handover. ``bandwidth`` limits bytes per
    second while the guest runs (``None``: no limit). ``postcopy`` sends the machine first and its memory afterwards.
    ``mirror`` copies its disks, all or those with these numbers; the destination finds the others on its own
    (:mod:`vmm.migrate.mirror`). ``fence`` is a path that both sides see, which tells the death of one side from a
    broken link; a UNIX socket needs none. ``progress`` is called with a :class:`Progress` several times a second; an
    exception from it cancels. ``patience`` is the number of seconds to wait for the destination after the handover.
    """

    def __init__(
        self,
        machine: Mover,
        destination: str,
        *,
        postcopy: bool = False,
        mirror: bool | Sequence[int] = False,
        tls: Tls | None = None,
        downtime: float = 0.3,
        bandwidth: int | None = None,
        fence: str | None = None,
        progress: Callable[[Progress], object] | None = None,
        patience: float = wire.PATIENCE,
    ) -> None:
        from vmm.migrate.mirror import chosen

        self._machine = machine
        self._address = Address.parse(destination)
        self._postcopy = postcopy
        self._tls = tls
        self._downtime = downtime
        self._bandwidth = bandwidth
        self._fence_path = fence
        self._progress = progress
        self._patience = patience
        self._mirrored = chosen(mirror, len(machine.config.disks))
        self._shared = [disk for number, disk in enumerate(machine.disks) if number not in self._mirrored]
        self._disks: list[MirroredDisk] = []
        self._fence: Fence | None = None
        self._token = b""
        self._channel: Channel | None = None
        self._lock = threading.Lock()
        self._cancelled = False
        self._gone = False  # handed over: cancelling is impossible
        self._over = threading.Event()
        self._shown_at = 0.0

    # ---- the whole ----

    def run(self) -> Migrated:
        """Migrate the machine. On return its run has ended here, with the outcome ``migrated``.

        Raises :class:`~vmm.errors.MigrationError`; the machine then runs here as before, unless the error is
        ``undecided``: then it stays paused until the user calls :meth:`~vmm.Machine.resume` or
        :meth:`~vmm.Machine.stop`. Raises :class:`~vmm.errors.HostError` if a mirrored disk cannot be read; the machine
        runs here as before.
        """
        began = time.monotonic()
        try:
            self._open()
            rounds, downtime = self._move()
            assert self._channel is not None
            return Migrated(rounds, self._channel.sent, downtime, time.monotonic() - began)
        finally:
            self._over.set()
            for disk in self._disks:
                disk.close()
            if self._fence is not None:
                if not self._gone:
                    self._fence.keep()
                self._fence.close()
            if self._channel is not None:
                self._channel.close()

    def cancel(self) -> None:
        """Cancel, and wait until the machine stays here. Raises :class:`~vmm.errors.StateError` if it is too late."""
        with self._lock:
            if self._gone:
                raise StateError("the machine was handed over: it cannot be called back")
            self._cancelled = True
        if not self._over.wait(1.0) and self._channel is not None:
            self._channel.interrupt()  # wakes a send to a peer that does not read
        self._over.wait()

    def wait(self) -> None:
        """Wait until the migration has ended, with success or not."""
        self._over.wait()

    def _open(self) -> None:
        machine = self._machine
        if not machine.running or has_ended(machine):
            raise StateError("a machine that does not run cannot move: start it, or take a snapshot")
        if machine.config.shares:
            raise StateError("a machine with a share cannot move: what is open in it is its server's, another process")
        for number, disk in enumerate(machine.config.disks):
            if disk.temporary and number not in self._mirrored:
                raise StateError(
                    f"disk {disk.path} is written to a file without a name, which cannot move: "
                    "have it go along (--mirror), or give overlay="
                )
        local = self._address.port < 0
        self._fence = Fence.make(self._fence_path) if self._fence_path or local else None
        self._token = self._fence.token if self._fence else os.urandom(TOKEN)
        given = self._fence.another() if self._fence and local else None
        try:
            connection = connect(self._address, self._tls, given=given)
        finally:
            if given is not None:
                os.close(given)
        self._channel = Channel(connection, bandwidth=self._bandwidth)
        how = "postcopy" if self._postcopy else "precopy"
        greeting = hello(machine, how, self._token, fence=not local and self._fence is not None)
        self._disks = self._open_disks()
        for mirrored in self._disks:
            greeting["disks"][mirrored.number] = mirrored.size
        self._channel.send_value(Kind.HELLO, greeting)
        self._channel.receive(Kind.ACCEPT)

    def _open_disks(self) -> list[MirroredDisk]:
        if not self._mirrored:
            return []
        from vmm.migrate.mirror import MirroredDisk

        return [MirroredDisk(number, self._machine.disks[number]) for number in self._mirrored]

    def _move(self) -> tuple[int, float]:
        assert self._channel is not None
        if self._postcopy:
            return self._go_ahead(self._channel)
        with contextlib.closing(open_log(self._machine)) as log:
            parts: list[Part] = [MemoryPart(self._machine.memory, log), *self._disks]
            rounds = self._send_running(parts)

            def last_of_all(channel: Channel, state: State) -> None:
                send_rest(channel, parts)
                channel.send_value(Kind.STATE, {"machine": state, "later": None})

            downtime = self._hand_over(last_of_all)
        self._machine.end_migrated()
        return rounds, downtime

    def _send_running(self, parts: Sequence[Part]) -> int:
        """Send the parts while the guest writes, until little is left; return the number of rounds."""
        assert self._channel is not None
        with Brake(self._machine) as brake:
            return Rounds(self, self._downtime, self._channel, parts, brake).run()

    def _go_ahead(self, channel: Channel) -> tuple[int, float]:
        """Post-copy: send the disks, which cannot follow, then the machine, then its memory."""
        from vmm.migrate import postcopy

        memory = self._machine.memory
        with (
            contextlib.closing(open_log(self._machine)) as log,
            contextlib.closing(postcopy.Pages(self._address, self._tls, memory, self._token)) as pages,
        ):
            touched = postcopy.Touched(memory, log)
            rounds = self._send_running(self._disks) if self._disks else 0

            def bitmaps(channel: Channel, state: State) -> None:
                send_rest(channel, self._disks)
                pages.start()  # loading its devices touches memory before it runs
                channel.send_value(Kind.STATE, {"machine": state, "later": touched.bitmaps()})

            downtime = self._hand_over(bitmaps)
            self.show(Progress("memory behind it", 0, channel.sent, 0, 0.0, 0.0, downtime, 1.0), always=True)
            try:
                postcopy.await_all(channel, self._fence, self._address, self._tls, self._token)
            finally:
                self._machine.end_migrated()  # it can only be at the destination, and is lost there
        channel.sent += pages.sent
        return rounds, downtime

    # ---- progress ----

    def check(self) -> None:
        """Raise if the migration was cancelled or the machine has ended."""
        if self._cancelled:
            raise Cancelled("the migration was cancelled; the machine runs here")
        if has_ended(self._machine):
            raise MigrationError("the machine ended before it was moved")

    def show(self, progress: Progress, *, always: bool = False) -> None:
        """Call the progress callback, at most several times a second unless ``always``."""
        now = time.monotonic()
        if self._progress is not None and (always or now - self._shown_at >= 0.1):
            self._shown_at = now
            self._progress(progress)

    # ---- the handover ----

    def _hand_over(self, send_last: Callable[[Channel, State], None]) -> float:
        """Pause the machine and hand it over; return the downtime in seconds."""
        channel, machine = self._channel, self._machine
        assert channel is not None
        began = time.monotonic()
        machine.pause()
        try:
            channel.unlimited()
            # Quiescing devices completes requests, which writes memory and disks: do it before both are sent last.
            state = machine.save()
            for disk in self._shared:
                disk.let_go()
            send_last(channel, state)
            channel.receive(Kind.READY)
            with self._lock:
                self.check()
                self._gone = True
        except BaseException as error:
            self._stay(error)
            raise
        self._give()
        return time.monotonic() - began

    def _stay(self, error: BaseException) -> None:
        """Resume the paused machine, which the destination neither owns nor can take."""
        if self._fence is not None:
            self._fence.keep()
        self._goodbye(error)
        deadline = time.monotonic() + self._patience
        while True:
            try:
                for disk in self._shared:
                    disk.take_back()
                break
            except VmmError as refused:  # the destination has not released its disks yet
                if time.monotonic() > deadline:
                    raise _undecided(f"{refused}; the machine is held here") from error
                time.sleep(0.05)
        self._machine.resume()

    def _goodbye(self, error: BaseException) -> None:
        if self._channel is not None:
            with contextlib.suppress(VmmError):
                self._channel.send_value(Kind.ABORT, str(error) or type(error).__name__)
            self._channel.close()

    def _give(self) -> None:
        """Hand over ownership. From here on only the fence can return it."""
        assert self._channel is not None
        if self._fence is not None:
            self._fence.give()
        try:
            self._channel.send(Kind.YOURS)
            self._channel.receive(Kind.TAKEN, timeout=self._patience)
            return
        except MigrationError as error:
            lost = error
        if self._fence is None:
            raise _undecided(
                f"{lost}, just after the machine was handed over: if it does not run at {self._address}, resume it "
                "here, else stop it here"
            )
        if not self._was_taken(self._fence):
            self._gone = False
            self._stay(lost)
            raise MigrationError(f"the other side died before it took the machine, which runs here ({lost})")

    def _was_taken(self, fence: Fence) -> bool:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            if fence.state == record.TAKEN:
                return True
            if fence.try_lock():  # with the lock held here, it cannot be taken any more
                return fence.state == record.TAKEN
            time.sleep(0.02)
        raise _undecided(
            f"the destination at {self._address} has the machine's lock and does nothing with it: "
            "end it and resume the machine here, or stop it here"
        )


def hello(machine: Mover, how: str, token: bytes, *, fence: bool) -> State:
    """Return the HELLO; ``fence`` tells whether the destination must open a fence by a path of its own."""
    return {
        "version": wire.VERSION,
        "description": machine.describe(),
        "regions": [list(region) for region in machine.memory.regions],
        "how": how,
        "token": token,
        "fence": fence,
        "disks": [0] * len(machine.config.disks),
    }


def has_ended(machine: Mover) -> bool:
    """Return whether the guest has ended or the machine was stopped."""
    return bool(select.select([machine.stop_fd], [], [], 0)[0])


def _undecided(text: str) -> MigrationError:
    error = MigrationError(text)
    error.undecided = True
    return error
