"""virtio beside QEMU: the same bare-metal guest with its own polled driver, the same backing files, one run.

The guest (guests/virtio_bench) runs at CPL 3 and polls, so that neither its kernel nor its interrupts are what is
measured. Every round takes every variant by turns. Of QEMU's variants each row shows the best median; so it does of
pyvmm's. docs/benchmarks.md says how to read the table.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from run import BUILD, QEMU, build, pyvmm_command

from vmm import layout

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60.0  # seconds for one monitor
IDLE_SECONDS = 3.0
# With --fifo: who looks at the clocks, then the monitors' threads, and last the vCPUs, which never sleep.
BENCH_PRIORITY, MONITOR_PRIORITY, VCPU_PRIORITY = 3, 2, 1
FRAMES = {"64 B": 64, "1500 B": 1514, "TSO 64000 B": 64000}
KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_GET_TSC_KHZ = 0xAE01, 0xAE41, 0xAEA3
PLACES = " ".join(
    f"virtio_mmio.device=4K@{layout.VIRTIO_MMIO_START + slot * layout.VIRTIO_MMIO_STRIDE:#x}:{gsi}"
    for slot, gsi in enumerate(layout.VIRTIO_MMIO_GSIS)
)


def tsc_khz() -> int:
    """Of a guest's time-stamp counter, which both monitors leave as KVM has it."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    try:
        return fcntl.ioctl(vcpu, KVM_GET_TSC_KHZ, 0)
    finally:
        for fd in (vcpu, vm, kvm):
            os.close(fd)


# ---- a monitor that runs a guest ----


class Run:
    """A monitor's process. Its vCPU's thread is told from the others by its appetite while the guest spins."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.alarm = threading.Timer(PATIENCE, self.process.kill)
        self.alarm.start()
        self.vcpu: int | None = None

    def threads(self) -> dict[int, int]:
        """Nanoseconds on a CPU by thread."""
        times = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                times[int(task.name)] = int((task / "schedstat").read_text().split()[0])
        return times

    def find_vcpu(self, before: dict[int, int]) -> None:
        """The thread that worked hardest since ``before``."""
        now = self.threads()
        self.vcpu = max(now, key=lambda thread: now[thread] - before.get(thread, 0))
        if os.sched_getscheduler(0) & os.SCHED_FIFO:
            for thread in now:
                priority = VCPU_PRIORITY if thread == self.vcpu else MONITOR_PRIORITY
                os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(priority))

    def monitor_time(self) -> int:
        """Nanoseconds of CPU of the whole process, threads that ended included, less those of the vCPU's thread."""
        whole = time.clock_gettime_ns((~self.process.pid << 3) | 2)  # clock_getcpuclockid(3)
        assert self.vcpu is not None
        return whole - self.threads()[self.vcpu]

    def wakeups(self) -> int:
        """Context switches of every thread so far."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            text = (task / "status").read_text()
            total += sum(int(n) for n in re.findall(r"voluntary_ctxt_switches:\s*(\d+)", text))
        return total

    def until(self, wanted: str) -> str:
        """Read lines up to one that starts so."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if line.startswith(wanted):
                return line
        raise self.failed("".join(seen))

    def failed(self, said: str) -> SystemExit:
        """The end of the bench: this monitor's guest did not do its part."""
        self.process.kill()
        assert self.process.stderr is not None
        return SystemExit(f"{' '.join(self.command)}\n{said}{self.process.stderr.read()}")

    def phases(self) -> Iterator[dict[str, Any]]:
        """What the guest reports, phase by phase, with the monitor's CPU time in it."""
        assert self.process.stdout is not None
        before: dict[int, int] = {}
        start, said = 0, []
        for line in self.process.stdout:
            said.append(line)
            found = re.match(r"(.+): (\d+) operations, (\d+) bytes, (\d+) ticks, (\d+) doorbells", line)
            if line == "spin\n":
                before = self.threads()
            elif line.startswith("go "):
                if self.vcpu is None:
                    self.find_vcpu(before)
                start = self.monitor_time()
                self.answer()
            elif found:
                name, *numbers = found.groups()
                keys = ("operations", "bytes", "ticks", "doorbells")
                yield {
                    "phase": name,
                    "cpu": self.monitor_time() - start,
                    **dict(zip(keys, map(int, numbers), strict=True)),
                }
                self.answer()
            elif line == "PASS\n":
                self.process.wait(PATIENCE)
                return
        raise self.failed("".join(said))

    def answer(self) -> None:
        """Let the guest go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Kill it if it still runs."""
        self.alarm.cancel()
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def running(*commands: list[str]) -> Iterator[list[Run]]:
    """Monitors side by side, all over in the end."""
    runs: list[Run] = []
    try:
        for command in commands:
            runs.append(Run(command))
        yield runs
    finally:
        for run in runs:
            run.stop()


