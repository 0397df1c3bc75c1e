"""Background tasks of a machine, on threads of their own: periodic snapshots, a standby, a migration."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from vmm.errors import StateError

if TYPE_CHECKING:
    import os

    from vmm.machine.message_log import MessageLog
    from vmm.machine.timeline import Timeline
    from vmm.machine.vm import Vm
    from vmm.migrate.source import Migrated, Migration
    from vmm.migrate.standby import Shadow
    from vmm.migrate.subject import Mover
    from vmm.snapshot.keeping import Keeper
    from vmm.snapshot.subject import BackgroundTask


class Background:
    """The background tasks of one machine, stopped before it is closed, and the migration that is under way."""

    def __init__(self, vm: Vm, timeline: Timeline, log: MessageLog) -> None:
        self.migration: Migration | None = None
        self._tasks: list[BackgroundTask] = []
        self._vm = vm
        self._timeline = timeline
        self._log = log
        self._lock = threading.Lock()

    def add(self, task: BackgroundTask) -> None:
        """Stop ``task`` before the machine is closed."""
        self._tasks.append(task)

    def migrate(self, machine: Mover, destination: str, how: dict[str, Any]) -> Migrated:
        """Migrate ``machine``, whose background this is; one migration at a time."""
        from vmm.migrate.source import Migration

        with self._lock:
            if self.migration is not None:
                raise StateError("the machine is on its way already: cancel that first")
            self.migration = Migration(machine, destination, **how)
        try:
            return self.migration.run()
        finally:
            self.migration = None

    def keep(self, directory: str | os.PathLike[str], every: float, retain: int) -> Keeper:
        """Write snapshots into ``directory`` on a period."""
        from vmm.snapshot.keeping import Keeper

        keeper = Keeper(
            self._timeline,
            self._vm.stop_fd,
            directory,
            every,
            retain,
            tell=self._log.add,
            migrating=lambda: self.migration is not None,
        )
        self.add(keeper)
        return keeper

    def standby(self, machine: Mover, address: str, every: float, how: dict[str, Any]) -> Shadow:
        """Have a second process at ``address`` follow ``machine``, whose background this is."""
        from vmm.migrate.standby import Shadow

        if not machine.running:
            raise StateError("a machine that does not run has nothing to follow: start it first")
        shadow = Shadow(machine, address, every, tell=self._log.add, **how)
        self.add(shadow)
        return shadow

    def stop(self) -> None:
        """Cancel the migration if it can be, and stop every task; wait for all of them. Idempotent."""
        if (migration := self.migration) is not None:
            with contextlib.suppress(StateError):  # it is handed over
                migration.cancel()
            migration.wait()
        for task in list(self._tasks):
            task.stop()
