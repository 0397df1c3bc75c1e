"""Destination of a migration. Everything received is checked, since the peer is untrusted."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError, MigrationError, VmmError
from vmm.migrate import mirror, postcopy, standby, wire
from vmm.migrate.address import Address, Listener
from vmm.migrate.fence import TOKEN, Fence
from vmm.migrate.tls import Tls
from vmm.migrate.wire import Channel, Kind, LinkLost
from vmm.snapshot.clock import advances
from vmm.snapshot.origin import Origin

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmm.deadline import Deadline
    from vmm.machine import Machine

_HELLO = {
    "version": int, "description": dict, "regions": list, "how": str, "token": bytes, "fence": bool,
    "disks": list,
}  # fmt: skip


class Receiver:
    """Listen at ``address`` for one machine. A context manager.

    ``fields`` give the machine's use and the places of its disks and networks on this host, as with
    :meth:`vmm.Machine.restore`: the source does not send them. ``disks_in`` is a directory for the files ``disk0.img``
    and so on of mirrored disks; ``disks`` then lists only the others. Without it ``disks`` names files for mirrored
    disks too, which must not exist yet. ``fence`` is the file that both sides see, if the source has one; on a UNIX
    socket the source passes it. ``on_refused`` is called with the reason for each refused connection. ``clock`` is
    ``"advanced"`` (the guest's clocks include the time, by this host's clock, since the source paused it) or
    ``"kept"``.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        kvm: str = "/dev/kvm",
        patience: float = wire.PATIENCE,
        on_refused: Callable[[str], object] | None = None,
        disks_in: str | os.PathLike[str] | None = None,
        fence: str | None = None,
        clock: str = "advanced",
        **fields: Any,
    ) -> None:
        advances(clock)
        self.clock = clock
        self._fields = fields
        self.fence = fence
        self.disks_in = None if disks_in is None else os.fspath(disks_in)
        self._kvm = kvm
        self._patience = patience
        self._on_refused = on_refused
        self.listener = Listener(Address.parse(address), tls)
        self._handed_over = False
        self.follows = False

    @property
    def address(self) -> str:
        """The address it listens at; with the port that the kernel chose, if 0 was given."""
        return str(self.listener.address)

    def receive(self, timeout: float | None = None) -> Machine:
        """Wait for a machine and return it, running.

        A connection that is refused before any data was sent does not end the wait. Raises
        :class:`~vmm.errors.MigrationError` when a migration that has begun fails, ``TimeoutError`` after ``timeout``
        seconds without one.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            try:
                arrival = Arrival(self, *self.listener.accept(left))
            except MigrationError as error:
                if self._on_refused:
                    self._on_refused(str(error))
                continue
            return arrival.run()

    def stand_by(self) -> Machine:
        """Follow a machine in another process (:meth:`vmm.Machine.standby`); return it, running, after that dies.

        While the source lives, a lost link is awaited again.

        Raises :class:`~vmm.errors.MigrationError` when the machine has ended in order.
        """
        self.follows = True
        while True:
            try:
                return self.receive()
            except LinkLost as lost:
                if self._on_refused:
                    self._on_refused(str(lost))

    def hand_over(self) -> Listener:
        """Return the listener, which post-copy needs for its pages; the receiver cannot be used afterwards."""
        self._handed_over = True
        return self.listener

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if not self._handed_over:
            self.listener.close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def receive(address: str, timeout: float | None = None, **how: Any) -> Machine:
    """Wait at ``address`` for a machine and return it, running. ``how`` are the arguments of :class:`Receiver`."""
    with Receiver(address, **how) as receiver:
        return receiver.receive(timeout)


class Arrival:
    """One incoming machine on one accepted connection.

    ``fd`` is the descriptor that was passed, which this object now owns; ``until`` is the deadline of the greeting.
    Raises :class:`~vmm.errors.MigrationError` after it has sent the reason to the source.
    """

    def __init__(self, receiver: Receiver, connection: Any, fd: int | None, until: Deadline) -> None:
        self._receiver = receiver
        self._patience = receiver._patience
        self._channel = Channel(connection)
        self._machine: Machine | None = None
        self._fence: Fence | None = None
        self._how, self._token = "", b""
        self._pages: socket.socket | None = None
        self._images: mirror.Images | None = None
        with self._refusing():
            self._greet(fd, until)

    @contextlib.contextmanager
    def _refusing(self) -> Any:
        """On an error, send the reason to the source and release everything received."""
        try:
            yield
        except LinkLost:
            self._give_up()
            raise
        except (VmmError, ValueError, OverflowError) as error:
            with contextlib.suppress(MigrationError):
                self._channel.send_value(Kind.REFUSE, str(error))
            self._give_up()
            raise error if isinstance(error, MigrationError) else MigrationError(str(error)) from error
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        # Close the machine first: the source may use its disks again as soon as it sees the link end.
        if self._machine is not None:
            self._machine.close()
        if self._images is not None:
            self._images.remove()
        self._close()

    def _close(self) -> None:
        self._channel.close()
        if self._pages is not None:
            self._pages.close()
        if self._fence is not None:
            self._fence.close()

    # ---- greeting ----

    def _greet(self, fd: int | None, until: Deadline) -> None:
        try:
            hello = _checked(self._channel.receive(Kind.HELLO, within=until).value)
            came, fd = fd, None  # the fence closes it, whatever happens
            self._fence = self._join(hello, came)
        finally:
            if fd is not None:
                os.close(fd)
        self._how, self._token = hello["how"], hello["token"]
        if (self._how == "standby") != self._receiver.follows:
            raise MigrationError(
                "one side wants a machine moved, the other a standby: use pyvmm receive, or pyvmm standby"
            )
        self._machine = self._prepare(hello)
        self._images = mirror.Images(self._machine.config.disks, hello["disks"])
        self._channel.send_value(Kind.ACCEPT, {"version": wire.VERSION})

    def _join(self, hello: dict[str, Any], fd: int | None) -> Fence | None:
        if fd is not None:
            return Fence.adopt(fd, hello["token"])
        if not hello["fence"]:
            if self._receiver.fence is not None:
                raise MigrationError("only this side has a fence: give --fence to the source too")
            return None
        if self._receiver.fence is None:
            raise ConfigError("the source has a fence: give --fence FILE, the file that both sides see, here too")
        return Fence.open(self._receiver.fence, hello["token"])

    def _prepare(self, hello: dict[str, Any]) -> Machine:
        """Create the machine with empty memory, so that an unsuitable host is found before much is sent."""
        from vmm.machine import Machine

        receiver, sizes = self._receiver, hello["disks"]
        origin = Origin(hello["description"], arriving=True, clock=receiver.clock)
        mirror.check_sizes(sizes, len(origin.described.disks))
        made = origin.config(
            receiver._fields,
            ready=mirror.coming(origin.described, sizes, receiver.disks_in),
            why="does not come along (--mirror)" if receiver.disks_in or not any(sizes) else "needs a file here",
        )
        mirror.check_plain(made.disks, sizes)
        machine = Machine(made, kvm=receiver._kvm, origin=origin)
        if hello["regions"] != [list(region) for region in machine.memory.regions]:
            machine.close()
            raise MigrationError("the machine's memory lies elsewhere than this pyvmm puts it: take one of its version")
        return machine

    # ---- transfer ----

    def run(self) -> Machine:
        """Receive the machine; return it, running."""
        machine = self._machine
        assert machine is not None
        if self._how == "standby":
            with self._refusing():
                assert self._images is not None
                standby.follow(machine, self._channel, self._fence, self._images, self._patience)
                machine.start()
            self._close()
            return machine
        with self._refusing():
            if self._how == "postcopy":
                self._pages = postcopy.await_pages(self._receiver.listener, self._token)
            state, later = self._fill()
            page_watch = self._expect(machine, later)
            assert self._images is not None
            self._images.finish()  # on stable storage before this side can own the machine; closed before it opens them
            machine.arrive(state)
            self._channel.send(Kind.READY)
            self._take()
            self._images.keep()
            machine.start()
        with contextlib.suppress(MigrationError):  # this side owns it, whether TAKEN arrives or not
            self._channel.send(Kind.TAKEN)
        if page_watch is None:
            self._close()
        else:
            page_watch.taken()
        return machine

    def _expect(self, machine: Machine, later: Any) -> postcopy.PageWatch | None:
        """Set up post-copy if the memory did not come before the state."""
        if self._pages is None:
            return None
        with self._pages as connection:
            machine.lazy = postcopy.expect(machine, later, connection)
        listener = self._receiver.hand_over()
        return postcopy.PageWatch(
            machine, machine.lazy, self._channel, listener, self._fence, self._token, self._patience
        )

    def _fill(self) -> tuple[Any, Any]:
        """Store memory and disks as they arrive; return the final state, and the bitmaps of pages that come later."""
        assert self._machine is not None and self._images is not None
        memory, channel, images = self._machine.memory, self._channel, self._images
        while True:
            frame = channel.receive(Kind.PAGES, Kind.ZEROS, Kind.DISK, Kind.DISK_ZEROS, Kind.ROUND, Kind.STATE)
            if frame.kind == Kind.STATE:
                value = frame.value
                if not isinstance(value, dict) or value.keys() != {"machine", "later"}:
                    raise MigrationError("the other side sent no state: the migration is refused")
                return value["machine"], value["later"]
            if frame.kind == Kind.ROUND:
                images.sync()  # keeps the downtime short, and lets the source measure the disk's speed
                channel.send(Kind.SEEN)
            elif frame.kind in (Kind.DISK, Kind.DISK_ZEROS):
                images.put(frame)
            elif frame.kind == Kind.PAGES:
                memory.write(frame.address, frame.payload)
            else:
                self._clear(frame.address, wire.cleared(frame))

    def _clear(self, gpa: int, size: int) -> None:
        assert self._machine is not None
        if self._machine.memory.read(gpa, size) != bytes(size):  # a write would allocate pages that are zero anyway
            self._machine.memory.fill(gpa, size)

    def _take(self) -> None:
        """Take ownership, or raise; after an exception the machine never runs here."""
        fence = self._fence
        try:
            self._channel.receive(Kind.YOURS)
        except LinkLost as lost:
            # Without a fence a broken link looks like a dead source: the machine may continue there. A dead source
            # also takes the pages that only it had.
            whole = self._pages is None or (fence is not None and fence.source_lives())
            if fence is None or not whole or not fence.lock_within(self._patience) or not fence.take():
                raise LinkLost(f"{lost}: the machine stays where it was") from None
            return
        if fence is not None and not (fence.lock_within(self._patience) and fence.take()):
            raise MigrationError("the source took the machine back")


def _checked(hello: Any) -> dict[str, Any]:
    if not isinstance(hello, dict):
        raise MigrationError("the other side does not say what is coming")
    if hello.get("version") != wire.VERSION:
        raise MigrationError(
            f"the other side speaks version {hello.get('version')!r} of the protocol, this one {wire.VERSION}: "
            "take the same pyvmm on both"
        )
    if hello.keys() != _HELLO.keys() or not all(isinstance(hello[name], kind) for name, kind in _HELLO.items()):
        raise MigrationError("the other side does not say what is coming as it should")
    if hello["how"] not in ("precopy", "postcopy", "standby") or len(hello["token"]) != TOKEN:
        raise MigrationError("the other side wants something that this pyvmm does not know")
    return hello