# ---- the monitors and their variants ----


@dataclass(frozen=True)
class Pyvmm:
    """pyvmm on one transport."""

    command: tuple[str, ...]
    guest: str
    transport: str
    monitor = "pyvmm"

    @property
    def name(self) -> str:
        """In the table."""
        return self.transport

    def base(self, words: str) -> list[str]:
        """Without devices."""
        places = PLACES if self.transport == "mmio" else ""
        line = [*self.command, "boot", "--kernel", self.guest, "--mem", "64M", "--rng", "off"]
        return [*line, "--virtio", self.transport, "--append", f"{places} {words}"]

    def disk(self, path: str, direct: bool) -> list[str] | None:
        """A disk."""
        return ["--disk", f"{path},cache={'none' if direct else 'writeback'}"]

    def link(self, folder: str, sends: bool) -> list[str] | None:
        """An end of a link; the sender's is there first."""
        return ["--net", f"socket={folder}/link"]

    def rng(self) -> list[str]:
        """Random numbers."""
        return ["--rng", "on"]


@dataclass(frozen=True)
class Qemu:
    """QEMU on one machine, with one way of disk I/O and one kind of socket."""

    guest: str
    machine: str
    aio: str = ""
    iothread: bool = False
    netdev: str = ""
    monitor = "QEMU"

    @property
    def name(self) -> str:
        """In the table."""
        parts = (self.machine, self.aio, "iothread" if self.iothread else "", self.netdev)
        return " ".join(part for part in parts if part)

    def base(self, words: str) -> list[str]:
        """Without devices."""
        line = [*QEMU, "-global", "virtio-mmio.force-legacy=false", "-kernel", self.guest, "-append", words]
        line[line.index("microvm")] = "microvm,acpi=off" if self.machine == "microvm" else self.machine
        line[line.index("256M")] = "64M"
        return line

    def device(self, kind: str, options: str) -> list[str]:
        """A virtio device as this machine has it."""
        suffix = "device" if self.machine == "microvm" else "pci,disable-legacy=on"
        return ["-device", f"virtio-{kind}-{suffix}{options}"]

    def disk(self, path: str, direct: bool) -> list[str] | None:
        """A disk; Linux's own asynchronous I/O is for O_DIRECT only."""
        if not self.aio or (self.aio == "native" and not direct):
            return None
        cache = "none" if direct else "writeback"
        line = ["-drive", f"if=none,id=disk,format=raw,file={path},cache={cache},aio={self.aio}"]
        if self.iothread:
            line += ["-object", "iothread,id=io"]
        return [*line, *self.device("blk", ",drive=disk" + (",iothread=io" if self.iothread else ""))]

    def link(self, folder: str, sends: bool) -> list[str] | None:
        """An end of a link; who sends listens, for QEMU 7.2 crashes when a stream's listener speaks first."""
        if self.netdev == "stream":
            end = f"stream,id=net,addr.type=unix,addr.path={folder}/link,server={'on' if sends else 'off'}"
        elif self.netdev == "dgram":
            own, other = ("link", "peer") if sends else ("peer", "link")
            end = "dgram,id=net,local.type=unix,remote.type=unix"
            end += f",local.path={folder}/{own},remote.path={folder}/{other}"
        else:
            return None
        return ["-netdev", end, *self.device("net", ",netdev=net")]

    def rng(self) -> list[str]:
        """Random numbers."""
        return self.device("rng", "")


def variants(guest: str, pyvmm: list[str]) -> list[Pyvmm | Qemu]:
    """Every contestant."""
    found: list[Pyvmm | Qemu] = [Pyvmm(tuple(pyvmm), guest, transport) for transport in ("pci", "mmio")]
    if shutil.which(QEMU[0]) is None:
        return found
    found += [Qemu(guest, "microvm", "io_uring", True, "dgram"), Qemu(guest, "microvm", netdev="stream")]
    found += [Qemu(guest, "microvm", "threads", True), Qemu(guest, "microvm", "native", True)]
    found += [Qemu(guest, "microvm", "io_uring"), Qemu(guest, "pc", "io_uring", True, "dgram")]
    return [*found, Qemu(guest, "pc", netdev="stream")]


