"""``pyvmm profile``: boot, sample where the vCPUs are, and print the symbols they were in most."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmm import slow_reader
from vmm.cli import check_writable, command_parser
from vmm.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from vmm.console.host_end import HostEnd
    from vmm.machine import Machine


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "profile",
        usage="pyvmm profile [options] -- [boot options]",
        description="Boot as pyvmm boot does, sample every vCPU's RIP, and print the symbols on standard "
        "error. A sample pauses the guest for tens of microseconds.",
        epilog="The exit status is that of pyvmm boot.",
    )
    parser.add_argument("--hz", metavar="N", type=float, default=100.0, help="samples a second (default: 100)")
    parser.add_argument("--stacks", action="store_true", help="walk the stacks too (64-bit guests)")
    parser.add_argument("--folded", metavar="FILE", help="write folded stacks, for a flame graph")
    parser.add_argument("--top", metavar="N", type=int, default=30, help="symbols to print (default: 30)")
    return parser


def run(argv: list[str]) -> int:
    """Profile; return the guest's exit status."""
    if "--" not in argv:
        _parser().parse_args(argv)
        raise ConfigError("profile what? give -- and then the options of pyvmm boot")
    at = argv.index("--")
    given = _parser().parse_args(argv[:at])
    check_writable(given.folded)
    from vmm.cli import boot

    results: list[str] = []

    @contextmanager
    def watch(machine: Machine, end: HostEnd) -> Iterator[None]:
        with machine.profile(given.hz, stacks=given.stacks) as profile:
            yield
        if given.folded is not None:
            _write(given.folded, profile.folded())
        results[:] = [profile.table(given.top)]

    status = boot.run(argv[at + 1 :], watch)
    slow_reader.report("".join(results))
    return status


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error
