"""The pytest plugin: machines as fixtures, and in the report of a failed test how its guests stood.

It is there once pyvmm is installed. Importing it imports nothing of the monitor: that happens when a fixture is used.

``machine``
    a machine as ``@pytest.mark.vm(kernel=..., memory=...)`` says (the fields of :class:`vmm.Machine`), not started;
``make_machine``
    a function for more of them, with the same fields on top of the mark's;
``linux``
    a :class:`vmm.testing.linux.LinuxGuest`, once a session, booted by the first command; override the session
    fixture ``linux_fields`` to choose its kernel, memory or disks.
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
    """The one setting."""
    parser.addini("vm_timeout", "seconds after which the run of a fixture's machine ends (default: 60)", default="60")


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        "vm(kernel=..., memory=..., cpus=..., timeout=..., ...): the fields of the machine fixture; marks of a test "
        "go before those of its class and module. Files are relative to the test's own.",
    )


# ---- fixtures ----


def _fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the marks say, the closest winning; files relative to the test's."""
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
    """Make machines with the vm mark's fields and those given; they are closed when the test is over."""
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
def linux(linux_fields: dict[str, Any]) -> Iterator[LinuxGuest]:
    """A Linux guest to run commands in: ``status, output = linux.run("uname -r")``."""
    _need_kvm()
    from vmm.testing.linux import LinuxGuest

    guest = LinuxGuest(**linux_fields)
    yield guest
    guest.close()


# ---- the report of a failed test ----


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Add to a failed test's report how its machines stood. Those of ``make_machine`` are stopped for that."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    if report.failed and "vmm.machine" in sys.modules:
        for machine, ours in _machines(item):
            report.sections.append((f"guest {machine!r}", _describe(machine, ours)))


def _machines(item: pytest.Item) -> list[tuple[Machine, bool]]:
    """Machines of ``make_machine``, and any machine that another fixture's value is or has; whether it is the first."""
    from vmm.machine import Machine

    found = {id(made): (made, True) for made in item.stash.get(_MADE, [])}
    for value in getattr(item, "funcargs", {}).values():
        other = value if isinstance(value, Machine) else getattr(value, "machine", None)
        if isinstance(other, Machine):
            found.setdefault(id(other), (other, False))
    return list(found.values())


def _describe(machine: Machine, stop: bool) -> str:
    """The post-mortem screen and the console's tail; of a machine that is to run on, only the latter."""
    try:
        if machine.running and (stop or machine.console.closed):
            with contextlib.suppress(Exception):  # a hook's exception, which nobody waited for
                machine.stop()
        console = machine.console.tail(CONSOLE_SHOWN).decode(errors="replace")
        printed = f"console, its last {CONSOLE_SHOWN} bytes at most:\n{console}"
        if machine.outcome is None:
            return f"{'it runs' if machine.running else 'it was not started'}; {printed}"
        from vmm.observe.postmortem import report

        return f"{machine.outcome!r}{report(machine, machine.outcome)}{printed}"
    except Exception as error:  # a report must not hide the test's own failure
        return f"(no report: {error!r})"