# ---- measurements ----


@dataclass
class Row:
    """What was measured: samples by monitor and variant."""

    more_is_better: bool
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def note(self, contestant: Pyvmm | Qemu, value: float) -> None:
        """One sample."""
        self.samples.setdefault(contestant.monitor, {}).setdefault(contestant.name, []).append(value)

    def best(self, monitor: str) -> dict[str, Any] | None:
        """A monitor's best variant, by the best of its rounds: nothing makes a run better than it is."""
        of = self.samples.get(monitor)
        if not of:
            return None
        best = max if self.more_is_better else min
        name = best(of, key=lambda name: best(of[name]))
        return {"variant": name, "best": best(of[name]), "median": median(of[name])}


class Bench:
    """Rows by name; how long a phase is."""

    def __init__(self, milliseconds: int) -> None:
        self.khz = tsc_khz()
        self.words = f"ticks={self.khz * milliseconds}"
        self.rows: dict[str, Row] = {}
        self.without: set[tuple[Pyvmm | Qemu, str]] = set()  # no such frames on this link

    def note(self, name: str, contestant: Pyvmm | Qemu, value: float, more_is_better: bool = True) -> None:
        """One sample of a row."""
        self.rows.setdefault(name, Row(more_is_better)).note(contestant, value)

    def seconds(self, phase: dict[str, Any]) -> float:
        """How long a phase was on the guest's clock."""
        return float(phase["ticks"] / self.khz / 1000)

    def take_disk(self, contestant: Pyvmm | Qemu, path: str, direct: bool) -> None:
        """Reads of both sizes."""
        disk = contestant.disk(path, direct)
        if disk is None:
            return
        way = "O_DIRECT" if direct else "cached"
        with running([*contestant.base(f"{self.words} blk=1"), *disk]) as (run,):
            for phase in run.phases():
                if phase["phase"] == "warm":
                    continue
                what, size, _, depth = phase["phase"].split()
                row = f"{what} {size}, depth {depth}, {way}"
                if size == "1m":
                    self.note(f"{row}, MB/s", contestant, phase["bytes"] / self.seconds(phase) / 1e6)
                else:
                    self.note(f"{row}, IOPS", contestant, phase["operations"] / self.seconds(phase))
                self.note(f"{row}, monitor us/op", contestant, phase["cpu"] / phase["operations"] / 1e3, False)

    def take_link(self, contestant: Pyvmm | Qemu, name: str, frame: int) -> None:
        """Frames of one size from a guest to another."""
        with tempfile.TemporaryDirectory() as folder:
            ends = [contestant.link(folder, sends) for sends in (True, False)]
            if ends[0] is None or ends[1] is None or (contestant, name) in self.without:
                return
            words = f"{self.words} frame={frame} net="
            with running([*contestant.base(words + "2"), *ends[0]]) as (sender,):
                deadline = time.monotonic() + PATIENCE
                while not Path(folder, "link").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                with (
                    running([*contestant.base(words + "1"), *ends[1]]) as (receiver,),
                    ThreadPoolExecutor(1) as other,
                ):
                    # The sender stays in its last wait until the receiver is through: QEMU dies of a peer that is gone.
                    sending = other.submit(next, sender.phases(), None)
                    received = list(receiver.phases())
                    sent = sending.result()
        if not received or sent is None:
            self.without.add((contestant, name))
            return
        seconds = self.seconds(received[0])
        self.note(f"link, {name} frames, packets/s", contestant, received[0]["operations"] / seconds)
        self.note(f"link, {name} frames, MB/s", contestant, received[0]["bytes"] / seconds / 1e6)
        cost = sum(end["cpu"] / end["operations"] for end in (sent, received[0]))
        self.note(f"link, {name} frames, monitors us/packet", contestant, cost / 1e3, False)

    def take_idle(self, contestant: Pyvmm | Qemu, path: str) -> None:
        """Context switches of a monitor whose guest halts, with and without devices."""
        with tempfile.TemporaryDirectory() as folder:
            disk, link = contestant.disk(path, False), contestant.link(folder, True)
            if disk is None or link is None:
                return
            cases = {"with disk, link and rng": [*disk, *link, *contestant.rng()], "without devices": []}
            for name, devices in cases.items():
                with running([*contestant.base("idle=1"), *devices]) as (run,):
                    run.until("idle")
                    time.sleep(0.3)
                    before = run.wakeups()
                    time.sleep(IDLE_SECONDS)
                    self.note(f"idle {name}, wake-ups/s", contestant, (run.wakeups() - before) / IDLE_SECONDS, False)


