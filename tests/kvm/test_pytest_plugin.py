"""The pytest plugin, by running pytest on small test files: fixtures, marks, and what a failed test's report says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    GuestPath = Callable[[str], str]

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester: pytest.Pytester, guest: GuestPath) -> Callable[..., pytest.RunResult]:
    """Runs a test file whose {hello} and so on are paths of guests, in a process of its own."""

    def run(source: str, *options: str) -> pytest.RunResult:
        names = {name: repr(guest(name)) for name in ("hello", "spin", "triple_fault")}
        pytester.makepyfile("import pytest\n" + source.format(**names))
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=60)

    return run


def test_the_mark_configures_the_machine_and_the_closest_wins(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
pytestmark = pytest.mark.vm(kernel={hello}, memory="16M")

def test_of_the_module(machine):
    assert machine.config.memory == 16 << 20
    assert machine.run().status == 33
    assert machine.console.transcript.startswith(b"Hello from long mode")

@pytest.mark.vm(memory="32M", cpus=2)
def test_of_its_own(machine):
    assert (machine.config.memory, machine.config.cpus) == (32 << 20, 2)
    assert machine.run().status == 33

def test_several(make_machine):
    first, second = make_machine(), make_machine(memory="24M")
    assert first.config.memory == 16 << 20
    assert second.config.memory == 24 << 20
    assert first.run().status == second.run().status == 33
""",
        "--strict-markers",
    )
    done.assert_outcomes(passed=3)


def test_files_are_relative_to_the_test_s_own(pytester: pytest.Pytester, guest: GuestPath) -> None:
    folder = pytester.mkdir("below")
    (folder / "hello.elf").symlink_to(guest("hello"))
    (folder / "test_it.py").write_text(
        "import pytest\n@pytest.mark.vm(kernel='hello.elf', memory='16M')\n"
        "def test_it(machine): assert machine.run().status == 33\n"
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=60).assert_outcomes(passed=1)


def test_machines_are_closed_when_their_test_is_over(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
kept = []

@pytest.mark.vm(kernel={spin}, memory="16M")
def test_one(machine):
    machine.start()
    kept.append(machine)

def test_two():
    assert repr(kept[0]).endswith("closed>")
"""
    )
    done.assert_outcomes(passed=2)


def test_a_guest_that_never_ends_meets_the_time_limit(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
@pytest.mark.vm(kernel={spin}, memory="16M", timeout=0.1)
def test_by_mark(machine):
    assert machine.run().reason == "timeout"

@pytest.mark.vm(kernel={spin}, memory="16M")
def test_by_setting(machine):
    assert machine.run().reason == "timeout"
""",
        "-o",
        "vm_timeout=0.2",
    )
    done.assert_outcomes(passed=2)


