"""The face of a virtual machine: built from a configuration, and moved through time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.config import MachineConfig
from vmm.errors import StateError
from vmm.machine.build import Builder
from vmm.machine.observing import ObservableMachine
from vmm.machine.vm import KVM_PATH

if TYPE_CHECKING:
    import os
    import socket
    from collections.abc import Callable
    from types import TracebackType

    from vmm.devices.device import State
    from vmm.migrate.source import Migrated
    from vmm.migrate.standby import Shadow
    from vmm.outcome import Outcome, Replayed
    from vmm.snapshot import Snapshot
    from vmm.snapshot.checkpoint import Checkpoint
    from vmm.snapshot.keeping import Keeper
    from vmm.snapshot.origin import Origin
    from vmm.snapshot.series import Series
    from vmm.snapshot.subject import BackgroundTask


class Machine(ObservableMachine):
    """A virtual machine: ``Machine(kernel="bzImage", memory="512M")``, or from a :class:`MachineConfig`.

    A context manager; leaving it stops and frees everything. Keyword fields are those of
    :data:`vmm.config.FIELDS`. With ``origin`` it is not booted, but continues the machine that this describes. Raises
    :class:`~vmm.errors.ConfigError` for a request that cannot be, :class:`~vmm.errors.HostError` where the host
    refuses.
    """

    def __init__(
        self, config: MachineConfig | None = None, *, kvm: str = KVM_PATH, origin: Origin | None = None, **fields: Any
    ) -> None:
        super().__init__(config.with_(**fields) if config else MachineConfig(**fields), kvm)
        self._builder = Builder(self, origin, self.replay_of)
        try:
            self._builder.build()
        except BaseException:
            self.close()
            raise

    def _another(self, config: MachineConfig, origin: Origin | None) -> Machine:
        return type(self)(config, kvm=self.kvm_path, origin=origin)

    # ---- state ----

    def describe(self) -> State:
        """Return, as a plain value, what must stay the same for the guest on every host."""
        return self.timeline.describe()

    def save(self) -> State:
        """Return everything but memory and the contents of disks, as a plain value. The machine is paused meanwhile."""
        return self.timeline.save()

    def load_state(self, state: State, *, clock: str = "advanced") -> None:
        """Load what :meth:`save` returned, on a machine of the same configuration whose memory is that of then.

        ``clock``: ``"advanced"``, the guest's clocks are as far as they would be if they had gone on with the host's
        since then, or ``"kept"``, they go on from where they stood (``docs/snapshots.md``).

        Raises ``ValueError`` for a state that is not one of such a machine; the machine is of no use then, but to load
        another state.
        """
        self.timeline.load(state, clock=clock)

    def checkpoint(self) -> Checkpoint:
        """Keep the machine's state, memory and disks as they are now, for :meth:`rollback`.

        It may run, be paused, or not have started (then its image is loaded). The guest's clocks do not advance in a
        checkpoint. Raises :class:`~vmm.errors.StateError` if a device cannot be quiesced: a share, whose server is
        another process.
        """
        return self.timeline.checkpoint()

    def rollback(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of this machine; any number of times, and to any of several.

        Its clocks go back with it, the one of the day too: kvmclock, TSC and RTC go on from where they stood.

        A machine that runs (or is paused) goes on from there; one that has ended can be started again. The console's
        transcript keeps what was printed meanwhile, but :meth:`Console.expect` looks behind it.
        """
        self.timeline.rollback(checkpoint)

    def replay(self) -> Replayed:
        """Run a second machine from where the ended one began, to the instruction it died of in a triple fault.

        For hosts whose KVM resets a vCPU before it reports the fault (AMD's SVM): ``outcome.registers`` and a diagnosis
        ask for it there. It takes a few times as long as the run did, 30 to 120 seconds at most. What it finds or why
        it finds nothing: ``docs/debug-a-boot.md``.
        """
        if self.outcome is None:
            raise StateError("there is nothing to replay before the machine has ended: wait() or stop() it first")
        return self.replay_of(self.outcome)()

    def replay_of(self, outcome: Outcome) -> Callable[[], Replayed]:
        """Return what repeats the run that ended so, also after :meth:`close` if it began at the boot."""
        from vmm.machine.replica import replay_of, replica

        return replay_of(self, outcome, lambda: replica(self, self._another))

    # ---- copies ----

    def snapshot(
        self, path: str | os.PathLike[str], *, differential: bool = False, series: Series | None = None
    ) -> Snapshot:
        """Write the machine into the directory ``path``, and return the snapshot, open. It is held meanwhile.

        ``differential``: only the memory written since the last snapshot of this machine that is still there; that
        one is its parent. ``series``: of one's own, whose last one it is. Disks that can be written are copied into
        the directory. A snapshot of that name is replaced when the new one is whole. See ``docs/snapshots.md``.
        Raises :class:`~vmm.errors.SnapshotError` for what cannot be asked, :class:`~vmm.errors.HostError` for what
        the host refuses (a full disk): the machine goes on.
        """
        return self.timeline.snapshot(path, differential=differential, series=series)

    @classmethod
    def restore(
        cls, source: str | os.PathLike[str] | socket.socket, *, identity: str = "new", clock: str = "advanced",
        check: bool = True, later: bool = False, kvm: str = KVM_PATH, **fields: Any,
    ) -> Machine:  # fmt: skip
        """Return a new machine that continues from a snapshot: :meth:`start` it.

        Its memory is the snapshot's, read when it is looked at, until the guest writes it; the snapshot is not
        changed, and may be restored again. ``check`` compares every byte with its checksum first. ``fields`` say anew
        how the machine is used, and where what the snapshot does not hold is: ``docs/snapshots.md``. ``identity``:
        ``"new"``, another machine than the one that was saved (``docs/clones.md``), or ``"same"``, that one, of which
        there is no other then. ``clock``: ``"advanced"``, what the host's clock says has passed has passed for the
        guest, or ``"kept"``.

        ``later``: memory is the machine's own, and pages come by userfaultfd when they are touched, before that those
        of the recorded working set (:attr:`lazy`, :mod:`vmm.snapshot.working_set`). They come over a socket if
        ``source`` is ``"unix:PATH"``, where ``pyvmm serve`` is, which is looked for again when it is lost; or a socket,
        connected to a :class:`vmm.snapshot.serving.PageServer`, which stays the caller's.

        Raises :class:`~vmm.errors.ConfigError` naming the field that is missing,
        :class:`~vmm.errors.SnapshotError` when it is damaged or of another version,
        :class:`~vmm.errors.HostError` when this host lacks what the guest was told it has, or userfaultfd.
        """
        from vmm.machine.copies import restore

        def make(config: MachineConfig, origin: Origin) -> Machine:
            return cls(config, kvm=kvm, origin=origin)

        return restore(make, source, fields, identity=identity, clock=clock, check=check, later=later)

    def clone(
        self, n: int = 1, *, prepare: Callable[[Machine, int], object] | None = None,
        fields: Callable[[int], dict[str, Any]] | None = None, clock: str = "advanced",
    ) -> list[Machine]:  # fmt: skip
        """Return ``n`` new machines that continue from where this one is: :meth:`start` them. It is held meanwhile.

        They share its memory and the contents of its disks until one of them writes, and outlive it. What a clone
        writes to disks goes with it. Each has an identity of its own: ``docs/clones.md``. ``fields(index)`` may say
        anew how a clone is used and where its networks are, which is needed for taps and sockets;
        ``prepare(clone, index)`` is called before it runs. ``clock``: as for :meth:`load_state`.

        Raises :class:`~vmm.errors.ConfigError` for a network that cannot be there twice,
        :class:`~vmm.errors.StateError` for a machine with a share or on huge pages; there is no clone then.
        """
        from vmm.machine.copies import clone

        return clone(self, self._another, n, prepare=prepare, fields=fields, clock=clock)

    # ---- elsewhere ----

    def migrate(self, destination: str, **how: Any) -> Migrated:
        """Move to another process, ``"unix:PATH"`` or ``"tcp:HOST:PORT"``, where :func:`vmm.migrate.receive` waits.

        ``how`` is what :class:`vmm.migrate.Migration` takes. The machine ends here, with the outcome ``migrated``.
        Raises :class:`~vmm.errors.MigrationError` when it does not get there.
        """
        return self.background.migrate(self, destination, how)

    def end_migrated(self) -> None:
        """End here, wherever the guest stands: it goes on elsewhere."""
        self.execution.end_migrated()

    def arrive(self, state: State) -> None:
        """Finish a machine that was made from an ``arriving`` origin, whose memory is here, with this state."""
        self._builder.finish(state)
        self.board.announce()

    def keep(self, directory: str | os.PathLike[str], *, every: float = 60.0, retain: int = 8) -> Keeper:
        """Write a snapshot into ``directory`` every so many seconds; the last ``retain`` of them can be restored.

        See :mod:`vmm.snapshot.keeping`. It goes on until the machine is closed, or :meth:`Keeper.stop`.
        """
        return self.background.keep(directory, every, retain)

    def standby(self, address: str, *, every: float = 1.0, **how: Any) -> Shadow:
        """Have a second process at ``address`` follow, every so many seconds, and take over when this one dies.

        See :class:`vmm.migrate.standby.Shadow`, which also takes ``how``, and :meth:`vmm.migrate.Receiver.stand_by`.
        """
        return self.background.standby(self, address, every, how)

    def run_beside(self, task: BackgroundTask) -> None:
        """Have ``task`` stopped before the machine is closed."""
        self.background.add(task)

    # ---- the end ----

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "vm") and self.vm.is_open:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if not self.vm.is_open else "running" if self.running else "stopped"
        return f"<Machine {self.config.memory >> 20} MiB, {self.config.cpus} vCPU, {state}>"
