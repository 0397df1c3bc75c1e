"""``pyvmm run``: run a command in a Linux guest, print what it prints, and exit with its status.

The guest's init (``vmm/linux/init-command.sh``) marks on the console where the command's output begins and ends.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vmm import slow_reader
from vmm.boot.cmdline import CommandLine
from vmm.cli import boot
from vmm.cli.boot_arguments import arguments, given_fields
from vmm.cli.run_limits import RunLimits
from vmm.config import MachineConfig
from vmm.console.host_end import Stdio
from vmm.errors import ConfigError
from vmm.linux import initramfs

if TYPE_CHECKING:
    from pathlib import Path

USAGE = """usage: pyvmm run [OPTIONS] -- COMMAND [ARGUMENT]...

Boot Linux, run COMMAND in it, print what it prints, and exit with its exit status.

Without --kernel it is the Linux that pyvmm boot gets for itself. COMMAND is a busybox applet or a path; it runs in
an initramfs of busybox, above the files of --initrd, and finds each --share DIR:TAG at /mnt/TAG. It has no input, and
its standard error is part of the output. Ctrl-C and --timeout end the machine.

  -v, --verbose  show the kernel's messages too, and how the image is booted

OPTIONS are otherwise those of pyvmm boot: see pyvmm boot --help. --console, --gdb and --reboot make no sense here.

exit status:
  the command's; that of pyvmm boot where the machine did not end well, and 125 where it ended before the command,
  with a sentence on standard error
"""
LOST = 125
_REFUSED = ("console", "gdb", "reboot")

_BEGIN = initramfs.BEGIN_LINE.encode() + b"\n"
_MARK = initramfs.STATUS_LINE.encode()
_STATUS = re.compile(re.escape(_MARK) + rb"(\d{1,3})\n")


class CommandOutput:
    """Extract the command's output from the console's: between init's two marker lines, with CR LF converted to LF.

    The command may print a marker line itself; the last one is init's. So output after one is held until another comes.
    """

    def __init__(self) -> None:
        self._begun = False
        self._held = b""
        self._raw = b""

    def feed(self, data: bytes) -> bytes:
        """Take output of the console; return the part of the command's output that is certain by now."""
        self._raw += data
        # A CR at the end may be half of a CR LF.
        whole = len(self._raw) - self._raw.endswith(b"\r")
        self._held += self._raw[:whole].replace(b"\r\n", b"\n")
        self._raw = self._raw[whole:]
        if not self._begun:
            before, begin, after = self._held.partition(_BEGIN)
            if not begin:
                self._held = before[-len(_BEGIN) :]
                return b""
            self._begun, self._held = True, after
        return self._release(self._certain())

    def _certain(self) -> int:
        ends = [match.start() for match in _STATUS.finditer(self._held)]
        if ends:
            return ends[-1]
        size = len(self._held)
        for tail in range(min(size, len(_MARK) + 3), 0, -1):
            mark, digits = self._held[-tail:][: len(_MARK)], self._held[-tail:][len(_MARK) :]
            if _MARK.startswith(mark) and (digits.isdigit() or not digits):
                return size - tail  # an incomplete status line
        return size

    def _release(self, size: int) -> bytes:
        sure, self._held = self._held[:size], self._held[size:]
        return sure

    def finish(self) -> tuple[bytes, int | None]:
        """After the machine's end, return the rest of the command's output, and its exit status if there is one."""
        match = _STATUS.match(self._held) if self._begun else None
        if match:
            return b"", int(match[1])
        return (self._held + self._raw if self._begun else b""), None


class CommandEnd(Stdio):
    """Standard output with only the command's output, or with all of the console if ``everything``."""

    def __init__(self, everything: bool) -> None:
        super().__init__(keyboard=False)
        self._everything = everything
        self.output = CommandOutput()

    def show(self, data: bytes) -> bytes:
        """Return the command's part of the guest's output."""
        certain = self.output.feed(data)
        return data if self._everything else certain

    def finish(self) -> int | None:
        """Print what was held back; return the command's exit status if it came."""
        rest, status = self.output.finish()
        if rest and not self._everything:
            slow_reader.deliver(1, rest)
        return status


def configure(given: dict[str, Any], command: list[str]) -> MachineConfig:
    """Return the configuration that runs ``command``. Raises :class:`~vmm.errors.ConfigError` for unusable options."""
    fields = given_fields(given)
    for name in _REFUSED:
        if fields.get(name):
            raise ConfigError(f"pyvmm run has no use for {name}: leave it out, or use pyvmm boot")
    if not command:
        raise ConfigError("run what? give -- and then the command, as in pyvmm run -- uname -r")
    config = MachineConfig(**fields)
    shares = [(share.tag, "ro" if share.readonly else "rw") for share in config.shares]

    def make(busybox: Path, drivers: list[initramfs.Entry]) -> Path:
        return initramfs.command(command, busybox, drivers, shares)

    if "loglevel" not in CommandLine(config.append):
        level = "loglevel=7" if given.get("verbose") else "quiet loglevel=1"
        config = config.with_(append=f"{level} {config.append}".strip())
    from vmm.cli.default_linux import find

    return find(config, memory_given="memory" in fields, make=make)


def run(argv: list[str]) -> int:
    """Run the command; return the exit status."""
    at = argv.index("--") if "--" in argv else len(argv)
    options, command = argv[:at], argv[at + 1 :]
    if "-h" in options or "--help" in options:
        print(USAGE, end="")
        return 0
    given = arguments(options)
    verbose = bool(given.get("verbose"))
    config = configure(given, command)
    end = CommandEnd(verbose)
    try:
        with RunLimits(config.timeout) as limits:
            outcome, report = boot.once(config, end, verbose, None, limits)
        status = end.finish()
    finally:
        end.close()
    if status is not None and outcome.reason in ("power-off", "debug-exit"):
        return status
    slow_reader.report(report or f"pyvmm: {outcome.sentence} before the command was over\n")
    return outcome.status or LOST
