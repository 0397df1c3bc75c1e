"""``python -m tests.svm run|do|smoke|shell|build``: tests, a command, a smoke test or a shell on the SVM host."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tests.svm import job, project, qemu
from tests.svm.root import root

if TYPE_CHECKING:
    from tests.svm.emulator import Results

_SMOKE = """
set -e
pyvmm doctor
pyvmm boot --kernel guests-built/hello --timeout 120 || [ $? = 33 ]
pyvmm run -- uname -a
"""
_SHELL = "echo 'exit ends it; the project is in /project'\nsetsid -c bash -i\n"


def _script(action: str, words: list[str]) -> str:
    scripts = {"shell": _SHELL, "smoke": _SMOKE, "do": project.quoted(words) + "\n"}
    return scripts.get(action) or job.pytest_command(words or ["tests"], "-n", "2", "--dist", "loadgroup")


def main() -> int:
    """Build what is missing, run the job in the SVM host, and return its status."""
    parser = argparse.ArgumentParser(prog="make svm", description=__doc__)
    parser.add_argument("action", choices=("run", "do", "smoke", "shell", "build"))
    parser.add_argument("--junit", type=Path, default=Path("build/svm/junit.xml"), help="where run's results go")
    parser.add_argument("--silence", type=float, default=1800, help="seconds without output after which it is hung")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="run: for pytest (files, -k, -m); do: a command")
    arguments = parser.parse_args()
    action = arguments.action
    report = job.Reporter("svm")
    qemu.require()
    made = root("kvm_amd", report)
    if action == "build":
        print(made.image)
        return 0

    def boot(disk: Path, results: Results) -> None:
        if action == "shell":
            qemu.run_on_terminal(made, disk, results)
        else:
            qemu.run(made, disk, results, silence=arguments.silence)

    return job.perform(_script(action, arguments.words), boot, report, arguments.junit if action == "run" else None)


job.main("svm", main)
