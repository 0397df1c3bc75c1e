"""``pyvmm snapshot``: write a snapshot of a running machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.cli import command_parser
from vmm.printable import printable

if TYPE_CHECKING:
    import argparse


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "snapshot",
        description="Snapshot the machine whose control socket is CONTROL into the directory DIR, for pyvmm restore. "
        "It is paused meanwhile, and then continues.",
    )
    parser.add_argument("control", metavar="CONTROL", help="the machine's control socket (--control)")
    parser.add_argument("directory", metavar="DIR", help="created, or replaced when the new one is complete")
    parser.add_argument("--differential", action="store_true", help="only the memory written since the last one")
    return parser


def run(argv: list[str]) -> int:
    """Take a snapshot; return the exit status."""
    from vmm.control import ask

    given = _parser().parse_args(argv)
    path = os.path.abspath(given.directory)
    done = ask(given.control, {"do": "snapshot", "path": path, "differential": given.differential})
    print(f"{given.directory}: {done['pages'] * 4 / 1024:.1f} MiB of memory, id {printable(str(done['id'])[:16])}")
    return 0
