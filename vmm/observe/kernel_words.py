"""What a Linux kernel says of its own death, and what its silence says.

Its words are those on the console; where it printed none, those of its log in guest memory.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.boot.cmdline import CommandLine
from vmm.config import LINUX_KINDS
from vmm.observe.budget import Budget
from vmm.observe.verdict import Diagnosis, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.memory import GuestMemory
    from vmm.observe.subject import Ended
    from vmm.outcome import Outcome

_STAMP = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ")
_TRACE_MAX = 9  # lines of a call trace that are shown
_DEVICES_SHOWN = 6
_LINE_MAX = 1024  # characters, as in the kernel (LOG_LINE_MAX): patterns are not matched against more

# virtio device type (virtio 1.2, 5) -> the option of its driver
DRIVERS = {
    1: "CONFIG_VIRTIO_NET", 2: "CONFIG_VIRTIO_BLK", 3: "CONFIG_VIRTIO_CONSOLE", 4: "CONFIG_HW_RANDOM_VIRTIO",
    5: "CONFIG_VIRTIO_BALLOON", 19: "CONFIG_VIRTIO_VSOCKETS", 26: "CONFIG_VIRTIO_FS",
}  # fmt: skip
TRANSPORTS = {
    "pci": "CONFIG_PCI and CONFIG_VIRTIO_PCI",
    "mmio": "CONFIG_VIRTIO_MMIO (and with acpi=off CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)",
}
_RNG = 4


class Virtio(NamedTuple):
    """A virtio device as its driver left it: ``type`` (virtio 1.2, 5), names of status bits, whether it was used."""

    name: str
    type: int
    status: tuple[str, ...]
    used: bool


class Guest(NamedTuple):
    """What is known of a Linux guest besides its words."""

    command_line: str = ""
    console: str = "ttyS0"  # the name its kernel has for this machine's console
    transport: str = "mmio"
    virtio: Sequence[Virtio] = ()
    initrd: bool = False

    @property
    def told(self) -> CommandLine:
        """The command line as the kernel reads it."""
        return CommandLine(self.command_line)

    def option(self, name: str) -> str | None:
        """The last ``name=value`` of the command line."""
        return self.told.last(name)


def guest_of(machine: Ended) -> Guest:
    """The facts of a machine."""
    devices = [
        Virtio(
            device.name,
            device.device_id,
            device.info()["status"],
            device.driven or any(queue["requests"] or queue["doorbells"] for queue in device.queue_statistics()),
        )
        for device in machine.virtio
    ]
    console = "hvc0" if machine.config.console_device == "virtio" else "ttyS0"
    return Guest(machine.command_line, console, machine.config.virtio, devices, bool(machine.config.initrd))


# ---- asked by diagnose ----


def told(machine: Ended, outcome: Outcome) -> Diagnosis | None:
    """What the kernel said it died of."""
    if machine.kind not in LINUX_KINDS:
        return None
    text = words(machine)
    guest = guest_of(machine)
    found = read(text, guest)
    if found is not None and not machine.console.end and (why := unheard(text, guest)):
        found = found._replace(evidence=(*found.evidence, f"and no console printed it: {why.sentence}"))
    if found is not None:
        found = found._replace(evidence=tuple(_named(machine, line) for line in found.evidence))
    if found is not None and found.cause == "kernel-panic" and len(found.evidence) < 2:
        frames = machine.stack(outcome.vcpu or 0)[:_TRACE_MAX]
        return found._replace(evidence=(*found.evidence, *(f"called from {frame}" for frame in frames[1:])))
    return found


def _named(machine: Ended, line: str) -> str:
    """A line of a kernel without kallsyms, whose trace has addresses for names."""

    def name(match: re.Match[str]) -> str:
        return machine.symbols.name(int(match[0], 16)) or match[0]

    return re.sub(r"0xffff[0-9a-f]{12}\b", name, line)


def silent(machine: Ended) -> Diagnosis | None:
    """Why a Linux that runs, or ran, printed nothing."""
    if machine.kind not in LINUX_KINDS or machine.console.end:
        return None
    return unheard(log_of(machine), guest_of(machine))


def unprinted(machine: Ended) -> list[str]:
    """The end of the log of a Linux that has printed nothing yet, as evidence."""
    silent = machine.kind in LINUX_KINDS and not machine.console.end
    return log_lines(log_of(machine)) if silent else []


def undriven(machine: Ended) -> Diagnosis | None:
    """Which of a Linux guest's virtio devices has no driver."""
    if machine.kind not in LINUX_KINDS:
        return None
    guest = guest_of(machine)
    lines = no_drivers(guest)
    return say("no-driver", lines[0], lines[1:]) if lines else None


