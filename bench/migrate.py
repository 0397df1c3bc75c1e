"""Migration between two processes on one host: how long the guest stands still, and how fast its memory goes.

Pre-copy of a guest that writes pages at a steady rate, and post-copy with more and more memory in use; QEMU beside it,
with the same guest, by its monitor. Times are the source's: from the moment it holds the guest to the other side's word
that it runs; QEMU's is what it reports as its downtime. The median of the rounds, then the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GUEST = ROOT / "build" / "guests" / "bin" / "self_check"
PYVMM = [sys.executable, "-m", "vmm"]
QEMU = ["qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-nodefaults", "-no-user-config", "-display", "none"]
CLOCKS = "tsc_jump=60000 jump=60000"

# name -> memory, the guest's words, post-copy
ROWS = {
    "pre-copy, 1,000 pages/s": ("64M", "pages=1024 rate=1000", False),
    "pre-copy, 10,000 pages/s": ("64M", "pages=4096 rate=10000", False),
    "pre-copy, 10,000 pages/s of 512 MiB": ("640M", "pages=4096 ballast=126976 rate=10000", False),
    "post-copy, 32 MiB in use": ("64M", "pages=64 ballast=8192 rate=1000", True),
    "post-copy, 512 MiB in use": ("640M", "pages=64 ballast=131072 rate=1000", True),
}


def has_begun(output: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the guest has laid its memory out."""
    while b"round 0\n" not in (output.read_bytes() if output.exists() else b""):
        if process.poll() is not None:
            raise SystemExit(f"the guest ended: {output.read_text()}")
        time.sleep(0.02)
    time.sleep(0.3)


def pyvmm(folder: Path, memory: str, words: str, postcopy: bool) -> dict[str, float]:
    from vmm.control import ask

    control, there, said = folder / "control", folder / "there", folder / "said"
    receiving = subprocess.Popen([*PYVMM, "receive", f"unix:{there}", "--console", "none"], stderr=subprocess.PIPE)
    boot = ["boot", "--kernel", str(GUEST), "--mem", memory, "--append", f"{words} {CLOCKS}"]
    booted = subprocess.Popen([*PYVMM, *boot, "--control", str(control), "--console", f"file:{said}"])
    try:
        assert receiving.stderr
        receiving.stderr.readline()
        has_begun(said, booted)
        done = ask(str(control), {"do": "migrate", "to": f"unix:{there}", "postcopy": postcopy})
        return {"downtime": done["downtime"], "seconds": done["seconds"], "bytes": done["bytes"]}
    finally:
        for process in (booted, receiving):
            process.kill()
            process.wait()


class Qmp:
    """A connection to QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + 20
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._lines = self._socket.makefile("rwb")
        self._lines.readline()
        self.do("qmp_capabilities")

    def do(self, name: str, **arguments: Any) -> Any:
        """One command; its answer."""
        self._lines.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._lines.flush()
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise SystemExit(f"qemu: {name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


def qemu(folder: Path, memory: str, words: str, postcopy: bool) -> dict[str, float]:
    said, uri = folder / "said", f"unix:{folder}/there"
    common = [*QEMU, "-m", memory, "-kernel", str(GUEST), "-append", f"{words} {CLOCKS}"]
    sides = []
    try:
        for name, more in (("to", ["-incoming", uri, "-serial", "null"]), ("from", ["-serial", f"file:{said}"])):
            monitor = ["-qmp", f"unix:{folder}/{name},server=on,wait=off"]
            sides.append(subprocess.Popen([*common, *monitor, *more]))
        into, out = Qmp(folder / "to"), Qmp(folder / "from")
        has_begun(said, sides[1])
        if postcopy:
            for side in (into, out):
                side.do("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        out.do("migrate-set-parameters", **{"max-bandwidth": 1 << 34, "downtime-limit": 300})
        out.do("migrate", uri=uri)
        if postcopy:
            out.do("migrate-start-postcopy")
        while (found := out.do("query-migrate"))["status"] not in ("completed", "failed"):
            time.sleep(0.02)
        if found["status"] == "failed":
            raise SystemExit(f"qemu: the migration failed: {found.get('error-desc')}")
        return {
            "downtime": found["downtime"] / 1000,
            "seconds": found["total-time"] / 1000,
            "bytes": found["ram"]["transferred"],
        }
    finally:
        for process in sides:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="WORD", default="", help="rows whose name has this in it")
    parser.add_argument("--no-qemu", action="store_true")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    monitors = {"pyvmm": pyvmm}
    if not given.no_qemu and shutil.which(QEMU[0]):
        monitors["qemu"] = qemu
    print(f"{'':38}{'':8}{'downtime, ms (least, most)':>30}{'seconds':>10}{'MB/s':>8}")
    for name, row in ROWS.items():
        if given.only not in name:
            continue
        found: dict[str, list[dict[str, float]]] = {monitor: [] for monitor in monitors}
        for _ in range(given.rounds):
            for monitor, take in monitors.items():
                with tempfile.TemporaryDirectory() as folder:
                    found[monitor].append(take(Path(folder), *row))
        for monitor, takes in found.items():
            held = [1000 * take["downtime"] for take in takes]
            seconds = median(take["seconds"] for take in takes)
            rate = median(take["bytes"] / take["seconds"] / 1e6 for take in takes)
            shown = f"{median(held):.0f} ({min(held):.0f}, {max(held):.0f})"
            print(f"{name:38}{monitor:8}{shown:>30}{seconds:>10.2f}{rate:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
