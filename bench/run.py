"""pyvmm beside the floor (a bare KVM_RUN loop in C, floor.c) and QEMU microvm, in one run.

Every row is taken in rounds, the monitors by turns, so that what else the machine does falls on all of them alike. A
cell is the median of all rounds, then the least; ratios are to the floor's median and least. On a busy machine the
least is the better figure: nothing makes a run faster than it is.

The same PVH guests run in all three: ``hello`` (its first byte), ``exits`` (ticks of the guest's own clock per exit)
and ``hang`` (memory while it halts).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import _cffi_backend
from memory import own_bytes

from vmm.devices.device import Device
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "bench"
BUILD = ROOT / "build"

UART_SCRATCH = 0x3FF
UART_MMIO = 0xD0000000  # where the UART's C functions are put a second time
UART_MMIO_REGISTERS = UART_MMIO + 4  # MCR, LSR, MSR and SCR: four bytes that reading does not consume
PYTHON_PORT, PYTHON_MMIO = 0x300, 0xD0001000
VIRTIO_MMIO = 0xFEB00000  # microvm's first virtio-mmio transport: its magic number
FURTHER_MACHINES = 8

QEMU = ["qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-m", "256M", "-nodefaults", "-no-user-config"]
QEMU += ["-no-reboot", "-display", "none", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
QEMU_MEMFD = ["-machine", "memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=256M"]


class Latch(Device):
    """The least a device in Python can be."""

    name = "latch"

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        """The last value written."""
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep it."""
        self.value = value


class FirstExit(Device):
    """Notes when it is first met; answers as an idle UART's line status would."""

    name = "first-exit"

    def __init__(self) -> None:
        self.at = 0

    def read(self, offset: int, size: int) -> int:
        """Transmitter empty."""
        self.at = self.at or time.perf_counter_ns()
        return 0x60


# ---- the three monitors ----


class Bench:
    """Paths and command lines; samples by row and monitor."""

    def __init__(self, guests: Path, floor: Path, pyvmm: list[str]) -> None:
        self.guests = guests
        self.floor = str(floor)
        self.pyvmm = pyvmm
        self.qemu = shutil.which(QEMU[0]) is not None
        self.tsc_khz = 0
        self.samples: dict[str, dict[str, list[float]]] = {}

    def note(self, row: str, monitor: str, value: float) -> None:
        """One sample."""
        self.samples.setdefault(row, {}).setdefault(monitor, []).append(value)

    def guest(self, name: str) -> str:
        """Path of a guest."""
        return str(self.guests / name)

    def commands(self, guest: str, *, memfd: bool = False) -> dict[str, list[str]]:
        """Every monitor's command line for a guest without words of its own."""
        commands = {
            "floor": [self.floor, guest],
            "pyvmm": [*self.pyvmm, "boot", "--kernel", guest],
        }
        if self.qemu:
            commands["QEMU"] = [*QEMU, *(QEMU_MEMFD if memfd else ()), "-kernel", guest]
        return commands


def run_to_end(command: list[str]) -> tuple[str, str]:
    """Standard output and standard error of a monitor whose guest must pass."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if "PASS" not in done.stdout:
        raise SystemExit(f"{' '.join(command)}: the guest did not pass: {done.stdout}{done.stderr}")
    return done.stdout, done.stderr


def first_byte(command: list[str]) -> float:
    """Milliseconds from before the process is made until its guest's first byte is in our pipe."""
    read, write = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    start = time.perf_counter_ns()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    os.close(write)
    first = os.read(read, 1)
    end = time.perf_counter_ns()
    while os.read(read, 4096):
        pass
    os.waitpid(child, 0)
    os.close(read)
    os.close(null)
    if not first:
        raise SystemExit(f"{' '.join(command)}: the guest said nothing")
    return (end - start) / 1e6


def monitor_bytes(command: list[str]) -> tuple[int, int]:
    """(PSS, RSS) of a monitor whose guest has spoken and now halts."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    try:
        child.stdout.readline()
        return own_bytes(child.pid)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()


def words(n: int, port: int, address: int) -> str:
    """What the guest ``exits`` is told."""
    return f"pio={n} port={port:#x} mmio={n} addr={address:#x}"


def ticks(printed: str) -> tuple[int, int]:
    """Ticks a turn, as the guest ``exits`` printed them: PIO, MMIO."""
    found = dict(re.findall(r"(pio|mmio): (\d+) ticks", printed))
    return int(found["pio"]), int(found["mmio"])


# ---- rows ----


def take_first_bytes(bench: Bench) -> None:
    """Process start to the guest's first byte."""
    for monitor, command in bench.commands(bench.guest("hello")).items():
        bench.note("start to first byte, ms", monitor, first_byte(command))