def words(machine: Ended) -> str:
    """What the kernel printed, or logged where it printed nothing."""
    if machine.console.end:
        return machine.console.tail(1 << 16).decode(errors="replace")
    return log_of(machine)


def log_of(machine: Ended) -> str:
    """The kernel's log in the memory of a machine that is looked at."""
    with machine.looking() as budget:
        return kernel_log(machine.memory, budget)


# ---- its words ----


def read(text: str, guest: Guest) -> Diagnosis | None:
    """The death that ``text``, a console's or a log's, tells of."""
    lines = [_STAMP.sub("", line[:_LINE_MAX]).rstrip() for line in text.splitlines()]
    for reader in (_unpacking, _root, _init, _panic, _initrd):
        found = reader(lines, guest)
        if found is not None:
            return found
    return None


def _find(lines: list[str], pattern: str) -> re.Match[str] | None:
    """The last line that ``pattern`` occurs in."""
    compiled = re.compile(pattern)
    return next((match for line in reversed(lines) if (match := compiled.search(line))), None)


def _unpacking(lines: list[str], guest: Guest) -> Diagnosis | None:
    """arch/x86/boot/compressed/error.c: the message, an empty line, and the end."""
    if "-- System halted" not in (last := [line.strip() for line in lines if line.strip()][-2:]):
        return None
    message = last[0] if len(last) == 2 else "it does not say why"
    return say("wrong-image", f"the kernel could not unpack itself: {message}")


def _root(lines: list[str], guest: Guest) -> Diagnosis | None:
    panic = _find(lines, r"Unable to mount root fs on (.*?)(?: \]---.*)?$")
    if not panic:
        return None
    opened = _find(lines, r'Cannot open root device "(.*?)" or (\S+?): error (-?\d+)')
    given = guest.option("root")
    wanted = opened[1] if opened and opened[1] else given or ""
    looked = f"the kernel looked for {wanted}" if wanted else "no root= was given"
    if opened:
        looked += f" ({_error(opened[3])})"
    devices = _block_devices(lines)
    has = "it has the block devices " + ", ".join(devices[:_DEVICES_SHOWN]) if devices else "it has no block device"
    tried = _filesystems(lines)
    text = f"{looked}, and {has}" + (f"; none of the kernel's filesystems fits: {', '.join(tried)}" if tried else "")
    evidence = [panic[0]]
    disks = [device for device in guest.virtio if device.type == 2]
    if not disks:
        evidence.append("the machine has no disk: --disk FILE gives it one")
    evidence += [line for line in no_drivers(guest) if "virtio-blk" in line]
    if not guest.initrd and not disks:
        evidence.append("it has no initrd either: --initrd FILE")
    elif broken := _find(lines, r"[Ii]nitramfs unpacking failed: .*"):
        evidence.append(f"its initrd was not unpacked: {broken[0]}")
    return say("no-root", text, evidence)


def _block_devices(lines: list[str]) -> list[str]:
    """block/genhd.c, printk_all_partitions: number, KiB, name."""
    found = [re.match(r"^ ?\s*[0-9a-f]{4,8} +(\d+) (\S+)", line) for line in lines]
    devices = [f"{match[2]} ({int(match[1])} KiB)" for match in found if match]
    return [device for device in dict.fromkeys(devices) if not device.startswith("ram")]


def _filesystems(lines: list[str]) -> list[str]:
    """init/do_mounts.c: what it tried, each on a line of its own or all behind the colon."""
    header = re.compile(r"No filesystem could mount root, tried: *")
    for n, line in enumerate(lines):
        if found := header.search(line):
            rest = [line[found.end() :], *lines[n + 1 :]]
            return [name for part in itertools.takewhile(_listed, rest) for name in part.split()]
    return []


def _listed(line: str) -> bool:
    return re.fullmatch(r"[a-z0-9_ ]*", line) is not None


