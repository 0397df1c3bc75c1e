"""``pyvmm boot`` from outside: exit statuses, signals, and every kind of console with its peer behaving or not."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    GuestPath = Callable[[str], str]

HELLO = b"Hello from long mode\nPASS\n"


def command(kernel: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "vmm", "boot", "--kernel", kernel, "--mem", "16M", *flags]


@contextlib.contextmanager
def booted(kernel: str, *flags: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    process = subprocess.Popen(command(kernel, *flags), **how)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def read_until(fd: int, wanted: bytes, seconds: float = 60) -> bytes:
    """What comes from ``fd`` up to and with ``wanted``."""
    seen = b""
    deadline = time.monotonic() + seconds
    while wanted not in seen:
        left = deadline - time.monotonic()
        assert left > 0 and select.select([fd], [], [], left)[0], f"{wanted!r} did not come, only {seen!r}"
        part = os.read(fd, 4096)
        assert part, f"the end came before {wanted!r}, after {seen!r}"
        seen += part
    return seen


# ---- how it ends ----


@pytest.mark.parametrize(
    ("name", "flags", "status"),
    [
        ("hello", (), 33),
        ("poweroff", (), 0),
        ("reset_acpi", (), 4),
        ("pvpanic", (), 10),
        ("triple_fault", (), 12),
        ("spin", ("--timeout", "0.3"), 124),
        ("hang", (), 18),
    ],
)
def test_the_exit_status_says_how_the_guest_ended(
    guest: GuestPath, name: str, flags: tuple[str, ...], status: int
) -> None:
    done = subprocess.run(command(guest(name), *flags), stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    assert done.returncode == status, done
    assert b"Traceback" not in done.stderr
    assert bool(done.stderr) == (status not in (0, 4, 33))  # orderly ends are silent, others say what happened


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
@pytest.mark.parametrize(("name", "append"), [("spin", ""), ("virtio_bench", "idle=1")])
def test_a_signal_ends_the_machine(guest: GuestPath, name: str, append: str, number: str, status: int) -> None:
    with booted(guest(name), "--append", append) as process:
        assert process.stdout is not None and process.stderr is not None
        read_until(process.stdout.fileno(), b"idle\n" if append else b"spinning\n")
        process.send_signal(getattr(signal, number))
        assert process.wait(120) == status
        assert process.stderr.read().count(b"\n") == 1


# ---- pipes and files ----


def test_piped_output_is_exactly_what_the_guest_printed(guest: GuestPath) -> None:
    done = subprocess.run(command(guest("hello")), stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    assert (done.stdout, done.stderr) == (HELLO, b"")


def test_piped_input_reaches_the_guest_and_none_is_lost(guest: GuestPath) -> None:
    data = bytes(i * 7 & 0xFF for i in range(3000))  # more than the FIFO, and with Ctrl-A in it
    done = subprocess.run(
        command(guest("uart"), "--append", f"bytes={len(data)} mode=1"), input=data, capture_output=True, timeout=60
    )
    total = total_of_totals = 0
    for byte in data:
        total = (total + byte) % 65535
        total_of_totals = (total_of_totals + total) % 65535
    assert f"received {len(data)} sums {total} {total_of_totals}".encode() in done.stdout
    assert done.returncode == 33


def test_no_console_prints_nothing(guest: GuestPath) -> None:
    done = subprocess.run(command(guest("hello"), "--console", "none"), capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (33, b"", b"")


def test_a_file_console_is_truncated_and_written(guest: GuestPath, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1000)
    done = subprocess.run(command(guest("hello"), "--console", f"file:{path}"), capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (33, b"")
    assert path.read_bytes() == HELLO


def test_standard_output_stays_blocking_for_who_shares_it(guest: GuestPath) -> None:
    reader, writer = os.pipe()
    try:
        done = subprocess.run(command(guest("hello")), stdin=subprocess.DEVNULL, stdout=writer, timeout=20)
        assert done.returncode == 33
        assert os.get_blocking(writer)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_closed_standard_output_is_refused_with_a_sentence(guest: GuestPath) -> None:
    script = 'exec "$@" >&-'
    done = subprocess.run(["sh", "-c", script, "sh", *command(guest("hello"))], capture_output=True, timeout=20)
    assert done.returncode == 2
    assert done.stderr.startswith(b"pyvmm: standard output is closed") and done.stderr.count(b"\n") == 1


def test_a_reader_that_goes_away_ends_the_machine_with_a_sentence(guest: GuestPath) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command(guest("spin")), stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, timeout=20
        )
    finally:
        os.close(writer)
    assert done.returncode == 2
    assert done.stderr.startswith(b"pyvmm: the console's reader went away") and done.stderr.count(b"\n") == 1


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """A pipe that takes no more, and that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    try:
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


