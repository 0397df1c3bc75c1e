"""A Linux guest for tests: booted once, runs commands, and can be rolled back to the end of its boot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.errors import ConsoleTimeout, StateError
from vmm.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine import Machine
    from vmm.snapshot.checkpoint import Checkpoint

BOOT_TIMEOUT = 300.0  # seconds; a boot takes 15 s where guest kernel code is emulated, under a second elsewhere


_SET_ADDRESS = """for interface in /sys/class/net/*; do
    read -r address <$interface/address
    [ "$address" = {old} ] && {{ ip link set dev ${{interface##*/}} address {new} || exit; break; }}
done"""


class Result(NamedTuple):
    """Result of a command in the guest: ``status, output = linux.run("uname -r")``."""

    status: int
    output: str


class LinuxGuest:
    """A Linux guest that runs commands; ``fields`` are those of a :class:`~vmm.machine.Machine`.

    Without ``kernel`` it is the default Linux of ``pyvmm boot``; an ``initrd`` of your own is unpacked below the
    session's. The guest boots at the first :meth:`run`, and again after it died or timed out, so that one bad command
    does not fail later tests. With ``checkpoint`` it is rolled back to the end of its boot instead, as by
    :meth:`rollback`, unless the machine cannot have a checkpoint (a share). ``boots`` and ``rollbacks`` are counts.
    """

    def __init__(self, *, checkpoint: bool = False, **fields: Any) -> None:
        self.fields = fields
        self.machine: Machine | None = None
        self.boots = self.rollbacks = 0
        self._wanted = checkpoint
        self._booted: Checkpoint | None = None
        self._unheld = "it keeps no checkpoint"  # reason without a checkpoint

    def run(self, command: str, timeout: float = 60.0) -> Result:
        """Run ``command`` in the guest's shell, from ``/`` with no input; standard error is part of the output.

        Raises :class:`~vmm.errors.ConsoleTimeout` after ``timeout`` seconds, with the command's output until then,
        and :class:`~vmm.errors.StateError` with the outcome if the guest ended meanwhile.
        """
        import os

        from vmm.linux import session

        machine = self.machine
        if machine is None or machine.outcome is not None or machine.console.closed:
            machine = self.boot() if self._booted is None else self.rollback()
        token = os.urandom(4).hex()
        start = machine.console.position
        machine.console.send(session.request(command, token))
        try:
            match = machine.console.expect(session.answer(token), timeout)
        except ConsoleTimeout as error:
            raise self._death(machine, f"running {command!r}", error, start) from None
        return Result(int(match[1]), match.string[: match.start()].decode(errors="replace"))

    def boot(self) -> Machine:
        """Boot a new guest, and close the present one. Raises what :meth:`run` raises."""
        from vmm.cli.default_linux import find
        from vmm.config import MachineConfig
        from vmm.linux import session
        from vmm.machine import Machine

        self.close()
        config = find(MachineConfig(**self.fields), memory_given="memory" in self.fields, make=session.archive)
        machine = self.machine = Machine(config)
        self.boots += 1
        machine.start()
        try:
            machine.console.expect(session.READY, config.timeout or BOOT_TIMEOUT)
        except ConsoleTimeout as error:
            raise self._death(machine, "booting", error, 0) from None
        if self._wanted:
            try:
                self._booted = machine.checkpoint()
            except StateError as error:
                self._unheld = str(error)
        return machine

    def rollback(self) -> Machine:
        """Roll the guest back to the end of its boot: files, processes, disks and clock. It boots if it has not yet.

        Raises :class:`~vmm.errors.StateError` if the machine cannot have a checkpoint, and what :meth:`run` raises
        if the guest does not boot.
        """
        machine = self.boot() if self.machine is None else self.machine
        if self._booted is None:
            raise StateError(f"the guest cannot be rolled back: {self._unheld}; use linux_session, which need not be")
        machine.rollback(self._booted)
        if not machine.running:
            machine.start()
        self.rollbacks += 1
        return machine

    def clone(self, n: int = 1, *, hostname: Callable[[int], str] = "clone{}".format) -> list[LinuxGuest]:
        """Return ``n`` running clones of this guest (:meth:`vmm.Machine.clone`), which runs on.

        Each has the hardware addresses of its machine and the host name ``hostname(index)``; a kernel with
        ``CONFIG_VMGENID`` has reseeded its random numbers. The caller closes them. Raises what :meth:`run` and
        ``Machine.clone`` raise.
        """
        self.run("true")  # the session is idle at its prompt
        assert self.machine is not None
        before = _addresses(self.machine)
        guests = []
        for machine in self.machine.clone(n):
            guests.append(LinuxGuest(**self.fields))
            guests[-1].machine = machine
        try:
            for index, guest in enumerate(guests):
                guest._become(before, hostname(index))
        except BaseException:
            for guest in guests:
                guest.close()
            raise
        return guests

    def _become(self, before: list[str], hostname: str) -> None:
        """Start a clone, and set its host name and its machine's hardware addresses in place of those in ``before``."""
        import shlex

        assert self.machine is not None
        self.machine.start()
        commands = [f"hostname {shlex.quote(hostname)}"]
        for old, new in zip(before, _addresses(self.machine), strict=True):
            commands.append(_SET_ADDRESS.format(old=old, new=new))
        status, output = self.run("\n".join(commands))
        if status:
            raise StateError(f"the clone {hostname} did not take its identity up: {printable(output.strip())}")

    def _death(self, machine: Machine, doing: str, error: ConsoleTimeout, start: int) -> Exception:
        if not machine.console.closed:
            machine.stop()  # so that the report can examine it
            printed = error.transcript[start:]
            return ConsoleTimeout(f"the guest did not answer in time, {doing}; it printed {_shown(printed)}", printed)
        return StateError(f"the guest ended, {doing}: {machine.wait().sentence}")

    def close(self) -> None:
        """Stop the guest. The next :meth:`run` boots another."""
        if self.machine is not None:
            self.machine.close()
            self.machine = self._booted = None


def _shown(printed: bytes) -> str:
    return printable(repr(printed[-200:]))


def _addresses(machine: Machine) -> list[str]:
    """Return the hardware addresses of a machine's networks."""
    from vmm.devices.virtio.net import Net

    return [device.mac for device in machine.virtio if isinstance(device, Net)]
