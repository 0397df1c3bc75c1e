"""``python -m tests.svm run|do|smoke|shell|build``: tests, a command, a smoke test or a shell on the SVM host."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.svm import project, qemu
from tests.svm.root import root
from vmm.errors import VmmError

_PYTEST = [
    "python3",
    "-P",
    "-m",
    "pytest",
    "-v",
    "-ra",
    "-p",
    "tests.svm.limit",
    "-n",
    "2",
    "-o",
    "addopts=--strict-markers",
]
_SMOKE = """
set -e
pyvmm doctor
pyvmm boot --kernel guests-built/hello --timeout 120 || [ $? = 33 ]
pyvmm run -- uname -a
"""

_last = ""


def _progress(stage: str, done: int, total: int | None) -> None:
    """Tell every new stage on stderr, once."""
    global _last
    if stage != _last:
        _last = stage
        print(f"svm: {stage}", file=sys.stderr, flush=True)


def _job(action: str, words: list[str]) -> str:
    head = "#!/bin/sh\nmkdir -p $PYVMM_CACHE/linux\nln -s /project/linux/* $PYVMM_CACHE/linux/ 2>/dev/null\n"
    head += project.environment(["SVM_TEST_LIMIT", "HYPOTHESIS_PROFILE"])
    if action == "shell":
        return head + "echo 'ends with exit; the project is in /project'\nsetsid -c bash -i\n"
    if action == "do":
        return head + project.quoted(words) + "\n"
    if action == "smoke":
        return head + _SMOKE
    return head + project.quoted([*_PYTEST, "--junit-xml=/results/junit.xml", "--durations=25", *words]) + "\n"


def main() -> int:
    """Build what is missing, run the job in the SVM host, and return its status."""
    parser = argparse.ArgumentParser(prog="make svm", description=__doc__)
    parser.add_argument("action", choices=("run", "do", "smoke", "shell", "build"))
    parser.add_argument("--junit", type=Path, default=Path("build/svm/junit.xml"), help="where the results go")
    parser.add_argument("--silence", type=float, default=1800, help="seconds without output after which it is hung")
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, help="run: for pytest (files, -k, -m); do: a command and its words"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    made = root(_progress)
    if arguments.action == "build":
        print(made.image)
        return 0
    build = Path("build/svm").resolve()
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=build) as name:
        folder = Path(name)
        disk = project.project_disk(_job(arguments.action, arguments.words or ["tests"]), folder, _progress)
        print(f"svm: booting, {time.monotonic() - started:.0f} s after the start", file=sys.stderr, flush=True)
        guest = qemu.Guest(made, disk, folder, silence=arguments.silence, interactive=arguments.action == "shell")
        status = guest.run()
        if arguments.action == "run":
            guest.results(folder / "results")
            arguments.junit.parent.mkdir(parents=True, exist_ok=True)
            with_xml = folder / "results" / "junit.xml"
            if with_xml.exists():
                shutil.copyfile(with_xml, arguments.junit)
                print(f"svm: {arguments.junit}", file=sys.stderr)
    return status


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # temporary files go, as after an interrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main())
    except VmmError as error:
        print(f"svm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("svm: interrupted", file=sys.stderr)
        sys.exit(130)