def _error(number: str) -> str:
    from errno import errorcode
    from os import strerror

    code = abs(int(number))
    return f"error -{code}, {errorcode[code]}: {strerror(code)}" if code in errorcode else f"error {number}"


def _init(lines: list[str], guest: Guest) -> Diagnosis | None:
    """init/main.c, kernel_init; kernel/exit.c."""
    failed = [match for line in lines if (match := re.search(
        r"(?:Requested init (\S+) failed|Failed to execute (\S+)|Starting init: (\S+) exists but couldn't execute it) "
        r"\(error (-?\d+)\)", line))]  # fmt: skip
    tried = [f"{match[1] or match[2] or match[3]}: {_error(match[4])}" for match in failed]
    if _find(lines, r"Kernel panic - not syncing: (?:No working init found|No init found|Requested init )"):
        given = guest.option("init") or guest.option("rdinit")
        asked = f"; {given} was asked for" if given else ""
        why = f" ({'; '.join(tried)})" if tried else ""
        evidence = [line for line in lines if re.match(r"Run \S+ as init process", line)]
        if not guest.initrd and guest.option("root") is None:
            evidence.append("there is neither an initrd (--initrd FILE) nor root= on its command line")
        return say("missing-init", f"the kernel found no program that it can run as init{asked}{why}", evidence)
    ended = _find(lines, r"Attempted to kill init! exitcode=0x([0-9a-f]+)")
    if not ended:
        return None
    code = int(ended[1], 16)
    how = f"was killed by signal {code & 0x7F}" if code & 0x7F else f"exited with status {code >> 8 & 0xFF}"
    ran = _find(lines, r"Run (\S+) as init process")
    return say("init-ended", f"{ran[1] if ran else 'init'} {how}, and a kernel cannot run without",
               [ended[0], *_trace(lines)])  # fmt: skip


def _panic(lines: list[str], guest: Guest) -> Diagnosis | None:
    panic = _find(lines, r"Kernel panic - not syncing: (.*?)(?: \]---.*)?$")
    if not panic:
        return None
    oops = next((line for line in lines if re.match(
        r"(BUG: |Oops: |general protection fault|invalid opcode: |divide error: |kernel BUG at |stack segment: |"
        r"Unable to handle |watchdog: BUG|INFO: rcu)", line)), None)  # fmt: skip
    text = panic[1] + (f", after: {oops}" if oops else "")
    return say("kernel-panic", text, _trace(lines))


def _trace(lines: list[str]) -> list[str]:
    """Where it was, and the last call trace."""
    where = [line.strip() for line in lines if re.match(r"\s*(?:RIP: 0010:|CPU: \d+ (?:UID: \d+ )?PID: )", line)][-2:]
    starts = [n for n, line in enumerate(lines) if line.strip() in ("Call Trace:", "Call trace:")]
    calls: list[str] = []
    for line in lines[starts[-1] + 1 :] if starts else []:
        call = line.strip()
        if call in ("<TASK>", "<IRQ>", "</IRQ>", "<NMI>", "</NMI>"):
            continue
        if not re.match(r"(?:\? )?(?:\[<[0-9a-f]+>\] )?(?:\? )?(?:[\w.]+\+0x|0xffff)|\[<[0-9a-f]+>\]", call):
            break
        calls.append(call)
    return where + [f"in {call}" if n == 0 else f"called from {call}" for n, call in enumerate(calls[:_TRACE_MAX])]


def _initrd(lines: list[str], guest: Guest) -> Diagnosis | None:
    broken = _find(lines, r"[Ii]nitramfs unpacking failed: (.*)")
    return say("bad-initrd", f"the kernel could not unpack it: {broken[1]}") if broken else None


# ---- its silence ----


# Drivers register consoles until init runs; before that, a kernel may still print. A panic is printed at any level.
_CONSOLES_BEHIND = r"Run \S+ as init process|Freeing unused kernel|Warning: unable to open an initial console"
_PANIC = r"Kernel panic - not syncing"


def log_lines(log: str) -> list[str]:
    """Evidence: how much a log holds, and its end."""
    lines = [_STAMP.sub("", line).rstrip() for line in log.splitlines() if line.strip()]
    return [f"its log, found in memory, has {len(lines)} lines; the last:", *lines[-9:]] if lines else []


