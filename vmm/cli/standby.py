"""``pyvmm standby``: follow a machine in another process, and take over when that process dies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.cli import receive

if TYPE_CHECKING:
    import argparse


def _parser() -> argparse.ArgumentParser:
    return receive.parser(
        "standby",
        "Wait at LISTEN for a machine that was started with --standby, have its state of a moment ago, and go on from "
        "that when its process dies. When the machine ends in order, there is nothing to do: status 2.",
    )


def run(argv: list[str]) -> int:
    """Stand by; return the exit status."""
    return receive.receive(vars(_parser().parse_args(argv)), standby=True)
