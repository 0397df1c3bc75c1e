"""``pyvmm boot``: boot an image with the console on the terminal, and exit as the guest ended."""

from __future__ import annotations

import gc
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from vmm import slow_reader
from vmm.cli import command_parser
from vmm.config import FIELDS, LINUX_KINDS, MachineConfig, read_file
from vmm.errors import ConfigError, StateError
from vmm.fields import split_commas
from vmm.outcome import REASONS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import FrameType

    from vmm.console_host import HostEnd
    from vmm.control import Control
    from vmm.machine import Machine
    from vmm.observe.gdb import GdbServer
    from vmm.outcome import Outcome

    Watch = Callable[[Machine, HostEnd], AbstractContextManager[None]]


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ConfigError(f"--rng {text}: say on or off")
    return text == "on"


# flag -> (field, how argparse takes it)
FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--kernel": ("kernel", {"metavar": "FILE"}),
    "--mem": ("memory", {"metavar": "SIZE"}),
    "--cpus": ("cpus", {"metavar": "N", "type": int}),
    "--initrd": ("initrd", {"metavar": "FILE[,FILE]"}),
    "--append": ("append", {"metavar": '"WORDS"'}),
    "--timeout": ("timeout", {"metavar": "SECONDS", "type": float}),
    "--stall": ("stall", {"metavar": "SECONDS", "type": float}),
    "--console": ("console", {"metavar": "KIND"}),
    "--kind": ("kind", {"metavar": "KIND"}),
    "--mode": ("mode", {"metavar": "MODE"}),
    "--address": ("address", {"metavar": "GPA"}),
    "--unpack": ("unpack", {"metavar": "WHO"}),
    "--compat": ("compat", {"metavar": "HOW"}),
    "--disk": ("disks", {"metavar": "FILE[,OPTION]", "action": "append"}),
    "--net": ("nets", {"metavar": "KIND[,OPTION]", "action": "append"}),
    "--share": ("shares", {"metavar": "DIR:TAG", "action": "append"}),
    "--vsock": ("vsock", {"metavar": "PATH[,cid=N]"}),
    "--rng": ("rng", {"metavar": "on|off", "type": _on_off}),
    "--balloon": ("balloon", {"action": "store_true"}),
    "--console-device": ("console_device", {"metavar": "KIND"}),
    "--virtio": ("virtio", {"metavar": "TRANSPORT"}),
    "--symbols": ("symbols", {"metavar": "FILE"}),
    "--gdb": ("gdb", {"metavar": "ADDR", "nargs": "?", "const": "127.0.0.1:1234"}),
    "--control": ("control", {"metavar": "PATH"}),
    "--checkpoint-dir": ("checkpoint_dir", {"metavar": "DIR"}),
    "--checkpoint-every": ("checkpoint_every", {"metavar": "SECONDS", "type": float}),
    "--retain": ("retain", {"metavar": "N", "type": int}),
    "--standby": ("standby", {"metavar": "ADDRESS"}),
    "--huge-pages": ("huge_pages", {"action": "store_true"}),
    "--screen": ("screen", {"action": "store_true"}),
    "--reboot": ("reboot", {"action": "store_true"}),
}
DEFAULTS: dict[str, Any] = {"console": "stdio"}  # where the command differs from the library


def _parser() -> argparse.ArgumentParser:
    import argparse

    statuses = "\n".join(f"  {status:>4}  {reason}: {text}" for reason, (status, text) in REASONS.items())
    parser = command_parser(
        "boot",
        description="Boot an image; without --kernel, a Linux that pyvmm gets for itself.\n\n"
        "In an option that is a list (FILE[,FILE], FILE[,OPTION]) a comma within a part is written twice.\n\n"
        "On a terminal: Ctrl-A x quits, Ctrl-A h helps, Ctrl-A Ctrl-A sends Ctrl-A.",
        epilog="exit status:\n" + statuses.replace("     1  debug", "   odd  debug") + "\n     2  a request that "
        "cannot be: one sentence on standard error says why\n\ndebug-exit with value v is status (v << 1) | 1.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="machine file (TOML, or JSON by its name); flags win over it")
    for flag, (name, how) in FLAGS.items():
        field = FIELDS[name]
        shown = f"{field.help} (default: {_show(name, DEFAULTS.get(name, field.default))})"
        parser.add_argument(flag, dest=name, default=None, help=shown.replace("%", "%%"), **how)
    parser.add_argument("-v", "--verbose", action="store_true", help="say on standard error how the image is booted")
    return parser


def _show(name: str, default: Any) -> str:
    if name == "memory":
        return f"{default >> 20}M"
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, "", ()) else str(default)


