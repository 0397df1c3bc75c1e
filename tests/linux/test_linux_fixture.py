"""The plugin's linux fixture: one guest, many commands; and another guest where one was lost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from vmm.errors import ConsoleTimeout, StateError

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel
    from vmm.testing.linux import LinuxGuest

pytestmark = pytest.mark.timeout(600)  # two boots of 15 s where kernel code is emulated, several times that when busy


@pytest.fixture(scope="session")
def linux_fields(small_kernel: SmallKernel) -> dict[str, object]:
    """The small kernel on every host."""
    return {"kernel": str(small_kernel.bzimage), "memory": "128M"}


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("true", 0, ""),
        ("exit 7", 7, ""),
        ("echo one; echo two >&2; false", 1, "one\ntwo\n"),
        ("printf 'no newline'", 0, "no newline"),
        ("cd /tmp; variable=set; pwd", 0, "/tmp\n"),
        ("pwd; echo $variable", 0, "/\n\n"),  # nothing of the command before is left
        ("echo \"it's\" '\"two\"' \\\\ '$HOME' \tä\n# comment\necho next", 0, "it's \"two\" \\ $HOME ä\nnext\n"),
        ("cat", 0, ""),  # there is no input to wait for
        ("if", 2, None),  # a syntax error is the command's own
        # longer than a terminal's line, and 8 ms a byte where kernel code is emulated
        pytest.param("echo " + "x" * 5000, 0, "x" * 5000 + "\n", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_command_answers_with_its_status_and_output(
    linux: LinuxGuest, command: str, status: int, output: str | None
) -> None:
    result = linux.run(command, timeout=120)
    assert result.status == status
    assert output is None or result.output == output


def test_a_command_that_takes_the_guest_along_or_too_long_costs_only_itself(linux: LinuxGuest) -> None:
    linux.run("true")
    boots = linux.boots
    with pytest.raises(ConsoleTimeout, match="did not answer in time, running 'echo begun; sleep 1000'") as caught:
        linux.run("echo begun; sleep 1000", timeout=5)
    assert caught.value.transcript == b"begun\n"
    started = time.monotonic()
    with pytest.raises(StateError, match=r"the guest ended, running 'poweroff -f': the guest powered off"):
        linux.run("poweroff -f", timeout=400)  # in a new guest
    assert time.monotonic() - started < 390
    assert linux.boots == boots + 1
