"""The plugin's linux fixture: one boot, many tests, each of which finds the guest as it was when it had booted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm.errors import ConsoleTimeout, StateError

if TYPE_CHECKING:
    from vmm.testing.linux import LinuxGuest

PATIENCE = 120.0  # seconds, for a host that is busy otherwise
# A boot takes 15 s where kernel code is emulated, several times that when busy; these share one.
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("linux")]
BOOTS = False  # but one for all of them


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
    result = linux.run(command, timeout=PATIENCE)
    assert result.status == status
    assert output is None or result.output == output


def test_a_command_that_takes_the_guest_along_or_too_long_costs_only_itself(linux: LinuxGuest) -> None:
    with pytest.raises(ConsoleTimeout, match="did not answer in time, running 'echo begun; sleep 1000'") as caught:
        linux.run("echo begun; sleep 1000", timeout=5)
    assert caught.value.transcript == b"begun\n"
    with pytest.raises(StateError, match=r"the guest ended, running 'poweroff -f': the guest powered off"):
        linux.run("poweroff -f", timeout=PATIENCE)
    assert linux.run("echo back", timeout=PATIENCE) == (0, "back\n")
    assert linux.boots == 1


def test_programs_that_take_turns_keep_their_registers(linux: LinuxGuest) -> None:
    # Where the kernel is told of no XSAVE, a program that uses vector registers finds another's in them.
    status, output = linux.run("for i in 1 2 3 4 5 6; do dmesg | grep -c . || exit 1; done", timeout=2 * PATIENCE)
    assert (status, len(output.split())) == (0, 6)


@pytest.mark.parametrize("again", range(3))
def test_a_test_finds_nothing_of_the_one_before(linux: LinuxGuest, again: int) -> None:
    assert linux.run("ls /left /init; rm /init; echo > /left; sleep 1000 & echo", timeout=PATIENCE) == (
        0, "ls: /left: No such file or directory\n/init\n\n"
    )  # fmt: skip
    assert linux.run("ls /left; ls /init; pidof sleep >/dev/null", timeout=PATIENCE).output == (
        "/left\nls: /init: No such file or directory\n"
    )
    assert linux.boots == 1


def test_the_guests_clocks_go_back_and_its_timers_still_end(linux: LinuxGuest) -> None:
    def clocks() -> tuple[float, float]:
        status, output = linux.run("cat /proc/uptime; sleep 0.1; cat /proc/uptime; date +%s", timeout=PATIENCE)
        before, after, _ = (float(line.split()[0]) for line in output.splitlines())
        assert status == 0 and after >= before + 0.1
        return before, after

    runs = []
    for _ in range(5):
        linux.rollback()
        runs.append(clocks())
    begun = [before for before, _ in runs]
    took = max(after - before for before, after in runs)
    assert max(begun) - min(begun) < 2 * took  # nowhere near the sum of what the runs before took
    assert linux.machine is not None
    assert b"detected stall" not in linux.machine.console.transcript


def test_the_session_s_guest_keeps_what_tests_leave_in_it(linux: LinuxGuest, linux_session: LinuxGuest) -> None:
    assert linux is linux_session
    linux_session.run("echo left > /left", timeout=PATIENCE)
    assert linux_session.run("cat /left", timeout=PATIENCE).output == "left\n"
