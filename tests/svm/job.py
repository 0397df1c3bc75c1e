"""What `make svm` and `make vmx` have in common: a job in a test host, from building the disks to the results."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.svm import project
from tests.svm.emulator import Results
from vmm.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Callable

_HEAD = """#!/bin/sh
mkdir -p $PYVMM_CACHE/linux
ln -s /project/linux/* $PYVMM_CACHE/linux/ 2>/dev/null
"""
_HANDED_ON = ["SVM_TEST_LIMIT", "SVM_TEST_GRACE", "HYPOTHESIS_PROFILE"]


class Reporter:
    """A progress report that says each new stage once, on stderr."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Say ``stage`` if it is a new one."""
        if stage != self._stage:
            self._stage = stage
            print(f"{self.name}: {stage}", file=sys.stderr, flush=True)


def pytest_command(words: list[str], *more: str) -> str:
    """A shell line that runs pytest with ``words``, its results in /results."""
    argv = ["python3", "-P", "-m", "pytest", "-v", "-ra", "-o", "addopts=--strict-markers"]
    argv += ["-p", "tests.svm.limit", "-p", "tests.svm.failures"]
    return project.quoted([*argv, *more, "--junit-xml=/results/junit.xml", "--durations=25", *words]) + "\n"


def perform(script: str, boot: Callable[[Path, Results], None], report: Reporter, junit: Path | None = None) -> int:
    """Run a shell script in a host that ``boot`` starts with the project's disk; return its exit status.

    What it left of JUnit XML goes to ``junit``. Temporary files are gone in every case.
    """
    build = Path("build/svm").resolve()
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=build) as name:
        folder = Path(name)
        disk = project.project_disk(_HEAD + project.environment(_HANDED_ON) + script, folder, report)
        report("booting", 0, None)
        results = Results(folder)
        boot(disk, results)
        status = results.status()
        if junit is not None:
            results.unpack(folder / "results")
            if (made := folder / "results" / "junit.xml").exists():
                junit.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(made, junit)
                report(f"the results are in {junit}", 0, None)
    return status


def main(name: str, body: Callable[[], int]) -> None:
    """Run ``body`` as a program: one sentence for what went wrong, status 2; 130 after an interrupt."""

    def terminate(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # temporary files go, as after an interrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(body())
    except VmmError as error:
        print(f"{name}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{name}: {error.filename or 'a disk image'}: {error.strerror}: is the disk full?", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)