def wait_until_it_spins(process: subprocess.Popen[bytes]) -> None:
    """Wait until the vCPU's thread has run for 0.2 s, as it does once its guest has printed what it prints."""
    deadline = time.monotonic() + 60
    spent = 0.0
    while spent < 0.2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
        tasks = [task for task in os.listdir(f"/proc/{process.pid}/task") if int(task) != process.pid]
        spent = 0.0
        for task in tasks:
            with open(f"/proc/{process.pid}/task/{task}/stat") as stat:
                spent += sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("flags", "number"), [(("--timeout", "0.5"), None), ((), "SIGTERM")])
def test_a_reader_that_stops_reading_keeps_no_end_from_working(
    guest: GuestPath, flags: tuple[str, ...], number: str | None
) -> None:
    with full_pipe() as writer, booted(guest("spin"), *flags, stdout=writer) as process:
        if number is not None:
            wait_until_it_spins(process)
            process.send_signal(getattr(signal, number))
        assert process.wait(120) == 2
        assert process.stderr is not None
        said = process.stderr.read()
        assert re.fullmatch(rb"pyvmm: the console's reader stopped reading: \d+ bytes were not delivered\n", said), said


# ---- a UNIX socket ----


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 60
    while True:
        try:
            client.connect(str(path))
            return client
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_socket_console_lets_a_client_come_go_and_come_again(guest: GuestPath, tmp_path: Path) -> None:
    path = tmp_path / "console"
    with booted(guest("uart"), "--append", "bytes=3", "--console", f"unix:{path}") as process:
        with connect(path) as first:
            read_until(first.fileno(), b"ready\n")
            first.sendall(b"a")
        with connect(path) as second, connect(path) as third:
            third.sendall(b"c")  # waits for its turn
            second.sendall(b"b")
            second.shutdown(socket.SHUT_RDWR)
            assert b"received 3 sums 294 " in read_until(third.fileno(), b"PASS\n")
            assert process.wait(120) == 33
    assert not path.exists()


def test_a_socket_console_shows_what_was_printed_before_the_client_came(guest: GuestPath, tmp_path: Path) -> None:
    path = tmp_path / "console"
    with booted(guest("spin"), "--console", f"unix:{path}") as process:
        with connect(path) as client:
            assert read_until(client.fileno(), b"spinning\n") == b"spinning\n"
        process.terminate()
        assert process.wait(120) == 143
    assert not path.exists()


def test_what_a_client_typed_before_it_closed_reaches_the_guest(guest: GuestPath, tmp_path: Path) -> None:
    path = tmp_path / "console"
    with booted(guest("uart"), "--append", "bytes=3", "--console", f"unix:{path}") as process:
        with connect(path) as hasty:
            hasty.sendall(b"abc")
        with connect(path) as client:  # what the other one did not read is here
            assert b"received 3 sums 294 " in read_until(client.fileno(), b"PASS\n")
        assert process.wait(120) == 33


# ---- a pseudo-terminal ----


def test_a_pty_console_carries_both_directions(guest: GuestPath) -> None:
    with booted(guest("uart"), "--append", "bytes=2", "--console", "pty") as process:
        assert process.stderr is not None
        said = read_until(process.stderr.fileno(), b"\n")
        path = re.fullmatch(rb"pyvmm: console is (/dev/pts/\d+)\n", said)
        assert path, said
        terminal = os.open(path[1], os.O_RDWR | os.O_NOCTTY)
        try:
            read_until(terminal, b"ready\n")
            os.write(terminal, b"\x01\n")  # raw: no escapes, no translation
            assert b"received 2 sums 11 12\n" in read_until(terminal, b"PASS\n")
        finally:
            os.close(terminal)
        assert process.wait(120) == 33