def arguments(argv: list[str]) -> dict[str, Any]:
    """What a command line gives, by name of the field (and ``config``, ``verbose``); exits as argparse does."""
    plain = _plain_arguments(argv)
    return vars(_parser().parse_args(argv)) if plain is None else plain


def _plain_arguments(argv: list[str]) -> dict[str, Any] | None:
    """The usual command line: flags spelt out, each with its value. Anything else is argparse's: ``None``.

    Importing argparse and building its parser takes longer than creating a machine.
    """
    verbose = ("verbose", {"action": "store_true"})
    flags = {**FLAGS, "--config": ("config", {}), "--verbose": verbose, "-v": verbose}
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name, how = flags.get(flag, ("", {}))
        if how.get("action") == "store_true" and not equals:
            given[name] = True
            continue
        if "nargs" in how and not equals:
            return None  # its value may be left out
        value = value if equals else next(words, "-")
        if not name or how.get("action") == "store_true" or (value.startswith("-") and not equals):
            return None
        try:
            taken = how.get("type", str)(value)
        except ValueError:
            return None
        given[name] = [*given.get(name, []), taken] if how.get("action") == "append" else taken
    return given


def given_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the machine file, then those of flags."""
    fields = dict(read_file(given["config"])) if given.get("config") else {}
    fields.update((name, given[name]) for name, _ in FLAGS.values() if given.get(name) is not None)
    return fields


def configure(given: dict[str, Any]) -> MachineConfig:
    """Defaults, then what is given; and a Linux when no kernel is."""
    fields = {**DEFAULTS, **given_fields(given)}
    config = MachineConfig(**fields)
    if config.kernel is None:
        from vmm.cli.default_linux import find

        config = find(config, memory_given="memory" in fields)
    return config


def run(argv: list[str], watch: Watch | None = None) -> int:
    """Boot; answers the exit status.

    ``watch(machine, end)`` is a context that is entered before the vCPUs run and left once they have ended.
    """
    given = arguments(argv)
    config = configure(given)
    from vmm.console_host import open_end

    end = open_end(config.console)
    try:
        with Run(config.timeout) as limits:
            outcome, report = once(config, end, bool(given.get("verbose")), watch, limits)
            while outcome.reason == "reset" and config.reboot:
                if (over := limits.over()) is not None:
                    outcome, report = over, f"pyvmm: {over.sentence}\n"
                    break
                outcome, report = once(config, end, bool(given.get("verbose")), watch, limits)
    finally:
        end.close()
    slow_reader.report(report)
    return outcome.status


LOOKING_LEAST = 10.0  # seconds for looking at a guest that has ended, however little of its time limit is left


class Run:
    """What belongs to a run, however often its machine boots: its time limit, and the signals that end it.

    A context manager: signals are handled from the first :meth:`of` on, until it is left.
    """

    SIGNALS: ClassVar = {signal.SIGINT: 2, signal.SIGTERM: 3, signal.SIGHUP: 3}  # codes of Machine.interrupt

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._deadline: float | None = None
        self._code: int | None = None  # of the first signal
        self._over = False  # a boot has ended, and is looked at
        self._machine: Machine | None = None
        self._before: dict[int, Any] = {}

    def of(self, machine: Machine) -> None:
        """Have signals end ``machine`` from here on: also one that came before it was there."""
        self._machine = machine
        for number in self.SIGNALS if not self._before else ():
            self._before[number] = signal.signal(number, self._signalled)
        if self._code is not None:
            machine.interrupt(self._code)

    def left(self) -> float | None:
        """Seconds until the time limit, which begins at the first call; ``None`` without one."""
        if self._timeout is None:
            return None
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout
        return max(0.0, self._deadline - time.monotonic())

    def over(self) -> Outcome | None:
        """How the run ends instead of with another boot, if it does."""
        from vmm.machine import host_outcome

        return host_outcome(self._code) if self._code is not None else host_outcome(1) if self.left() == 0 else None

    @contextmanager
    def looking(self, machine: Machine) -> Iterator[None]:
        """A boot has ended, and its machine is looked at: a signal ends the command at once, and the time limit holds,
        with :data:`LOOKING_LEAST` seconds behind it."""
        from vmm.observe.budget import Budget

        self._over = True
        left = self.left()
        try:
            self._leave()
            with machine.looking(Budget(within=None if left is None else max(left, LOOKING_LEAST))):
                yield
        finally:
            self._over = False  # closing the machine ends its helpers

    def _leave(self) -> None:
        if self._over and self._code is not None:
            from vmm.machine import host_outcome

            self._over = False
            outcome = host_outcome(self._code)
            slow_reader.report(f"pyvmm: {outcome.sentence}\n")
            raise SystemExit(outcome.status)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._code is None:
            self._code = self.SIGNALS[signal.Signals(number)]
        self._leave()
        if self._machine is not None:
            with suppress(StateError):  # closed: the next one is told
                self._machine.interrupt(self._code)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def once(config: MachineConfig, end: HostEnd, verbose: bool, watch: Watch | None, limits: Run) -> tuple[Outcome, str]:
    """:func:`serve_once` of a new machine."""
    from vmm.machine import Machine

    return serve_once(Machine(config), end, verbose, watch, limits)


def serve_once(made: Machine, end: HostEnd, verbose: bool, watch: Watch | None, limits: Run) -> tuple[Outcome, str]:
    """Run a machine with ``end`` at its console, and close it; return how it ended and what a person should read
    about that. ``limits`` are those of the run that this boot is one of."""
    from vmm.console_host import PeerGone, serve

    config = made.config
    with made as machine:
        machine.on_message = end.say
        machine.load()
        if verbose:
            for note in machine.notes:
                end.say(note)
        limits.of(machine)
        watched = watch(machine, end) if watch else nullcontext()
        controlled = _control(machine, config.control) if config.control else nullcontext()
        with watched, _gdb(machine, config.gdb) if config.gdb else nullcontext(), controlled:
            if not machine.running:  # it came from elsewhere
                machine.start()
            _protect(machine, config)
            gc.freeze()  # see vmm.cli.entry
            gc.enable()
            try:
                serve(machine, end, limits.left())
            except PeerGone as error:
                machine.stop()
                raise ConfigError(str(error)) from error
            outcome = machine.wait()
        if outcome.reason in ("interrupted", "terminated") and not verbose:
            return outcome, f"pyvmm: {outcome.sentence}\n" + (_screen(machine) if config.screen else "")
        # With panic=-1 a kernel that panics unheard only resets: its log tells.
        unheard = outcome.reason == "reset" and machine.kind in LINUX_KINDS and not machine.console.end
        with limits.looking(machine):
            if outcome.ok and not unheard:
                return outcome, _screen(machine) if config.screen else ""
            from vmm.observe.postmortem import brief, report

            how = brief if outcome.reason in ("timeout", "reset") and not verbose else report
            shown = how(machine, outcome)
            return outcome, shown + _screen(machine) if config.screen and not machine.screen() else shown


def _screen(machine: Machine) -> str:
    from vmm.observe import screen

    return "\n".join(screen.section(machine.screen())) + "\n"


def go_on(machine: Machine, verbose: bool) -> int:
    """:func:`serve_once` of a machine that was not booted here, at the end its configuration names; the exit status."""
    from vmm.console_host import open_end

    try:
        end = open_end(machine.config.console)
    except BaseException:
        machine.close()
        raise
    try:
        with Run(machine.config.timeout) as limits:
            outcome, report = serve_once(machine, end, verbose, None, limits)
    finally:
        end.close()
    slow_reader.report(report)
    return outcome.status


def _gdb(machine: Any, option: str) -> GdbServer:
    from vmm.observe.gdb import GdbServer, parse_option

    address, wait, wide = parse_option(option)
    server = GdbServer(machine, address, wait=wait, wide=wide)
    print(f"pyvmm: gdb: target remote {server.address}", file=sys.stderr, flush=True)
    return server


def _protect(machine: Machine, config: MachineConfig) -> None:
    """Snapshots on a period, and a standby, as configured."""
    if config.checkpoint_dir:
        machine.keep(config.checkpoint_dir, every=config.checkpoint_every, retain=config.retain)
    if config.standby:
        address, fence = parse_standby(config.standby)
        machine.standby(address, every=config.checkpoint_every, fence=fence)


def parse_standby(text: str) -> tuple[str, str | None]:
    """``ADDRESS[,fence=FILE]`` of ``--standby``."""
    address, *options = split_commas(text)
    fence = [option.removeprefix("fence=") for option in options if option.startswith("fence=")]
    if len(options) != len(fence) or len(fence) > 1:
        raise ConfigError(
            f"--standby {text}: after the address there is only ,fence=FILE; write a comma in a path twice"
        )
    return address, fence[0] or None if fence else None


def _control(machine: Machine, path: str) -> Control:
    from vmm.control import Control

    return Control(machine, path)
