"""The pytest plugin: machines as fixtures, and the state of the guests in the report of a failed test.

Installing pyvmm registers it. It imports the monitor only when a fixture is used.

``machine``
    a machine with the fields of ``@pytest.mark.vm(kernel=..., memory=...)`` (those of :class:`vmm.Machine`), not
    started;
``make_machine``
    a function for more of them, with the same fields on top of the mark's;
``linux``
    a :class:`vmm.testing.linux.LinuxGuest`, booted once a session and rolled back before every test; override the
    session fixture ``linux_fields`` to choose its kernel, memory or disks;
``linux_session``
    the same guest in the state in which the previous test left it.

``--vm-count N`` runs each test that uses one of them N times, and reports the rate.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from vmm.machine import Machine
    from vmm.testing.linux import LinuxGuest

CONSOLE_SHOWN = 4096  # bytes
_FILES = ("kernel", "symbols", "initrd")
_MADE: pytest.StashKey[list[Any]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the setting."""
    group = parser.getgroup("virtual machines")
    group.addoption(
        "--vm-count", type=int, default=1, metavar="N", help="run each test that uses a virtual machine N times"
    )
    parser.addini("vm_timeout", "seconds after which the run of a fixture's machine ends (default: 60)", default="60")


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line(
        "markers",
        "vm(kernel=..., memory=..., cpus=..., timeout=..., ...): the fields of the machine fixture; marks of a test "
        "go before those of its class and module. Files are relative to the test's own.",
    )


# ---- fixtures ----


def _fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Merge the fields of the marks, the closest first; files are relative to the test's."""
    fields: dict[str, Any] = {"timeout": float(request.config.getini("vm_timeout"))}
    for mark in reversed(list(request.node.iter_markers("vm"))):
        if mark.args:
            raise pytest.UsageError("the vm mark takes named fields only: pytest.mark.vm(kernel=..., memory=...)")
        fields.update(mark.kwargs)
    return _beside(fields, request.path.parent)


def _beside(fields: dict[str, Any], folder: Any) -> dict[str, Any]:
    def place(value: Any) -> Any:
        return [place(one) for one in value] if isinstance(value, list | tuple) else str(folder / value)

    return {name: place(value) if name in _FILES and value else value for name, value in fields.items()}


def _need_kvm() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing or may not be opened: no virtual machine can run here")


@pytest.fixture
def make_machine(request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """A function that creates machines with the vm mark's fields and those given; they are closed after the test."""
    _need_kvm()
    from vmm.machine import Machine

    made: list[Machine] = request.node.stash.setdefault(_MADE, [])
    marked = _fields(request)

    def make(**fields: Any) -> Machine:
        machine = Machine(**{**marked, **_beside(fields, request.path.parent)})
        made.append(machine)
        return machine

    yield make
    for machine in reversed(made):
        machine.close()


@pytest.fixture
def machine(make_machine: Callable[..., Machine]) -> Machine:
    """The machine that the vm mark describes, not started."""
    return make_machine()


@pytest.fixture(scope="session")
def linux_fields() -> dict[str, Any]:
    """The fields of the ``linux`` guest; override it in a conftest.py to choose them."""
    return {}


@pytest.fixture(scope="session")
def linux_session(linux_fields: dict[str, Any]) -> Iterator[LinuxGuest]:
    """A Linux guest to run commands in: ``status, output = linux_session.run("uname -r")``. Tests share its state."""
    _need_kvm()
    from vmm.testing.linux import LinuxGuest

    guest = LinuxGuest(checkpoint=True, **linux_fields)
    yield guest
    guest.close()


@pytest.fixture
def linux(linux_session: LinuxGuest) -> LinuxGuest:
    """The same guest, rolled back to the end of its boot before every test."""
    linux_session.rollback()
    return linux_session


# ---- repetition ----

_FIXTURES = frozenset({"make_machine", "linux_session"})  # the other fixtures depend on these


@pytest.fixture
def vm_repetition(request: pytest.FixtureRequest) -> int:
    """The number of the test's run, of ``--vm-count``, from 0."""
    return getattr(request, "param", 0)


@pytest.hookimpl(trylast=True)  # after a test's own parameters
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat the tests that use a machine."""
    count = metafunc.config.getoption("vm_count")
    if count < 1:
        raise pytest.UsageError(f"--vm-count {count}: give 1 or more")
    if count > 1 and not _FIXTURES.isdisjoint(metafunc.fixturenames):
        if "vm_repetition" not in metafunc.fixturenames:
            metafunc.fixturenames.append("vm_repetition")
        metafunc.parametrize("vm_repetition", range(count), indirect=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the rate of tests with machines since the first got its machine; the boot of a guest is not included."""
    if config.getoption("vm_count") < 2:
        return
    kinds = [kind for kind in terminalreporter.stats.values() if kind and isinstance(kind[0], pytest.TestReport)]
    reports = [report for kind in kinds for report in kind if getattr(report, "uses_vm", False)]
    ran = [report for report in reports if report.when == "call"]
    if ran:
        start = min(report.start for report in ran)
        seconds = max(report.stop for report in reports) - start
        terminalreporter.write_line(
            f"virtual machines: {len(ran)} tests in {seconds:.2f} s, {len(ran) / seconds:.1f} tests/s"
        )


# ---- the report of a failed test ----


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Add the state of its machines to a failed test's report. Those of ``make_machine`` are stopped for it."""
    outcome = yield
    report: Any = outcome.get_result()
    report.uses_vm = not _FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))  # xdist sends it to the controller
    if report.failed and "vmm.machine" in sys.modules:
        for machine, ours in _machines(item):
            report.sections.append((f"guest {machine!r}", _describe(machine, ours)))


def _machines(item: pytest.Item) -> list[tuple[Machine, bool]]:
    """Return the test's machines, in its fixtures' values or their attributes, each with whether ``make_machine``
    created it."""
    from vmm.machine import Machine

    found = {id(made): (made, True) for made in item.stash.get(_MADE, [])}
    for value in getattr(item, "funcargs", {}).values():
        other = value if isinstance(value, Machine) else getattr(value, "machine", None)
        if isinstance(other, Machine):
            found.setdefault(id(other), (other, False))
    return list(found.values())


def _describe(machine: Machine, stop: bool) -> str:
    """Return the post-mortem screen and the console's tail; for a machine that must run on, only the latter."""
    try:
        if machine.running and (stop or machine.console.closed):
            with contextlib.suppress(Exception):  # a hook's exception that the test has not received
                machine.stop()
        from vmm.printable import printable_lines

        console = machine.console.tail(CONSOLE_SHOWN).decode(errors="replace").replace("\r\n", "\n")
        printed = f"console, its last {CONSOLE_SHOWN} bytes at most:\n{printable_lines(console)}"
        if machine.outcome is None:
            return f"{'it runs' if machine.running else 'it was not started'}; {printed}"
        from vmm.observe.postmortem import report

        return f"{machine.outcome!r}{report(machine, machine.outcome)}{printed}"
    except Exception as error:  # a report must not hide the test's own failure
        return f"(no report: {error!r})"