def test_a_failed_test_s_report_says_how_the_guest_died(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
@pytest.mark.vm(kernel={triple_fault}, memory="16M")
def test_it(machine):
    assert machine.run().ok
"""
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines_random(
        [
            "*guest <Machine 16 MiB, 1 vCPU, stopped>*",
            "<Outcome triple-fault code=0x0 status=12>",
            "pyvmm: *triple fault*",
            "  rip 0x*",
            "  rax 0x*",
            "code:",
            "console, its last 4096 bytes at most:",
        ]
    )


def test_a_guest_that_runs_when_its_test_fails_is_stopped_and_shown(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
@pytest.mark.vm(kernel={spin}, memory="16M")
def test_it(machine):
    machine.start()
    machine.console.expect("login:", timeout=0.2)
"""
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines_random(["*ConsoleTimeout: *'login:'*", "<Outcome stopped *", "  rip 0x*"])


def test_a_machine_of_the_user_s_own_fixture_is_in_the_report_and_runs_on(
    suite: Callable[..., pytest.RunResult],
) -> None:
    done = suite(
        """
from vmm import Machine

@pytest.fixture(scope="module")
def mine():
    with Machine(kernel={spin}, memory="16M") as machine:
        machine.start()
        yield machine

def test_fails(mine):
    assert 0

def test_passes(mine):
    assert mine.running and mine.outcome is None
"""
    )
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines_random(["*guest <Machine 16 MiB, 1 vCPU, running>*", "it runs; console*"])


def test_an_exception_of_a_device_fails_the_test_as_itself(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
@pytest.mark.vm(kernel={hello}, memory="16M")
def test_it(machine):
    machine.on_port(0x3f8, lambda access: 1 // 0)
    machine.run()
"""
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines_random(["*ZeroDivisionError*", "*<Outcome * code=*"])


def test_under_xdist_reports_come_through_and_machines_run_side_by_side(
    suite: Callable[..., pytest.RunResult],
) -> None:
    pytest.importorskip("xdist")
    done = suite(
        """
@pytest.mark.parametrize("n", range(4))
@pytest.mark.vm(kernel={hello}, memory="16M")
def test_it(machine, n):
    assert machine.run().status == (33 if n else 1)
""",
        "-n",
        "2",
    )
    done.assert_outcomes(passed=3, failed=1)
    done.stdout.fnmatch_lines_random(["<Outcome debug-exit *", "  rip 0x*"])


def test_tests_that_use_machines_are_run_as_often_as_asked_and_counted(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
runs = []

@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.vm(kernel={hello}, memory="16M")
def test_it(make_machine, cpus):
    assert make_machine(cpus=cpus).run().status == 33
    runs.append(cpus)

def test_of_no_machine():
    assert sorted(runs) == [1] * 5 + [2] * 5
""",
        "--vm-count=5",
    )
    done.assert_outcomes(passed=11)
    done.stdout.re_match_lines_random([r"virtual machines: 10 tests in \d+\.\d\d s, \d+\.\d tests/s"])


def test_counting_goes_on_under_xdist(suite: Callable[..., pytest.RunResult]) -> None:
    pytest.importorskip("xdist")
    done = suite(
        """
@pytest.mark.vm(kernel={hello}, memory="16M")
def test_it(machine):
    assert machine.run().status == 33
""",
        "--vm-count=6",
        "-n2",
    )
    done.assert_outcomes(passed=6)
    done.stdout.re_match_lines_random([r"virtual machines: 6 tests in .*"])


def test_a_count_of_none_is_refused(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite("def test_it(machine): pass\n", "--vm-count=0")
    assert done.ret != 0
    done.stdout.fnmatch_lines_random(["*--vm-count 0: give 1 or more*"])


def test_a_machine_in_a_fixture_is_rolled_back_for_each_test(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite(
        """
from vmm import Machine

@pytest.fixture(scope="session")
def booted():
    with Machine(kernel={spin}, memory="16M") as machine:
        machine.start()
        machine.console.expect("spinning", timeout=120)
        yield machine, machine.checkpoint()

@pytest.fixture
def spinning(booted):
    machine, checkpoint = booted
    machine.rollback(checkpoint)
    return machine

@pytest.mark.parametrize("n", range(20))
def test_it(spinning, n):
    assert spinning.memory.read(0x400000, 4) == bytes(4)
    spinning.memory.write(0x400000, b"left")
    assert spinning.running
"""
    )
    done.assert_outcomes(passed=20)


def test_a_positional_mark_is_refused(suite: Callable[..., pytest.RunResult]) -> None:
    done = suite("@pytest.mark.vm({hello})\ndef test_it(machine): pass\n")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines_random(["*the vm mark takes named fields only*"])


def test_pytest_without_machines_imports_nothing_of_the_monitor(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import sys

def test_it():
    import vmm.testing.plugin
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "vmm")
    assert ours == ["vmm", "vmm.lazy_names", "vmm.testing", "vmm.testing.plugin"]
"""
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=60).assert_outcomes(passed=1)
