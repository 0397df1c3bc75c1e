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

_HOLDS = "tests/kvm/test_guests.py::test_every_check_of_the_guest_holds"
_DISK = "tests/kvm/test_virtio_guests.py::test_what_a_guest_writes_is_in_the_file_and_comes_back"

# What a vCPU with VT-x does in its own way: how it is entered in each mode, left, interrupted, saved and loaded.
TESTS = [
    "tests/kvm/test_doctor.py",
    f"{_HOLDS}[hello]",
    f"{_HOLDS}[hello_protected]",
    f"{_HOLDS}[hello_real.bin  kind=flat mode=real]",
    f"{_HOLDS}[pvh a=b]",
    f"{_HOLDS}[multiboot a=b]",
    f"{_HOLDS}[syscall]",
    f"{_HOLDS}[irq]",
    f"{_HOLDS}[pio_string]",
    f"{_HOLDS}[exits pio=100 mmio=100]",
    "tests/kvm/test_guests.py::test_the_processor_does_as_the_architecture_says",
    "tests/kvm/test_guests.py::test_the_guest_ends_as_it_says[triple_fault]",
    f"{_DISK}[packed=1 event_idx=1-pci]",
    f"{_DISK}[-mmio]",
    "tests/kvm/test_checkpoint.py::test_what_is_saved_after_a_roll_back_is_the_checkpoint",
    "tests/kvm/test_checkpoint.py::test_a_machine_that_runs_goes_on_from_the_checkpoint",
    "tests/kvm/test_snapshot_machine.py::test_a_machine_goes_on_from_its_snapshot_again_and_again",
    "tests/linux/test_small_kernel.py::test_init_runs_programs_and_powers_off[1]",
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
