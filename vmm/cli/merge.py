"""``pyvmm merge``: one full snapshot of a differential one and all it is built on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.cli import command_parser

if TYPE_CHECKING:
    import argparse


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "merge",
        description="Write into the directory INTO a full snapshot with the content of the one in DIR and of all those "
        "it is built on, which may be removed then. Their checksums are verified first.",
    )
    parser.add_argument("directory", metavar="DIR", help="the last snapshot of the chain; it is not changed")
    parser.add_argument(
        "into", metavar="INTO", help="created, or replaced when the new one is complete; may be DIR itself"
    )
    return parser


def run(argv: list[str]) -> int:
    """Merge; return the exit status."""
    from vmm import snapshot

    given = _parser().parse_args(argv)
    with snapshot.read(given.directory) as chain, snapshot.merge(chain, given.into) as merged:
        held = sum(region.pages_held for region in merged.regions)
        print(f"{given.into}: full, {merged.size >> 20} MiB of memory, {held / 256:.1f} MiB held")
    return 0
