"""``pyvmm receive``: wait for a machine, go on with it, and exit as its guest ended."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vmm.cli import boot, command_parser
from vmm.cli.boot_arguments import DEFAULTS, FLAGS
from vmm.cli.migrate import add_tls, tls_files
from vmm.cli.restore import add_clock
from vmm.config import FIELDS
from vmm.printable import printable
from vmm.snapshot.origin import PLACES, USES

if TYPE_CHECKING:
    import argparse


def _parser() -> argparse.ArgumentParser:
    return parser(
        "receive",
        "Wait at LISTEN for a machine that pyvmm migrate sends, and go on with it. Where its disks, networks and "
        "sockets are is said here; the other side says nothing of that.",
    )


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that waits for a machine."""
    parser = command_parser(name, description=description)
    parser.add_argument("listen", metavar="LISTEN", help="unix:PATH or tcp:HOST:PORT (0: any port)")
    for flag, (name, how) in FLAGS.items():
        if name in (*USES, *PLACES) and name != "reboot":
            parser.add_argument(flag, dest=name, default=None, help=FIELDS[name].help.replace("%", "%%"), **how)
    parser.add_argument("--fence", metavar="FILE", help="the source's fence, a file that both sides can access")
    parser.add_argument("--disks-in", metavar="DIR", help="create files here for mirrored disks (disk0.img, ...)")
    add_clock(parser)
    add_tls(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="print details on standard error")
    return parser


def run(argv: list[str]) -> int:
    """Receive; return the exit status."""
    return receive(vars(_parser().parse_args(argv)))


def receive(given: dict[str, Any], *, standby: bool = False) -> int:
    """Wait as these arguments say, and serve the console; return the exit status."""
    from vmm.errors import ConfigError
    from vmm.migrate import Receiver, Tls

    fields: dict[str, Any] = {**DEFAULTS}
    fields.update((name, given[name]) for name in (*USES, *PLACES) if given.get(name) is not None)
    files = tls_files(given)
    if files and len(files) < 3:
        raise ConfigError("TLS takes --tls-certificate, --tls-key and --tls-authority together")
    tls = Tls(**files) if files else None
    how = {"on_refused": _say, "disks_in": given["disks_in"], "fence": given["fence"], "clock": given["clock"]}
    with Receiver(given["listen"], tls=tls, **how, **fields) as receiver:
        _say(f"waiting for a machine at {receiver.address}")
        machine = receiver.stand_by() if standby else receiver.receive()
    return boot.go_on(machine, given["verbose"])


def _say(text: str) -> None:
    print(f"pyvmm: {printable(text)}", file=sys.stderr, flush=True)