# ---- a terminal ----


class Terminal:
    """A pseudo-terminal with pyvmm on it; what it shows is read at ``master``."""

    def __init__(self, kernel: str, *flags: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            command(kernel, *flags), stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True
        )

    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def end(self) -> int:
        """The exit status; the terminal is then as it was."""
        status = self.process.wait(120)
        assert termios.tcgetattr(self.slave) == self.before
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def make(kernel: str, *flags: str) -> Terminal:
        opened.append(Terminal(kernel, *flags))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_ctrl_a_x_quits_and_restores_the_terminal(guest: GuestPath, terminal: Callable[..., Terminal]) -> None:
    on = terminal(guest("spin"))
    read_until(on.master, b"spinning\r\n")
    assert on.raw()
    os.write(on.master, b"\x01x")
    assert on.end() == 0


def test_ctrl_a_h_prints_help_and_goes_on(guest: GuestPath, terminal: Callable[..., Terminal]) -> None:
    on = terminal(guest("spin"))
    read_until(on.master, b"spinning\r\n")
    os.write(on.master, b"\x01h")
    shown = read_until(on.master, b"send Ctrl-A\r")
    assert b"Ctrl-A x  quit" in shown
    assert on.process.poll() is None
    os.write(on.master, b"\x01")
    os.write(on.master, b"x")  # the two keys need not come together
    assert on.end() == 0


def test_ctrl_c_is_the_guests_and_ctrl_a_twice_sends_one(guest: GuestPath, terminal: Callable[..., Terminal]) -> None:
    on = terminal(guest("uart"), "--append", "bytes=2")
    read_until(on.master, b"ready")
    os.write(on.master, b"\x03\x01\x01")
    assert b"received 2 sums 4 7" in read_until(on.master, b"PASS")
    assert on.end() == 33


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 143)])
def test_a_signal_restores_the_terminal(
    guest: GuestPath, terminal: Callable[..., Terminal], number: str, status: int
) -> None:
    on = terminal(guest("spin"))
    read_until(on.master, b"spinning\r\n")
    on.process.send_signal(getattr(signal, number))
    assert on.end() == status


@pytest.mark.parametrize(("name", "status"), [("hello", 33), ("triple_fault", 12)])
def test_the_guests_end_restores_the_terminal(
    guest: GuestPath, terminal: Callable[..., Terminal], name: str, status: int
) -> None:
    on = terminal(guest(name))
    assert on.end() == status


def test_a_refused_request_restores_the_terminal(terminal: Callable[..., Terminal]) -> None:
    on = terminal("/nonexistent/kernel")
    assert b"no such file" in read_until(on.master, b"\n")
    assert on.end() == 2


# ---- readers of messages that do not read ----


def test_messages_that_nobody_reads_hold_up_neither_the_guest_nor_its_end(guest: GuestPath) -> None:
    with full_pipe() as writer, booted(guest("flood"), "--append", "n=2000", stderr=writer) as process:
        assert process.stdout is not None
        assert read_until(process.stdout.fileno(), b"PASS\n") == b"flooded\nPASS\n"
        assert process.wait(120) == 33


def test_messages_that_were_lost_are_counted(guest: GuestPath) -> None:
    reader, writer = os.pipe()
    with booted(guest("flood"), "--append", "n=2000", stderr=writer) as process:
        os.close(writer)
        assert process.stdout is not None
        read_until(process.stdout.fileno(), b"PASS\n")
        with open(reader, "rb") as pipe:
            said = pipe.read()
        assert process.wait(120) == 33
    lines = said.splitlines()
    lost = re.fullmatch(rb"pyvmm: (\d+) messages were lost: standard error was not read", lines[-1])
    assert lost and len(lines) - 1 + int(lost[1]) == 1000, lines[-1]  # Machine.messages is full then


def test_a_last_report_that_nobody_reads_does_not_keep_the_exit_status(guest: GuestPath) -> None:
    with full_pipe() as writer, booted(guest("triple_fault"), stderr=writer) as process:
        assert process.wait(120) == 12


