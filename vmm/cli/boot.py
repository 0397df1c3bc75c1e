"""``pyvmm boot``: boot an image with the console on the terminal, and exit as the guest ended."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vmm import slow_reader
from vmm.cli.boot_arguments import arguments, configure
from vmm.cli.run_limits import RunLimits
from vmm.config import LINUX_KINDS, MachineConfig
from vmm.errors import ConfigError
from vmm.fields import split_commas

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from vmm.console.host_end import HostEnd
    from vmm.control import Control
    from vmm.machine import Machine
    from vmm.observe.gdb import GdbServer
    from vmm.outcome import Outcome

    Watch = Callable[[Machine, HostEnd], AbstractContextManager[None]]


def run(argv: list[str], watch: Watch | None = None) -> int:
    """Boot; return the exit status.

    ``watch(machine, end)`` is a context that is entered before the vCPUs run and left once they have ended.
    """
    given = arguments(argv)
    config = configure(given)
    from vmm.console.host_end import open_end

    end = open_end(config.console)
    try:
        with RunLimits(config.timeout) as limits:
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


def once(
    config: MachineConfig, end: HostEnd, verbose: bool, watch: Watch | None, limits: RunLimits
) -> tuple[Outcome, str]:
    """Create a machine and run it with :func:`serve_once`."""
    from vmm.machine import Machine

    return serve_once(Machine(config), end, verbose, watch, limits)


def serve_once(
    made: Machine, end: HostEnd, verbose: bool, watch: Watch | None, limits: RunLimits
) -> tuple[Outcome, str]:
    """Run a machine with ``end`` at its console, and close it; return its outcome and a report for the user.
    ``limits`` are those of the whole run, which may have several boots."""
    from vmm.console.host_end import PeerGone
    from vmm.console.pump import serve

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
            if not machine.running:  # a received machine runs already
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
        # With panic=-1 a kernel that panics before it has a console only resets: look at its log.
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
    """Run a restored or received machine with :func:`serve_once` at its configured console; return the exit status."""
    from vmm.console.host_end import open_end

    try:
        end = open_end(machine.config.console)
    except BaseException:
        machine.close()
        raise
    try:
        with RunLimits(machine.config.timeout) as limits:
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
    """Start periodic snapshots and a standby, as configured."""
    if config.checkpoint_dir:
        machine.keep(config.checkpoint_dir, every=config.checkpoint_every, retain=config.retain)
    if config.standby:
        address, fence = parse_standby(config.standby)
        machine.standby(address, every=config.checkpoint_every, fence=fence)


def parse_standby(text: str) -> tuple[str, str | None]:
    """Parse ``ADDRESS[,fence=FILE]`` of ``--standby``."""
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