def unheard(log: str, guest: Guest) -> Diagnosis | None:
    """Why nothing of ``log`` was printed on this machine's console, or ``None``: it may not have come so far."""
    line = guest.told
    consoles = [value.split(",")[0] for value in line.values("console")]
    evidence = log_lines(log)
    if consoles and guest.console not in consoles:
        told = " ".join(f"console={name}" for name in consoles)
        return say("no-console", f"the kernel was told {told}, and this machine's console is {guest.console}", evidence)
    quiet = "quiet" in line or line.values("loglevel") != []
    if not re.search(_PANIC if quiet else rf"{_PANIC}|{_CONSOLES_BEHIND}", log):
        return None
    option = {"ttyS0": "CONFIG_SERIAL_8250_CONSOLE", "hvc0": "CONFIG_VIRTIO_CONSOLE"}[guest.console]
    text = f"the kernel logs, but nothing reaches {guest.console}: is {option}=y?"
    return say("no-console", text, evidence)


_BANNER = b"Linux version "
_RECORD_MAX = 1200  # a record of the log: 1024 bytes of text and its prefix
_RECORDS_MAX = 20000
_LOG_MAX = 1 << 20  # characters of a log, its end
_BANNERS_MAX = 16


def kernel_log(memory: GuestMemory, budget: Budget | None = None) -> str:
    """The log of a Linux kernel (5.10 or newer) in guest memory, or "": it has no log yet, or it has wrapped around.

    The ring of texts holds blocks of a 64-bit number, which counts up, and a text (kernel/printk/printk_ringbuffer.c).
    """
    lines: list[str] = []
    with (budget or Budget()).part("the search for the kernel's log") as part:
        at = memory.search(_BANNER, spend=part.spend)
        for _ in range(_BANNERS_MAX):
            if at is None or len(lines) > 2:
                break
            lines.clear()
            _records(memory, at - 8, lines, part)
            at = memory.search(_BANNER, at + 1, spend=part.spend)
    return "\n".join(lines)[-_LOG_MAX:] if len(lines) > 2 else ""


def _records(memory: Any, at: int, lines: list[str], part: Budget) -> None:
    """Append the texts of the blocks from the one at ``at`` on."""
    try:
        number = int.from_bytes(memory.read(at, 8), "little")
        for _ in range(_RECORDS_MAX):
            number = (number + 1) & (1 << 64) - 1
            block = memory.read(at + 8, _RECORD_MAX)
            part.spend(looked=len(block))
            end = block.find(number.to_bytes(8, "little"))
            while end % 8 and end >= 0:
                end = block.find(number.to_bytes(8, "little"), end + 1)
            text = (block if end < 0 else block[:end]).partition(b"\0")[0]
            lines.append(_trimmed(text).decode(errors="replace"))
            if end < 0:
                break
            at += 8 + end
    except IndexError:
        pass


def _trimmed(text: bytes) -> bytes:
    """A text without what printk left behind it: it takes the level's two bytes away by moving the text down over
    them, after the newline was given up (kernel/printk/printk.c, printk_sprint). What continues a
    line has the level "c"."""
    text = text.rstrip(b"\n")
    if text[-2:-1] == b"\x01":  # KERN_SOH
        return text[:-2]
    return text[:-2] if len(text) > 3 and text[-2:] == text[-4:-2] else text


# ---- its drivers ----


def no_drivers(guest: Guest) -> list[str]:
    """A line for each virtio device that no driver uses: how far one came, and the option it needs."""
    lines = []
    for device in sorted(guest.virtio, key=lambda device: device.type == _RNG):
        if device.used:
            continue
        option = DRIVERS.get(device.type, "its driver")
        if "FAILED" in device.status:
            lines.append(f"{device.name}: its driver gave up (status FAILED)")
        elif "DRIVER" in device.status:
            lines.append(f"{device.name}: its driver began and never set DRIVER_OK")
        elif device.status:
            lines.append(f"{device.name} was found on {guest.transport}, but no driver took it: is {option}=y, "
                         "or its module loaded?")  # fmt: skip
        else:
            transport = TRANSPORTS.get(guest.transport, guest.transport)
            lines.append(f"{device.name} was never looked at: it needs {transport}, and {option}")
    return lines
