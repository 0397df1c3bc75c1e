"""``pyvmm serve``: serve a snapshot's memory to machines that are restored from it."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from vmm.cli import command_parser

if TYPE_CHECKING:
    import argparse


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "serve",
        description="Serve the snapshot in DIR at the UNIX socket PATH, for any number of pyvmm restore unix:PATH, "
        "until Ctrl-C. Its checksums are verified first. For machines on another host, forward the socket with "
        "ssh -L or -R. Its disks are not served.",
    )
    parser.add_argument("directory", metavar="DIR", help="the snapshot; it is not changed")
    parser.add_argument("path", metavar="PATH", help="the socket, created with mode 0600")
    return parser


def run(argv: list[str]) -> int:
    """Serve; return the exit status."""
    from vmm import snapshot
    from vmm.snapshot.serving import PageListener

    given = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM removes the socket, too
    with snapshot.read(given.directory) as served:
        served.check()
        with PageListener(served, given.path) as listener, contextlib.suppress(KeyboardInterrupt):
            print(f"{given.directory} is at unix:{given.path}", flush=True)
            listener.serve()
    return 0
