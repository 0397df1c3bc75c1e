"""Roll-back, repeated runs and restores: pyvmm beside the floor (bare ioctls, floor_rollback.c) and QEMU, in one run.

Roll-back: a guest of nine instructions writes so many pages and ends; then it is taken back. The floor does the same
on the same kind of machine. QEMU's nearest thing is loadvm, from a qcow2 image in memory: it reads all memory in use.

Restore: of a 512 MiB machine with 60 MiB in use, from files in memory. In process, from Machine.restore to the guest's
first exit, where the floor of a checked one is to read and sum those 60 MiB, by one thread that does nothing else; and
from the start of a process to the guest's next output, beside QEMU's -incoming.

Everything is taken in rounds, the monitors by turns; a cell is the median of all rounds, then the least.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from run import BUILD, HERE, QEMU, build, pyvmm_command

from vmm.machine import Machine
from vmm.snapshot.reading import file_sum

if TYPE_CHECKING:
    from types import TracebackType

PAGES = (1, 10, 100)
HEAP = 2 << 20
BALLAST = 60 << 20
WORDS = f"pages=16 ballast={BALLAST >> 12} jump=3600000 tsc_jump=3600000"  # of the guest self_check
UART = range(0x3F8, 0x400)

WANTED = {
    **{f"roll-back, {pages} pages, us": ("x floor", 1.5) for pages in PAGES},
    "runs and roll-backs a second, 10 pages": (">=", 1000.0),
    "restore, in process, not checked, ms": ("<=", 15.0),
    "restore, in process, checked, ms": ("<=", 15.0),
}


def writes(pages: int) -> bytes:
    """A guest that adds one to a word in each of so many pages."""
    # mov ecx, pages; mov edi, HEAP; again: inc dword [edi]; add edi, 4096; dec ecx; jnz again; mov al, 16; out 0xf4, al
    counts = b"\xb9" + pages.to_bytes(4, "little") + b"\xbf" + HEAP.to_bytes(4, "little")
    return counts + bytes.fromhex("ff07 81c700100000 ffc9 75f4 b010 e6f4")


class Table:
    """Samples by row and monitor."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[float]]] = {}

    def note(self, row: str, monitor: str, value: float) -> None:
        """One sample."""
        self.samples.setdefault(row, {}).setdefault(monitor, []).append(value)

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Row -> monitor -> median and best."""
        best = {row: max if "a second" in row else min for row in self.samples}
        return {
            row: {name: {"median": median(taken), "best": best[row](taken)} for name, taken in cells.items()}
            for row, cells in self.samples.items()
        }

    def show(self) -> None:
        """Print it."""
        print(f"{'':44}{'floor':>18}{'pyvmm':>18}{'QEMU':>20}   wanted of pyvmm's median")
        for row, cells in self.summary().items():
            shown = [cells.get(monitor) for monitor in ("floor", "pyvmm", "QEMU")]
            texts = [f"{cell['median']:.4g} ({cell['best']:.4g})" if cell else "-" for cell in shown]
            line = f"{row:44}{texts[0]:>18}{texts[1]:>18}{texts[2]:>20}"
            print(f"{line}   {self.verdict(row, cells)}".rstrip())

    def verdict(self, row: str, cells: dict[str, dict[str, float]]) -> str:
        """What was wanted, and what was got."""
        how, limit = WANTED.get(row, ("", 0.0))
        got = cells["pyvmm"]["median"]
        if how == "x floor":
            got /= cells["floor"]["median"]
            return f"<= {limit:g} x floor: {'yes' if got <= limit else 'no'}, {got:.2f}"
        return f"{how} {limit:g}: {'yes' if (got >= limit) == (how == '>=') else 'no'}" if how else ""


# ---- roll-back ----


def take_rollbacks(table: Table, folder: Path, floor: Path, runs: int) -> None:
    """One round for each number of pages: the floor, then pyvmm."""
    for pages in PAGES:
        image = folder / f"writes{pages}.bin"
        image.write_bytes(writes(pages))
        command = [str(floor), str(image), str(pages), str(runs)]
        words = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        row, rate = f"roll-back, {pages} pages, us", f"runs and roll-backs a second, {pages} pages"
        table.note(row, "floor", int(words[0]) / 1e3)
        table.note(rate, "floor", float(words[2]))
        with Machine(kernel=image, kind="flat", mode="protected", memory="64M") as machine:
            checkpoint = machine.checkpoint()
            machine.run()
            machine.rollback(checkpoint)
            took = []
            start = time.perf_counter()
            for _ in range(runs):
                machine.run()
                before = time.perf_counter()
                machine.rollback(checkpoint)
                took.append(time.perf_counter() - before)
            table.note(rate, "pyvmm", runs / (time.perf_counter() - start))
            table.note(row, "pyvmm", median(took) * 1e6)


# ---- restore ----


class Qemu:
    """QEMU with a monitor on its standard input and output (docs/interop/qmp-spec.txt)."""

    def __init__(self, *words: str) -> None:
        command = [*QEMU[:6], "512M", *QEMU[7:]]
        command[command.index("stdio")] = "null"
        self.process = subprocess.Popen(
            [*command, "-qmp", "stdio", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        self.process.stdout.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        """One command; what it returns."""
        assert self.process.stdout is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        for line in self.process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise SystemExit(f"QEMU: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise SystemExit(f"QEMU ended at {command}")

    def human(self, line: str) -> None:
        """A command of the other monitor, which says nothing when it works."""
        if said := self.ask("human-monitor-command", **{"command-line": line}).strip():
            raise SystemExit(f"QEMU: {line}: {said}")

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


def take_loadvm(table: Table, folder: Path, guest: str, rounds: int) -> None:
    """QEMU's roll-back, of the machine with 60 MiB in use."""
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(1 << 30)
    os.environ["TMPDIR"] = str(folder)
    drive = f"if=none,id=states,format=raw,snapshot=on,file={image}"  # the states are in a qcow2 overlay of QEMU's own
    with Qemu("-kernel", guest, "-append", WORDS, "-drive", drive) as qemu:
        time.sleep(2)
        qemu.human("savevm then")
        for _ in range(rounds):
            start = time.perf_counter()
            qemu.human("loadvm then")
            table.note("roll-back, 60 MiB in use, ms", "QEMU", (time.perf_counter() - start) * 1e3)


