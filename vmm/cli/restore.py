"""``pyvmm restore``: go on from a snapshot, and exit as the guest ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.cli import boot, command_parser
from vmm.cli.boot_arguments import DEFAULTS, FLAGS
from vmm.config import FIELDS
from vmm.errors import ConfigError
from vmm.snapshot import clock, identity
from vmm.snapshot.origin import PLACES, USES
from vmm.snapshot.restoring import SERVED

if TYPE_CHECKING:
    import argparse


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = command_parser(
        "restore",
        description="Restore the machine of the snapshot in DIR, which is not changed and can be restored again; or\n"
        "of the one that pyvmm serve offers at unix:PATH.\n\n"
        "Memory is read on demand. Disks that the guest can write are the snapshot's copies, with a\n"
        "temporary overlay that is removed at the end. A snapshot locates no resources: --disk names the bases\n"
        "and disks that it does not hold (or all disks), --net and --vsock what the machine was connected to.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", metavar="DIR", help="the snapshot: of pyvmm snapshot, or Machine.snapshot; or unix:PATH"
    )
    parser.add_argument(
        "--check", action="store_true", help="only verify the checksums of the snapshot and of those it is built on"
    )
    parser.add_argument("--no-check", action="store_true", help="do not verify its memory before it is used")
    parser.add_argument(
        "--identity",
        choices=identity.KINDS,
        default="new",
        help="same: keep the saved machine's addresses; only if that machine no longer exists (default: new, others)",
    )
    add_clock(parser)
    parser.add_argument(
        "--later",
        action="store_true",
        help="lazy memory: read pages when they are touched (userfaultfd), recorded ones in advance",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="as --later, and record in DIR which pages are touched, for the next restore",
    )
    for flag, (name, how) in FLAGS.items():
        if name in (*USES, *PLACES) and name not in ("reboot", "huge_pages"):
            parser.add_argument(flag, dest=name, default=None, help=FIELDS[name].help.replace("%", "%%"), **how)
    parser.add_argument("-v", "--verbose", action="store_true", help="print details on standard error")
    return parser


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add ``--clock`` to a command that continues a machine."""
    parser.add_argument(
        "--clock",
        choices=clock.KINDS,
        default="advanced",
        help="kept: the guest's clocks continue from their saved values (default: advanced, to this host's time)",
    )


def run(argv: list[str]) -> int:
    """Restore; return the exit status."""
    given = vars(_parser().parse_args(argv))
    if given["directory"].startswith(SERVED) and (given["check"] or given["record"]):
        raise ConfigError("--check and --record are for a snapshot's directory: use them where that is")
    if given["check"]:
        return _check(given["directory"])
    fields: dict[str, Any] = {**DEFAULTS}
    fields.update((name, given[name]) for name in (*USES, *PLACES) if given.get(name) is not None)
    from vmm.machine import Machine
    from vmm.snapshot import read, working_set

    directory, recorded = given["directory"], given["record"]
    if recorded:
        with read(directory) as snapshot:
            working_set.forget(snapshot)
    later = given["later"] or recorded
    how = {"identity": given["identity"], "clock": given["clock"], "check": not given["no_check"], "later": later}
    machine = Machine.restore(directory, **how, **fields)
    status = boot.go_on(machine, given["verbose"])
    if recorded and machine.lazy:
        with read(directory) as snapshot:
            working_set.save(snapshot, machine.lazy.touched())
    return status


def _check(directory: str) -> int:
    from vmm.snapshot import read

    with read(directory) as snapshot:
        snapshot.check()
        held = sum(region.pages_held for layer in snapshot.layers for region in layer.regions)
        kind = f"differential, {len(snapshot.layers) - 1} under it" if snapshot.parent else "full"
        print(f"{directory}: {kind}, {snapshot.size >> 20} MiB of memory, {held / 256:.1f} MiB held: whole")
    return 0
