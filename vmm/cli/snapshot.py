"""``pyvmm snapshot``: have a running machine write itself into a directory."""

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
        description="Write the machine whose control socket is CONTROL into the directory DIR, for pyvmm restore. It "
        "is held meanwhile, and goes on.",
    )
    parser.add_argument("control", metavar="CONTROL", help="what the machine's --control says")
    parser.add_argument("directory", metavar="DIR", help="made, or replaced when the new one is whole")
    parser.add_argument("--differential", action="store_true", help="only what was written since the last one")
    return parser


def run(argv: list[str]) -> int:
    """Take a snapshot; answers the exit status."""
    from vmm.control import ask

    given = _parser().parse_args(argv)
    path = os.path.abspath(given.directory)
    done = ask(given.control, {"do": "snapshot", "path": path, "differential": given.differential})
    print(f"{given.directory}: {done['pages'] * 4 / 1024:.1f} MiB of memory, id {printable(str(done['id'])[:16])}")
    return 0
