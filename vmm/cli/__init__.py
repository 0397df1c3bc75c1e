"""The ``pyvmm`` command. Each subcommand has a module that only parses, calls the library and maps the result.

Exit status: that of the guest's end (see ``pyvmm boot --help``), 2 for a request that cannot be met, 0 otherwise.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import vmm

if TYPE_CHECKING:
    import argparse

# name -> purpose; only the module of the chosen command is imported.
COMMANDS = {
    "boot": "boot a kernel, or a Linux that pyvmm gets for itself",
    "doctor": "say what this host's KVM is and can do",
    "merge": "make one full snapshot of a chain of them",
    "migrate": "move a running machine to another process",
    "profile": "boot, and say where the guest spends its time",
    "receive": "wait for a machine that moves here, and go on with it",
    "restore": "go on from a snapshot, with the console on the terminal",
    "run": "run a command in a Linux guest, and exit with its status",
    "serve": "serve a snapshot's memory to machines that go on from it",
    "snapshot": "write a running machine into a directory",
    "standby": "follow a running machine, and go on with it when its process dies",
    "trace": "boot and show every exit by name, or show what was saved",
}


def _overview() -> str:
    lines = [
        "usage: pyvmm COMMAND [OPTIONS]",
        "",
        "A KVM virtual machine monitor.",
        "",
        *(f"  {name:10}{purpose}" for name, purpose in COMMANDS.items()),
        "",
        "pyvmm COMMAND --help explains a command; pyvmm --version prints the version.",
    ]
    return "\n".join(lines)


def command_parser(name: str, **how: Any) -> argparse.ArgumentParser:
    """Return an argument parser whose errors are one sentence, as everywhere, without the usage."""
    import argparse

    from vmm.errors import ConfigError

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; see pyvmm {name} --help")

    return Parser(prog=f"pyvmm {name}", **how)


def check_writable(*paths: str | None) -> None:
    """Raise :class:`~vmm.errors.ConfigError` for files that cannot be written, before the guest runs."""
    import os

    from vmm.errors import ConfigError

    for path in paths:
        if path is None:
            continue
        folder = os.path.dirname(path) or "."
        why = (
            "it is a directory" if os.path.isdir(path)
            else f"there is no directory {folder}" if not os.path.isdir(folder)
            else "" if os.access(path if os.path.exists(path) else folder, os.W_OK)
            else "that is not permitted"
        )  # fmt: skip
        if why:
            raise ConfigError(f"cannot write {path}: {why}; choose another file")


def main(argv: list[str]) -> int:
    """Run one command line; return the exit status."""
    if argv and argv[0] in ("--version", "-V"):
        print(f"pyvmm {vmm.__version__}")
        return 0
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"pyvmm: there is no command {name!r}: it is one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from importlib import import_module

    from vmm.errors import VmmError

    try:
        return int(import_module(f"vmm.cli.{name}").run(rest))
    except VmmError as error:
        from vmm.slow_reader import report

        report(f"pyvmm: {error}\n")
        return 2
    except BrokenPipeError:
        return 2
    except KeyboardInterrupt:
        return 130


def open_missing_descriptors() -> None:
    """Open /dev/null on each of the descriptors 0 to 2 that this process was started without.

    Else the next file to be opened has that number: a disk, guest memory, or the console's log, and text for
    standard error would be written into it.
    """
    import os

    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)  # open returns the lowest free number: this one
    if sys.stderr is None:  # print() would take standard output instead
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - for as long as the process lives


def entry() -> None:
    """Console script."""
    open_missing_descriptors()
    # Start-up creates no garbage cycles, and collecting costs a tenth of its time. `pyvmm boot` enables it again.
    gc.disable()
    sys.exit(main(sys.argv[1:]))
