"""``pyvmm migrate``: migrate a running machine, and show the progress."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from vmm.cli import command_parser
from vmm.fields import parse_size

if TYPE_CHECKING:
    import argparse


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "migrate",
        description="Move the machine whose control socket is CONTROL to where pyvmm receive listens.",
    )
    parser.add_argument("control", metavar="CONTROL", help="the machine's control socket (--control)")
    parser.add_argument("destination", metavar="DESTINATION", help="unix:PATH or tcp:HOST:PORT")
    parser.add_argument("--postcopy", action="store_true", help="send the state first, and memory when it is touched")
    parser.add_argument("--mirror", action="store_true", help="copy its disks, including writes of the guest meanwhile")
    parser.add_argument(
        "--mirror-disk", metavar="N", type=int, action="append", help="copy this disk (counted from 0); repeat for more"
    )
    parser.add_argument("--downtime", metavar="MS", type=float, default=300, help="longest final pause (300)")
    parser.add_argument("--bandwidth", metavar="RATE", help="bytes a second while the guest runs, e.g. 100M")
    parser.add_argument("--fence", metavar="FILE", help="file that both sides can access; its lock decides the owner")
    add_tls(parser)
    return parser


def add_tls(parser: argparse.ArgumentParser) -> None:
    """The options for mutual authentication by TLS."""
    parser.add_argument("--tls-certificate", metavar="FILE", help="this side's certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="its key")
    parser.add_argument(
        "--tls-authority", metavar="FILE", help="authority that must have signed the other side's certificate"
    )


def tls_files(given: dict[str, Any]) -> dict[str, str]:
    """Return the files given with these flags, with absolute paths."""
    names = ("certificate", "key", "authority")
    return {name: os.path.abspath(given[f"tls_{name}"]) for name in names if given[f"tls_{name}"]}


def run(argv: list[str]) -> int:
    """Migrate; return the exit status."""
    from vmm.control import ask

    given = vars(_parser().parse_args(argv))
    request: dict[str, Any] = {"do": "migrate", "to": _absolute(given["destination"]), **tls_files(given)}
    request["downtime"] = given["downtime"] / 1000
    if given["postcopy"]:
        request["postcopy"] = True
    if given["mirror"] or given["mirror_disk"]:
        request["mirror"] = given["mirror"] or given["mirror_disk"]
    if given["bandwidth"]:
        request["bandwidth"] = parse_size(given["bandwidth"])
    if given["fence"]:
        request["fence"] = os.path.abspath(given["fence"])
    with Display(sys.stderr.isatty()) as display:
        try:
            done = ask(given["control"], request, display.show)
        except KeyboardInterrupt:
            ask(given["control"], {"do": "cancel"})
            print("pyvmm: cancelled: the machine stays where it is", file=sys.stderr)
            return 130
    print(
        f"moved: held for {done['downtime'] * 1000:.0f} ms, {done['bytes'] / 1e6:.1f} MB in {done['seconds']:.1f} s, "
        f"{done['rounds']} rounds"
    )
    return 0


def _absolute(destination: str) -> str:
    kind, _, path = destination.partition(":")
    return f"unix:{os.path.abspath(path)}" if kind == "unix" and path else destination


class Display:
    """Progress display: rate, remaining bytes, the guest's write rate, the expected pause."""

    def __init__(self, terminal: bool) -> None:
        self._status: Any = None
        if terminal:
            from rich.console import Console

            self._status = Console(stderr=True).status("connecting")

    def show(self, progress: dict[str, Any]) -> None:
        """Show the fields of a :class:`vmm.migrate.Progress`."""
        if self._status is not None:
            self._status.update(sentence(progress))

    def __enter__(self) -> Display:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def sentence(progress: dict[str, Any]) -> str:
    """Return the progress as one line."""
    if not progress["round"]:
        return f"{progress['phase']}, held for {progress['downtime'] * 1000:.0f} ms"
    held = "" if progress["share"] == 1 else f", guest held back to {progress['share']:.0%}"
    return (
        f"round {progress['round']}: {progress['sent'] / 1e6:.1f} MB sent at {progress['rate'] / 1e6:.1f} MB/s, "
        f"{progress['remaining'] / 1e6:.1f} MB remain, guest writes {progress['dirty_rate'] / 1e6:.1f} MB/s, "
        f"pause of {progress['downtime'] * 1000:.0f} ms expected{held}"
    )