def take_exits(bench: Bench, n: int) -> None:
    """One exit to a C device by port and by address, and to a Python device."""
    exits = bench.guest("exits")
    printed = {}
    printed["floor"], report = run_to_end([bench.floor, exits, words(n, UART_SCRATCH, UART_MMIO_REGISTERS)])
    bench.tsc_khz = int(report.split("tsc-khz ")[1])
    with Machine(kernel=exits, append=words(n, UART_SCRATCH, UART_MMIO_REGISTERS)) as machine:
        uart = next(device for device in machine.devices if device.name == "uart")
        machine.attach(uart, address=UART_MMIO, size=8)
        machine.run(60)
        printed["pyvmm"] = machine.console.transcript.decode()
    with Machine(kernel=exits, append=words(n, PYTHON_PORT, PYTHON_MMIO)) as machine:
        latch = Latch()
        machine.attach(latch, port=PYTHON_PORT, size=1)
        machine.attach(latch, address=PYTHON_MMIO, size=4)
        machine.run(60)
        python = ticks(machine.console.transcript.decode())
    if bench.qemu:
        printed["QEMU"], _ = run_to_end([*QEMU, "-kernel", exits, "-append", words(n, UART_SCRATCH, VIRTIO_MMIO)])
    us = 1000 / bench.tsc_khz
    for way, name in enumerate(("PIO", "MMIO")):
        for monitor, text in printed.items():
            bench.note(f"{name} exit, C device, us", monitor, ticks(text)[way] * us)
        bench.note(f"{name} exit, Python device, us", "pyvmm", python[way] * us)


def take_first_exit(bench: Bench) -> None:
    """In process: from ``Machine(...)``, and from the floor's open("/dev/kvm"), to the first exit."""
    hello = bench.guest("hello")
    rows = ("in process to first exit, ms", "the same, floor with chips first, ms")
    for row, option in zip(rows, ([], ["--chips-first"]), strict=True):
        bench.note(row, "floor", int(run_to_end([bench.floor, *option, hello])[1].split()[1]) / 1e6)
    start = time.perf_counter_ns()
    machine = Machine(kernel=hello)
    # The guest's first exit is its look at the UART's line status: a device of ours notes the time of it.
    uart = next(a for a in machine.bus.attachments.values() if a.device.name == "uart")
    machine.bus.detach(uart)
    first = FirstExit()
    machine.attach(first, port=uart.base, size=uart.size)
    machine.start()
    machine.wait(60)
    machine.close()
    for row in rows:
        bench.note(row, "pyvmm", (first.at - start) / 1e6)


def take_memory(bench: Bench) -> None:
    """The monitor's own memory: of the command, and of each further machine in a process."""
    for monitor, command in bench.commands(bench.guest("hang"), memfd=True).items():
        pss, rss = monitor_bytes(command)
        bench.note("own memory (PSS less guest RAM), MB", monitor, pss / 1e6)
        bench.note("own memory (RSS less guest RAM), MB", monitor, rss / 1e6)
    command = [sys.executable, str(HERE / "further.py"), bench.guest("hang"), str(1 + FURTHER_MACHINES)]
    sizes = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    bench.note("each further machine in a process, MB", "pyvmm", (sizes[-1] - sizes[0]) / FURTHER_MACHINES / 1e6)


# row -> what is wanted: a limit in the row's unit, or as a ratio to the floor or to QEMU
WANTED: dict[str, tuple[str, float]] = {
    "start to first byte, ms": ("x QEMU", 1.0),
    "in process to first exit, ms": ("x floor", 1.3),
    "the same, floor with chips first, ms": ("x floor", 1.3),
    "PIO exit, C device, us": ("x floor", 1.03),
    "MMIO exit, C device, us": ("x floor", 1.03),
    "PIO exit, Python device adds, us": ("", 2.0),
    "MMIO exit, Python device adds, us": ("", 2.0),
    "own memory (PSS less guest RAM), MB": ("", 20.0),
    "each further machine in a process, MB": ("", 2.0),
}
ROWS = [
    *("start to first byte, ms", "in process to first exit, ms", "the same, floor with chips first, ms"),
    *("PIO exit, C device, us", "MMIO exit, C device, us"),
    *("PIO exit, Python device, us", "PIO exit, Python device adds, us"),
    *("MMIO exit, Python device, us", "MMIO exit, Python device adds, us"),
    *("own memory (PSS less guest RAM), MB", "own memory (RSS less guest RAM), MB"),
    "each further machine in a process, MB",
]


# ---- the table ----


