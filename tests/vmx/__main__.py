"""``python -m tests.vmx run|do|build``: the smoke test, or a command, on the VT-x host."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tests.svm import job, project
from tests.svm.root import root
from tests.vmx import bochs

if TYPE_CHECKING:
    pass

# One of each kind: what a vCPU with VT-x does differently is entered, left, interrupted, saved and loaded in these.
TESTS = [
    "tests/vmx/test_vmx.py",
]


def main() -> int:
    """Build what is missing, run the job in the VT-x host, and return its status."""
    parser = argparse.ArgumentParser(prog="make vmx", description=__doc__)
    parser.add_argument("action", choices=("run", "do", "build"))
    parser.add_argument("--junit", type=Path, default=Path("build/vmx/junit.xml"), help="where run's results go")
    parser.add_argument("--silence", type=float, default=1200, help="seconds without output after which it is hung")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="run: for pytest (files, -k, -m); do: a command")
    arguments = parser.parse_args()
    report = job.Reporter("vmx")
    bochs.require()
    made = root("kvm_intel", report)
    if arguments.action == "build":
        print(made.image)
        return 0
    words = arguments.words
    script = project.quoted(words) + "\n" if arguments.action == "do" else job.pytest_command(words or TESTS)
    junit = arguments.junit if arguments.action == "run" else None
    return job.perform(
        script, lambda disk, results: bochs.run(made, disk, results, silence=arguments.silence), report, junit
    )


job.main("vmx", main)
