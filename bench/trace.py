"""What tracing costs an exit: off and on, by turns, in one run of one machine.

A guest does nothing but write a byte to a port that no device claims, so that the exit is all there is. Every turn
counts exits and the CPU time of the vCPU's thread (time in which the host ran something else does not count). "off"
is measured in two sets of turns that alternate with "on": what these differ by is what this host cannot tell apart.

usage: trace.py [TURNS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from vmm.machine import Machine

TURN = 0.1  # seconds
LOOP = bytes.fromhex("66ba1806 ee ebfd")  # mov dx, 0x618; 1: out dx, al; jmp 1b


def cpu_ns(thread: int) -> int:
    """CPU time of a thread of this process, in nanoseconds."""
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])


def turn(machine: Machine, thread: int) -> float:
    """Nanoseconds an exit over one turn."""
    time.sleep(0.01)  # whatever was switched is switched
    exits, began = machine.vcpus[0].exit_counts()["io"], cpu_ns(thread)
    time.sleep(TURN)
    return (cpu_ns(thread) - began) / (machine.vcpus[0].exit_counts()["io"] - exits)


def main(turns: int) -> None:
    """Print the table."""
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
    print(f"{'':10} {'median':>9} {'least':>9}   ns of CPU an exit, {turns} turns of {TURN} s each")
    for name, each in found.items():
        print(f"{name:10} {median(each):9.0f} {min(each):9.0f}")
    off = found["off"] + found["off again"]
    noise = abs(median(found["off"]) - median(found["off again"])), abs(min(found["off"]) - min(found["off again"]))
    print(f"{'on - off':10} {median(found['on']) - median(off):9.0f} {min(found['on']) - min(off):9.0f}")
    print(f"{'off - off':10} {noise[0]:9.0f} {noise[1]:9.0f}")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
