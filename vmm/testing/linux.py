"""A Linux guest for tests: booted once, asked for one command after another, and taken back to when it had booted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.errors import ConsoleTimeout, StateError
from vmm.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine import Machine
    from vmm.snapshot.checkpoint import Checkpoint

BOOT_TIMEOUT = 300.0  # seconds; a quarter of a minute where guest kernel code is emulated, under a second elsewhere


_SET_ADDRESS = """for interface in /sys/class/net/*; do
    read -r address <$interface/address
    [ "$address" = {old} ] && {{ ip link set dev ${{interface##*/}} address {new} || exit; break; }}
done"""


class Result(NamedTuple):
    """What a command in the guest did: ``status, output = linux.run("uname -r")``."""

    status: int
    output: str


class LinuxGuest:
    """A Linux guest that runs commands; ``fields`` are those of a :class:`~vmm.machine.Machine`.

    Without ``kernel`` it is the Linux that ``pyvmm boot`` would get for itself; an ``initrd`` of your own is unpacked
    below the session's. The guest boots at the first :meth:`run`, and again at the next after it died or did not answer
    in time: one bad command does not fail the tests behind it. With ``checkpoint`` it is rolled back instead to when it
    had booted, as :meth:`rollback` does; unless the machine cannot be held in one (a share). ``boots`` and
    ``rollbacks`` count.
    """

    def __init__(self, *, checkpoint: bool = False, **fields: Any) -> None:
        self.fields = fields
        self.machine: Machine | None = None
        self.boots = self.rollbacks = 0
        self._wanted = checkpoint
        self._booted: Checkpoint | None = None
        self._unheld = "it keeps no checkpoint"  # why there is none

    def run(self, command: str, timeout: float = 60.0) -> Result:
        """Run ``command`` in the guest's shell, from ``/`` with no input; standard error is part of the output.

        Raises :class:`~vmm.errors.ConsoleTimeout` after ``timeout`` seconds, with what the command printed until
        then, and :class:`~vmm.errors.StateError` when the guest ended meanwhile; it says how.
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
        """Boot a new guest in place of the one there may be. Raises as :meth:`run` does."""
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
        """Have the guest as it was when it had booted: files, processes, disks and clock. It boots if it has not yet.

        Raises :class:`~vmm.errors.StateError` where the machine cannot be held in a checkpoint, and as :meth:`run`
        does when the guest does not boot.
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
        """``n`` guests that go on from where this one is (:meth:`vmm.Machine.clone`), running; this one goes on too.

        Each has the hardware addresses its machine was given, and the host name ``hostname(index)``; its kernel has
        reseeded its random numbers if it can (``CONFIG_VMGENID``). Close them. Raises as :meth:`run` does, and what
        ``Machine.clone`` raises.
        """
        self.run("true")  # it is there, and does nothing else
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
        """Run for the first time, and have the guest be what its machine is. ``before``: what it takes itself for."""
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
            machine.stop()  # for who looks at it
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
    """The hardware addresses of a machine's networks."""
    from vmm.devices.virtio.net import Net

    return [device.mac for device in machine.virtio if isinstance(device, Net)]
