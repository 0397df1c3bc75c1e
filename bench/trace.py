"""What tracing costs an exit: off and on, by turns, in one run of one machine.

A guest does nothing but write a byte to a port that no device claims, so that the exit is all there is. Every turn
counts exits and the CPU time of the vCPU's thread (time in which the host ran something else does not count). "off"
is measured before and after each "on": what these differ by is what this host cannot tell apart. First trace_event.c
measures pyvmm's own part of it, without KVM.

usage: trace.py [TURNS]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from vmm.machine import Machine

ROOT = Path(__file__).resolve().parent.parent
EXITS = 5000  # at least, in a turn
LOOP = bytes.fromhex("66ba1806 ee ebfd")  # mov dx, 0x618; 1: out dx, al; jmp 1b


def without_kvm() -> tuple[float, float]:
    """Nanoseconds that an exit pays for tracing in pyvmm itself: while off, while on."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/trace_event"
        command = [
            "gcc",
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT}/native",
            f"-I{ROOT}/native/include",
        ]
        command += ["-o", program, f"{ROOT}/bench/trace_event.c", f"{ROOT}/build/native/libvmmcore.a", "-lpthread"]
        subprocess.run(command, check=True)
        off, on = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    return float(off), float(on)


def cpu_ns(thread: int) -> int:
    """CPU time of a thread of this process, in nanoseconds."""
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])


def turn(machine: Machine, thread: int) -> float:
    """Nanoseconds an exit over one turn."""
    vcpu = machine.vcpus[0]
    time.sleep(0.005)  # whatever was switched is switched
    exits, began, done = vcpu.exit_counts()["io"], cpu_ns(thread), 0
    while done < EXITS:
        time.sleep(0.01)
        done = vcpu.exit_counts()["io"] - exits
    return (cpu_ns(thread) - began) / done


def main(turns: int) -> None:
    """Print the table."""
    off_alone, on_alone = without_kvm()
    print(f"in pyvmm alone, least of 20 rounds: off {off_alone:.1f} ns an exit, on {on_alone:.1f} ns an event")
    found: dict[str, list[float]] = {"off": [], "on": [], "off again": []}
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(LOOP)
        file.flush()
        with Machine(kernel=file.name, kind="flat", mode="long", memory="16M") as machine:
            machine.start()
            thread = machine._threads[0].native_id
            assert thread is not None
            time.sleep(0.2)
            for _ in range(turns):
                found["off"].append(turn(machine, thread))
                with machine.trace(instructions=False):
                    found["on"].append(turn(machine, thread))
                found["off again"].append(turn(machine, thread))
    print(f"ns of CPU an exit, {turns} turns of {EXITS} exits{'':10} {'median':>8} {'least':>8}")
    for name, each in found.items():
        print(f"{name:48} {median(each):8.0f} {min(each):8.0f}")
    off, on, again = found.values()
    cost = [b - (a + c) / 2 for a, b, c in zip(off, on, again, strict=True)]
    noise = [a - c for a, c in zip(off, again, strict=True)]
    print(f"{'on, less what its two neighbours off took':48} {median(cost):8.0f}")
    print(f"{'off, less its neighbour off':48} {median(noise):8.0f}")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
