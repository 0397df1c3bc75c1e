"""Standby: a second process keeps a recent state of a machine, and continues from it when the first process dies.

Every period the machine is paused while its state, the pages written since and the disk writes are copied; it runs on
while they are sent. The standby applies an epoch only when it is complete, so its state is always of one moment. It
takes over only with the fence's lock held: then the process that ran the machine has died, and did not record an
orderly end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from vmm.errors import ConfigError, MigrationError, StateError, VmmError
from vmm.migrate import wire
from vmm.migrate.address import Address, connect
from vmm.migrate.fence import Fence
from vmm.migrate.mirror import MirroredDisk
from vmm.migrate.precopy import open_log, resident, send_runs
from vmm.migrate.source import has_ended, hello
from vmm.migrate.tls import Tls
from vmm.migrate.wire import Channel, Kind, LinkLost, cleared

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.memory import DirtyLog
    from vmm.migrate.mirror import Images
    from vmm.migrate.subject import Arriving, Mover

ROUNDS_MAX = 10  # passes over disks before the first state
LITTLE = 16 << 20  # bytes of disks that may be copied while the machine is paused
AGAIN = 1.0  # seconds between two attempts to reach a lost standby


class Shadow:
    """The side that runs the machine: sends its state every ``every`` seconds to a standby at ``address``.

    If this process dies, the guest's work since the last complete state is lost: up to ``every`` seconds and the time
    of a transfer. ``fence`` is required over TCP. A standby that is lost or not there yet is retried, and gets
    everything again. :attr:`sent` counts the states that it confirmed. Disks that the guest writes are copied to files
    of the standby (:mod:`vmm.migrate.mirror`); both sides must see the read-only ones.

    Raises :class:`~vmm.errors.ConfigError`.
    """

    def __init__(
        self,
        machine: Mover,
        address: str,
        every: float,
        *,
        tell: Callable[[str], object],
        fence: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._machine = machine
        self._tell = tell
        self._address = Address.parse(address)
        self._every = every
        self._fence_path = fence
        self._tls = tls
        self.sent = 0
        if self._address.port >= 0 and fence is None:
            raise ConfigError("a standby over TCP takes a fence: without it, it could not know that this side is dead")
        if not 0 < every < wire.PATIENCE / 2:
            limit = f"must be below {wire.PATIENCE / 2:g} s, half of the standby's timeout"
            raise ConfigError(f"a state every {every} s {limit}: give less")
        self._over = threading.Event()
        self._fence: Fence | None = None
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        told = False
        while not self._over.is_set():
            try:
                self._follow()
                return
            except VmmError as error:
                if not told and not self._over.is_set():
                    self._tell(f"the standby at {self._address} does not follow: {error}")
                told = True
            self._over.wait(AGAIN)

    def _follow(self) -> None:
        self._fence = Fence.make(self._fence_path)
        given = self._fence.another() if self._address.port < 0 else None
        try:
            channel = Channel(connect(self._address, self._tls, given=given))
        except BaseException:
            self._fence.keep()
            self._fence.close()
            raise
        finally:
            if given is not None:
                os.close(given)
        log: DirtyLog | None = None
        disks: list[MirroredDisk] = []
        try:
            greeting = hello(self._machine, "standby", self._fence.token, fence=self._address.port >= 0)
            for number, blk in enumerate(self._machine.disks):
                if not blk.readonly:
                    disks.append(MirroredDisk(number, blk))
                    greeting["disks"][number] = disks[-1].size
            channel.send_value(Kind.HELLO, greeting)
            channel.receive(Kind.ACCEPT)
            log = open_log(self._machine)
            send_runs(channel, self._machine.memory, resident(self._machine.memory))
            self._send_running(channel, disks)
            while not has_ended(self._machine):
                self._send(channel, log, disks)
                if self._over.wait(self._every):
                    break
        finally:
            if log is not None:
                log.close()
            for disk in disks:
                disk.close()
            self._fence.keep()  # it ended, or goes on without a standby
            with contextlib.suppress(VmmError):
                channel.send_value(Kind.ABORT, "the machine has ended, or does not need a standby any more")
            channel.close()
            self._fence.close()

    def _send_running(self, channel: Channel, disks: list[MirroredDisk]) -> None:
        """Send disks while the guest writes them, until little is left or the rest does not shrink."""
        for _ in range(ROUNDS_MAX):
            if sum(disk.remaining() for disk in disks) <= LITTLE and all(disk.begun for disk in disks):
                return
            for disk in disks:
                disk.send(channel, lambda _: self._check())

    def _check(self) -> None:
        if self._over.is_set():
            raise StateError("no standby is wanted any more")

    def _send(self, channel: Channel, log: DirtyLog, disks: list[MirroredDisk]) -> None:
        memory = self._machine.memory
        self._machine.pause()
        try:
            state = self._machine.save()
            log.collect()
            copies = [
                (at, memory.read(at, min(wire.DATA_MAX, gpa + size - at)))
                for gpa, size in log.take()
                for at in range(gpa, gpa + size, wire.DATA_MAX)
            ]
            written = [(disk, disk.copies()) for disk in disks]
        finally:
            self._machine.resume()
        for gpa, data in copies:
            channel.send(Kind.PAGES, data, address=gpa)
        for disk, parts in written:
            for at, data in parts:
                disk.send_at(channel, at, data)
        channel.send_value(Kind.EPOCH, state)
        channel.receive(Kind.SEEN)
        self.sent += 1

    def stop(self) -> None:
        """Tell the standby that it is not needed any more, and wait for the thread. Idempotent."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def follow(machine: Arriving, channel: Channel, fence: Fence | None, images: Images, patience: float) -> None:
    """Run the standby's side: receive states until the source dies, then load the last complete one.

    Raises :class:`~vmm.migrate.wire.LinkLost` if the source runs on without this standby,
    :class:`~vmm.errors.MigrationError` if the machine ended in order.
    """
    if fence is None:
        raise MigrationError("a standby takes a fence: give --fence to both sides")
    memory, state = machine.memory, None
    staged: list[tuple[int, bytes]] = []
    size = 0
    try:
        while True:
            frame = channel.receive(Kind.PAGES, Kind.ZEROS, Kind.DISK, Kind.DISK_ZEROS, Kind.EPOCH)
            if frame.kind == Kind.EPOCH:
                for gpa, data in staged:
                    memory.write(gpa, data)
                images.apply()
                state, staged, size = frame.value, [], 0
                channel.send(Kind.SEEN)
                continue
            if frame.kind in (Kind.DISK, Kind.DISK_ZEROS):
                (images.put if state is None else images.stage)(frame)
                continue
            data = frame.payload if frame.kind == Kind.PAGES else bytes(cleared(frame))
            memory.view(frame.address, len(data))  # raises if there is no such memory
            size += len(data)
            if state is None:  # no complete state yet
                memory.write(frame.address, data)
            elif size > memory.size:
                raise MigrationError("the other side sends more than it has memory, and no state")
            else:
                staged.append((frame.address, data))
    except LinkLost as lost:
        if state is None or not fence.lock_within(patience) or not fence.take():
            raise LinkLost(f"{lost}: the machine runs on without a standby, or has ended") from None
    # The machine is owned here now, and these files are the only copy of its disks.
    try:
        images.finish()
    finally:
        images.keep()
    machine.arrive(state)