def save_qemu(folder: Path, guest: str) -> list[str]:
    """A file that QEMU goes on from; answers how it is told to."""
    path = folder / "qemu-state"
    with Qemu("-kernel", guest, "-append", WORDS) as qemu:
        time.sleep(2)
        qemu.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        qemu.ask("migrate", uri=f"exec:cat > {path}")
        while (status := qemu.ask("query-migrate")["status"]) != "completed":
            if status == "failed":
                raise SystemExit("QEMU: migrate failed")
            time.sleep(0.05)
    return [*QEMU[:6], "512M", *QEMU[7:], "-incoming", f"exec:cat {path}"]


def snapshot(table: Table, folder: Path, guest: str, rounds: int) -> Path:
    """The machine with 60 MiB in use, as a snapshot; and how long a roll-back of it takes while it runs."""
    with Machine(kernel=guest, append=WORDS, memory="512M") as machine:
        machine.start()
        machine.console.expect("round 0\n", 20)
        machine.snapshot(folder / "snapshot")
        with machine.checkpoint() as checkpoint:
            for _ in range(rounds):
                time.sleep(0.01)
                start = time.perf_counter()
                machine.rollback(checkpoint)
                table.note("roll-back, 60 MiB in use, ms", "pyvmm", (time.perf_counter() - start) * 1e3)
    return folder / "snapshot"


def take_restore(table: Table, path: Path, check: bool) -> None:
    """From the call to the guest's first exit."""
    row = f"restore, in process, {'checked' if check else 'not checked'}, ms"
    first: list[float] = []

    def note(access: object) -> None:
        if not first:
            first.append(time.perf_counter())

    start = time.perf_counter()
    with Machine.restore(path, check=check) as machine:
        machine.on_port(UART, note)
        machine.start()
        while not first:
            time.sleep(0.0005)
        table.note(row, "pyvmm", (first[0] - start) * 1e3)
        machine.stop()
    if check:
        with (path / "memory").open("rb") as file:
            start = time.perf_counter()
            file_sum(file.fileno())
            table.note(row, "floor", (time.perf_counter() - start) * 1e3)


def next_output(command: list[str]) -> float:
    """Milliseconds from before the process is made until its guest goes on printing; then it is killed."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        if not child.stdout.read(1):
            raise SystemExit(f"{' '.join(command)}: the guest said nothing")
        return (time.perf_counter() - start) * 1e3
    finally:
        child.kill()
        child.communicate()


def main() -> None:
    """Parse, build, measure by turns, print."""
    parser = argparse.ArgumentParser(description="roll-back and restore beside bare ioctls and QEMU, in one run")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of every measurement (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=300, help="roll-backs in a round (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()
    guests, _ = build()
    floor = BUILD / "floor_rollback"
    source = str(HERE / "floor_rollback.c")
    subprocess.run(["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(floor), source], check=True)
    guest = str(guests / "self_check")
    with_qemu = shutil.which(QEMU[0]) is not None
    table = Table()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        take_rollbacks(Table(), folder, floor, 10)  # imports and the page cache: a first time is nobody's figure
        for _ in range(args.rounds):
            take_rollbacks(table, folder, floor, args.runs)
        saved = snapshot(table, folder, guest, args.rounds)
        commands = {"pyvmm": [*pyvmm_command(), "restore", str(saved)]}
        if with_qemu:
            take_loadvm(table, folder, guest, args.rounds)
            commands["QEMU"] = save_qemu(folder, guest)
        take_restore(Table(), saved, True)
        for _ in range(args.rounds):
            for check in (False, True):
                take_restore(table, saved, check)
            for monitor, command in commands.items():
                table.note("restore, process start to next output, ms", monitor, next_output(command))
    if args.json:
        print(json.dumps(table.summary(), indent=2))
        return
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg()[:2])
    print(f"{args.rounds} rounds by turns; median (best); load average {load} on {os.cpu_count()} CPUs")
    print("QEMU is microvm with KVM\n" if with_qemu else "qemu-system-x86_64 or qemu-img is not installed\n")
    table.show()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
