"""``pyvmm trace``: every exit of a guest by name, live or from a file; as lines, a table, a page, a Perfetto trace."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vmm import slow_reader
from vmm.cli import check_writable, command_parser
from vmm.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator

    from vmm.console.host_end import HostEnd
    from vmm.machine import Machine
    from vmm.observe.recording import Recording
    from vmm.observe.trace import Trace


_HELD = 8192  # characters of a file's lines that are written together


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "trace",
        usage="pyvmm trace [options] -- [boot options]\n       pyvmm trace [options] FILE",
        description="Boot as pyvmm boot does and trace every exit; or show a trace that was saved. Without --save, "
        "--summary, --html or --perfetto, a line for each event: live on standard error, of FILE on standard output.",
        epilog="The exit status of a boot is that of pyvmm boot.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="a trace that --save wrote")
    parser.add_argument("--lines", metavar="FILE", help="write the lines to FILE, as the events occur")
    parser.add_argument("--save", metavar="FILE", help="write the trace itself, to be shown later")
    parser.add_argument("--summary", action="store_true", help="print number and time of events, by reason, device, "
                        "register and symbol")  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="write a timeline for a browser, as one self-contained file")
    parser.add_argument("--perfetto", metavar="FILE", help="write JSON for ui.perfetto.dev or chrome://tracing")
    parser.add_argument("--symbols", metavar="FILE", help="names for a saved trace: a vmlinux or a System.map")
    parser.add_argument("--keep", metavar="N", type=int, default=1 << 20, help="keep the newest N events "
                        "(64 bytes each; default: %(default)s)")  # fmt: skip
    return parser


def run(argv: list[str]) -> int:
    """Trace; return the guest's exit status, or 0 for a file."""
    at = argv.index("--") if "--" in argv else len(argv)
    given = _parser().parse_args(argv[:at])
    if given.keep < 1:
        raise ConfigError(f"--keep {given.keep}: give a number of events, 1 or more")
    if at == len(argv):
        if given.file is None:
            raise ConfigError("trace what? give a saved trace, or -- and then the options of pyvmm boot")
        return _show_file(given)
    if given.file is not None:
        raise ConfigError(f"{given.file} and a boot: give either a saved trace or, after --, the options of pyvmm boot")
    if given.symbols is not None:
        raise ConfigError("--symbols is for a saved trace: of a boot, give it after --")
    return _boot(given, argv[at + 1 :])


def _show_file(given: argparse.Namespace) -> int:
    from vmm.observe.recording import Recording

    recording = Recording.load(given.file)
    if given.symbols is not None:
        from vmm.observe.symbols import Symbols

        recording.use_symbols(Symbols.open(given.symbols))
    if given.lines is not None:
        with _open(given.lines) as file:
            _write_lines(recording, recording.plain(recording.events), file.write)
    elif not _asks_for_more(given):
        _write_lines(recording, recording.plain(recording.events), sys.stdout.write)
        _note(recording.missing)
    for text in _results(recording, given):
        sys.stdout.write(text)
    return 0


def _boot(given: argparse.Namespace, argv: list[str]) -> int:
    from vmm.cli import boot

    results: list[str] = []
    check_writable(given.save, given.html, given.perfetto)
    lines = _open(given.lines) if given.lines is not None else None

    @contextmanager
    def watch(machine: Machine, end: HostEnd) -> Iterator[None]:
        trace = machine.trace(keep=given.keep)
        lines_wanted = lines is not None or not _asks_for_more(given)
        follower = _follow(trace, lines, end) if lines_wanted else _collect(trace)
        yield
        follower.join()
        trace.stop()
        results[:] = [*_results(trace, given)] or _sentence("", trace.missing)

    try:
        status = boot.run(argv, watch)
    finally:
        if lines is not None:
            lines.close()
    slow_reader.report("".join(results))
    return status


class _Follower:
    """Write trace lines on a thread of its own, while the caller's thread serves the console.

    While the machine runs, a slow reader is waited for; events that overflow the rings are lost, which the lines
    report. From :meth:`join` on the wait for a reader is bounded (:mod:`vmm.slow_reader`).
    """

    def __init__(self, trace: Trace, fd: int, newline: str, *, at_once: bool) -> None:
        from threading import Thread

        self._outlet = slow_reader.Outlet(fd)
        self._at_once = at_once
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._held = ""
        self._thread = Thread(target=self._run, args=(trace, newline), name="trace", daemon=True)
        self._thread.start()

    def _run(self, trace: Trace, newline: str) -> None:
        with suppress(slow_reader.ReaderStopped, OSError):  # the reader has closed the pipe; the guest continues
            _write_lines(trace, trace, self._write, newline)
            self._flush()

    def _write(self, text: str) -> None:
        self._held += text
        if self._at_once or len(self._held) >= _HELD:
            self._flush()

    def _flush(self) -> None:
        text, self._held = self._held, ""
        self._outlet.deliver(text.encode(errors="surrogateescape"), bounded_from=self._over)

    def join(self) -> None:
        """Write the rest after the machine's end, and wait for the thread."""
        os.eventfd_write(self._over, 1)
        self._thread.join()
        self._outlet.close()
        os.close(self._over)


def _follow(trace: Trace, lines: Any, end: HostEnd) -> _Follower:
    if lines is not None:
        return _Follower(trace, lines.fileno(), "\n", at_once=False)
    return _Follower(trace, 2, "\r\n" if end.raw else "\n", at_once=True)


def _collect(trace: Trace) -> Any:
    """Collect events from the rings on a thread, before they overflow."""
    from threading import Thread

    def collect() -> None:
        for _ in trace:
            pass

    thread = Thread(target=collect, name="trace", daemon=True)
    thread.start()
    return thread


def _write_lines(
    recording: Recording, events: Iterable[Any], write: Callable[[str], object], newline: str = "\n"
) -> None:
    lost = recording.lost
    try:
        for event in events:
            if recording.lost > lost:
                write(f"... {recording.lost - lost} events were lost{newline}")
                lost = recording.lost
            write(recording.line(event) + newline)
    except BrokenPipeError:
        return  # the reader has closed the pipe; the guest continues


def _results(recording: Recording, given: argparse.Namespace) -> Iterable[str]:
    """Write the requested results of a complete recording; yield messages about them."""
    if given.save is not None:
        recording.save(given.save)
    if given.html is not None:
        from vmm.observe.timeline import write_page

        yield from _sentence(f"{given.html}: ", write_page(recording, given.html))
    if given.perfetto is not None:
        from vmm.observe.timeline import write_perfetto

        yield from _sentence("", write_perfetto(recording, given.perfetto))
    if given.summary:
        from vmm.observe.summary import table

        yield table(recording)
    elif _asks_for_more(given):
        yield from _sentence("", recording.missing)


def _asks_for_more(given: argparse.Namespace) -> bool:
    return bool(given.save or given.summary or given.html or given.perfetto)


def _sentence(start: str, text: str) -> list[str]:
    return [f"pyvmm: {start}{text}\n"] if text else []


def _note(text: str) -> None:
    if text:
        print(f"pyvmm: {text}", file=sys.stderr)


def _open(path: str) -> Any:
    try:
        return open(path, "w")
    except OSError as error:
        raise ConfigError(f"cannot write lines to {path}: {error.strerror}; choose another file") from error