def summary(bench: Bench) -> dict[str, dict[str, Any]]:
    """Row -> monitor -> median, least, rounds, and ratios of both to the floor's."""
    table: dict[str, dict[str, Any]] = {}
    for row, samples in bench.samples.items():
        cells: dict[str, Any] = table.setdefault(row, {})
        for monitor, values in samples.items():
            cells[monitor] = {"median": median(values), "least": min(values), "rounds": len(values)}
        for cell in cells.values():
            for which in ("median", "least"):
                if "floor" in cells:
                    cell[f"{which} x floor"] = cell[which] / cells["floor"][which]
    for name in ("PIO", "MMIO"):
        native, python = (table[f"{name} exit, {kind} device, us"]["pyvmm"] for kind in ("C", "Python"))
        cells = {which: python[which] - native[which] for which in ("median", "least")}
        table[f"{name} exit, Python device adds, us"] = {"pyvmm": {**cells, "rounds": python["rounds"]}}
    return {row: table[row] for row in ROWS}


def verdict(row: str, cells: dict[str, Any]) -> str:
    """What was wanted of pyvmm, and by how much the least of the rounds has it."""
    if row not in WANTED:
        return ""
    unit, limit = WANTED[row]
    if unit == "x QEMU" and "QEMU" not in cells:
        return "QEMU is not installed"
    by = cells["QEMU" if unit == "x QEMU" else "floor"]["least"] if unit else 1.0
    got = cells["pyvmm"]["least"] / by
    return f"<= {limit:g} {unit}".rstrip() + (": yes" if got <= limit else f": no, {got:.3g}")


def show(table: dict[str, dict[str, Any]], qemu: bool) -> None:
    """Print it."""
    monitors = ["floor", "pyvmm", "QEMU"]
    print(f"{'':38}", *(f"{name + ' (x floor)':>31}" for name in monitors), " wanted of pyvmm's least")
    print(f"{'':38}", *(f"{'median':>16}{'least':>15}" for _ in monitors))
    for row, cells in table.items():
        line = f"{row:38}"
        for monitor in monitors:
            cell = cells.get(monitor)
            if cell is None:
                absent = "not installed" if monitor == "QEMU" and not qemu and "floor" in cells else "-"
                line += f" {absent:>31}"
                continue
            for which, width in (("median", 17), ("least", 15)):
                ratio = f" ({cell[f'{which} x floor']:.2f})" if monitor != "floor" and "floor" in cells else ""
                line += f"{cell[which]:.3f}{ratio}".rjust(width)
        print(f"{line}  {verdict(row, cells)}".rstrip())


def build() -> tuple[Path, Path]:
    """Guests and floor, built where they are not up to date."""
    steps = (
        ["cmake", "-S", str(ROOT / "guests"), "-B", str(BUILD / "guests")],
        ["cmake", "--build", str(BUILD / "guests"), "-j2"],
        ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(BUILD / "floor"), str(HERE / "floor.c")],
    )
    for step in steps:
        subprocess.run(step, stdout=subprocess.DEVNULL, check=True)
    return BUILD / "guests" / "bin", BUILD / "floor"


def pyvmm_command() -> list[str]:
    """``python -m vmm`` in a virtual environment with nothing else in it, its bytecode compiled: as after pip install.

    Where this script runs, an editable install and other packages' ``.pth`` files may add to the start of every Python.
    """
    environment = BUILD / "bench-environment"
    venv.create(environment, symlinks=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(Path(_cffi_backend.__file__).parent)))
    return [str(environment / "bin" / "python"), "-m", "vmm"]


def main() -> None:
    """Parse, build, measure by turns, print."""
    parser = argparse.ArgumentParser(description="pyvmm beside a bare KVM_RUN loop and QEMU microvm, in one run")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of every measurement (default: %(default)s)")
    parser.add_argument("--exits", type=int, default=500, help="exits of a kind in a round (default: %(default)s)")
    parser.add_argument("--pyvmm", metavar="COMMAND", help="measure this command (default: python -m vmm)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()
    guests, floor = build()
    bench = Bench(guests, floor, args.pyvmm.split() if args.pyvmm else pyvmm_command())
    takes: list[Callable[[], None]] = [
        lambda: take_first_bytes(bench),
        lambda: take_first_exit(bench),
        lambda: take_exits(bench, args.exits),
    ]
    for take in takes:  # imports, the host's findings and the page cache: a first time is nobody's figure
        take()
    bench.samples.clear()
    for _ in range(args.rounds):
        for take in takes:
            take()
    for _ in range(3):  # memory hardly varies
        take_memory(bench)
    table = summary(bench)
    if args.json:
        print(json.dumps(table, indent=2))
        return
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg()[:2])
    print(f"{args.rounds} rounds by turns; load average {load} on {os.cpu_count()} CPUs\n")
    show(table, bench.qemu)


if __name__ == "__main__":
    main()