# ---- the table ----


def summary(rows: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """Row -> the best of each monitor, their ratio, and every variant's median, least and greatest."""
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(rows):
        row = rows[name]
        cells: dict[str, Any] = {"more is better": row.more_is_better}
        for monitor in ("pyvmm", "QEMU"):
            cells[monitor] = row.best(monitor)
        for which in ("best", "median"):
            if cells["pyvmm"] and cells["QEMU"] and cells["QEMU"][which]:
                cells[f"ratio of {which}"] = cells["pyvmm"][which] / cells["QEMU"][which]
        cells["variants"] = {
            f"{monitor} {variant}": {"median": median(v), "least": min(v), "greatest": max(v), "rounds": len(v)}
            for monitor, of in row.samples.items()
            for variant, v in of.items()
        }
        table[name] = cells
    return table


def show(table: dict[str, dict[str, Any]]) -> None:
    """Print it."""
    print(f"{'best round (median)':44}{'pyvmm':>22} {'':5}{'QEMU':>22} {'':28}{'ratio':>14}")
    for name, cells in table.items():
        line = f"{name:44}"
        for monitor, width in (("pyvmm", 5), ("QEMU", 28)):
            cell = cells[monitor]
            figures = f"{cell['best']:,.1f} ({cell['median']:,.1f})" if cell else "-"
            line += f"{figures:>22} {cell['variant'] if cell else '':{width}}"
        if "ratio of best" in cells:
            ratio, middle = cells["ratio of best"], cells.get("ratio of median", 0.0)
            line += f"{ratio:7.2f} ({middle:.2f}) "
            line += "ahead" if (ratio >= 1) == cells["more is better"] else "BEHIND"
        print(line.rstrip())


def fill(path: str, mebibytes: int) -> str:
    """A backing file of random bytes, in the page cache and on the disk."""
    with open(path, "wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    return path


def main() -> None:
    """Parse, build, measure by turns, print."""
    parser = argparse.ArgumentParser(description="pyvmm's virtio devices beside QEMU's, in one run")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every measurement (default: %(default)s)")
    parser.add_argument("--ms", type=int, default=500, help="milliseconds a phase (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="MiB of the backing files (default: %(default)s)")
    parser.add_argument("--cached-in", default="/dev/shm", help="where the cached disk is (default: %(default)s)")
    parser.add_argument("--direct-in", default=str(BUILD), help="where the O_DIRECT disk is (default: %(default)s)")
    parser.add_argument("--only", default="disk,link,idle", help="of disk, link, idle (default: %(default)s)")
    parser.add_argument("--fifo", action="store_true", help="real-time scheduling, on a machine that is busy otherwise")
    parser.add_argument("--monitors", default="pyvmm,QEMU", help="which to run (default: %(default)s)")
    parser.add_argument("--pyvmm", metavar="COMMAND", help="measure this command (default: python -m vmm)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON, with every variant")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # monitors at real-time priority must not outlive us
    guests, _ = build()
    if args.fifo:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(BENCH_PRIORITY))
    only = args.only.split(",")
    contestants = variants(str(guests / "virtio_bench"), args.pyvmm.split() if args.pyvmm else pyvmm_command())
    contestants = [one for one in contestants if one.monitor in args.monitors.split(",")]
    bench = Bench(args.ms)
    with (
        tempfile.TemporaryDirectory(dir=args.cached_in) as fast,
        tempfile.TemporaryDirectory(dir=args.direct_in) as slow,
    ):
        disks = {fill(f"{fast}/disk", args.size): False, fill(f"{slow}/disk", args.size): True}
        for _ in range(args.rounds):
            for contestant in contestants:
                for path, direct in disks.items() if "disk" in only else ():
                    bench.take_disk(contestant, path, direct)
                for name, frame in FRAMES.items() if "link" in only else ():
                    bench.take_link(contestant, name, frame)
        for contestant in contestants if "idle" in only else ():
            bench.take_idle(contestant, next(iter(disks)))
    table = summary(bench.rows)
    if args.json:
        print(json.dumps(table, indent=2))
        return
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg()[:2])
    print(f"{args.rounds} rounds by turns; load average {load} on {os.cpu_count()} CPUs\n")
    show(table)


if __name__ == "__main__":
    main()