def test_a_trace_that_nobody_reads_keeps_no_end_from_working(guest: GuestPath) -> None:
    words = [sys.executable, "-m", "vmm", "trace", "--", *command(guest("hello"))[4:]]
    with full_pipe() as writer:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writer, timeout=60)
    assert (done.returncode, done.stdout) == (33, HELLO)


# ---- a run of several boots ----


def test_the_time_limit_is_of_the_run_and_not_of_each_boot(guest: GuestPath) -> None:
    done = subprocess.run(
        command(guest("reset_acpi"), "--reboot", "--timeout", "1"), capture_output=True, stdin=subprocess.DEVNULL,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 124, done
    assert done.stdout.count(b"reset register") > 1
    assert done.stderr.startswith(b"pyvmm: the time limit passed")


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is missing: apt-get install passt")
def test_a_forwarded_port_is_there_for_the_next_boot(guest: GuestPath) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--reboot", "--net", f"user,hostfwd=tcp:127.0.0.1:{port}-:80")
    with booted(guest("reset_acpi"), *flags) as process:
        assert process.stdout is not None and process.stderr is not None
        if select.select([process.stdout], [], [], 60)[0] and not os.read(process.stdout.fileno(), 1):
            pytest.skip(f"no passt here: {process.stderr.read()!r}")
        for _ in range(3):
            read_until(process.stdout.fileno(), b"value")
        process.terminate()
        while os.read(process.stdout.fileno(), 4096):
            pass
        assert process.wait(120) == 143


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_a_signal_ends_a_run_wherever_between_two_boots_it_comes(guest: GuestPath, number: str, status: int) -> None:
    for boots in range(1, 6):  # each time somewhere else: a boot is a few milliseconds
        with booted(guest("reset_acpi"), "--reboot") as process:
            assert process.stdout is not None and process.stderr is not None
            for _ in range(boots):
                read_until(process.stdout.fileno(), b"value")
            process.send_signal(getattr(signal, number))
            while os.read(process.stdout.fileno(), 4096):
                pass
            assert process.wait(120) == status
            assert process.stderr.read().count(b"\n") == 1


# ---- descriptors that are not there ----


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 2>&-"])
def test_without_standard_error_nothing_else_takes_its_place(guest: GuestPath, tmp_path: Path, closed: str) -> None:
    log = tmp_path / "log"
    words = command(guest("spin"), "--timeout", "0.3", "--console", f"file:{log}")
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *words], stdout=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stdout) == (124, b"")
    assert log.read_bytes() == b"spinning\n"


# ---- jobs of a terminal ----


class Shell(Terminal):
    """A terminal with a shell of job control on it, which starts pyvmm in the background."""

    def __init__(self, kernel: str, *flags: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            ["sh", "-mc", '"$@" & read line; fg >/dev/null; exit $?', "sh", *command(kernel, *flags)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip


@pytest.fixture
def shell() -> Iterator[Callable[..., Shell]]:
    opened: list[Shell] = []

    def make(kernel: str, *flags: str) -> Shell:
        opened.append(Shell(kernel, *flags))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_a_background_job_runs_without_its_terminal_and_says_so_once(
    guest: GuestPath, shell: Callable[..., Shell]
) -> None:
    on = shell(guest("hello"))
    shown = read_until(on.master, b"PASS\r\n")
    assert shown.count(b"pyvmm: in the background of its terminal, the guest gets no input") == 1
    assert shown.endswith(b"Hello from long mode\r\nPASS\r\n")
    assert not on.raw()


def test_a_background_job_takes_the_terminal_in_the_foreground_and_gives_it_back(
    guest: GuestPath, shell: Callable[..., Shell]
) -> None:
    on = shell(guest("uart"), "--append", "bytes=2")
    read_until(on.master, b"ready")
    assert not on.raw()
    os.write(on.master, b"\n")  # the shell's: fg
    deadline = time.monotonic() + 60
    while not on.raw():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.write(on.master, b"\x03\x04")  # the guest's, not the terminal's
    assert b"received 2 sums 7 10" in read_until(on.master, b"PASS")
    assert on.end() == 33
