"""What tracing costs an exit: off and on, by turns, in one run of one machine.

A guest does nothing but write a byte to a port that no device claims, so that the exit is all there is. A turn of a
few milliseconds counts exits and the CPU time of the vCPU's thread (time in which the host ran something else does
not count). A round is off, on, on, off: what changes slowly falls on both alike, and what the two "off" differ by is
what this host cannot tell apart. Of many rounds' differences the median is taken, which a round that was disturbed
does not move, and between which values it lies with 95 % confidence. First trace_event.c measures pyvmm's own part of
it, without KVM.

usage: trace.py [ROUNDS]
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from vmm._ffi import check, lib
from vmm.machine import Machine

ROOT = Path(__file__).resolve().parent.parent
TURN = 0.01  # seconds
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


def turn(machine: Machine, clock: int) -> float:
    """Nanoseconds of the vCPU's CPU time an exit, over one turn."""
    vcpu = machine.vcpus[0]
    time.sleep(0.0005)  # whatever was switched is switched
    exits, began = vcpu.exit_counts()["io"], time.clock_gettime_ns(clock)
    time.sleep(TURN)
    done, ended = vcpu.exit_counts()["io"], time.clock_gettime_ns(clock)
    return float((ended - began) / max(done - exits, 1))


def middle(values: list[float]) -> str:
    """The median, and the order statistics between which that of all such rounds lies with 95 % confidence."""
    ordered, n = sorted(values), len(values)
    half = math.ceil(0.98 * math.sqrt(n))  # 1.96 standard deviations of a binomial(n, 1/2)
    low, high = ordered[max(0, n // 2 - half)], ordered[min(n - 1, n // 2 + half)]
    return f"{median(ordered):8.0f} {f'{low:.0f} to {high:.0f}':>16}"


def main(rounds: int) -> None:
    """Print the table."""
    off_alone, on_alone = without_kvm()
    print(f"in pyvmm alone, least of 20 rounds: off {off_alone:.1f} ns an exit, on {on_alone:.1f} ns an event")
    found: list[list[float]] = []
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(LOOP)
        file.flush()
        with Machine(kernel=file.name, kind="flat", mode="long", memory="16M") as machine:
            machine.start()
            (thread,) = (thread for thread in threading.enumerate() if thread.name == "vcpu0")
            assert thread.ident is not None
            clock = time.pthread_getcpuclockid(thread.ident)
            time.sleep(0.2)
            for _ in range(rounds):
                times = []
                for on, again in itertools.pairwise((None, False, True, True, False)):
                    if on is not again:  # nobody reads: the rings go round
                        check(lib.vmm_trace_start(machine.native, 1 << 12)) if again else lib.vmm_trace_stop(
                            machine.native
                        )
                    times.append(turn(machine, clock))
                found.append(times)
    print(f"ns of CPU an exit, {rounds} rounds of 4 turns of {1000 * TURN:g} ms{'':6} {'median':>8} {'95 %':>16}")
    print(f"{'off':48} {middle([time for first, _, _, last in found for time in (first, last)])}")
    print(f"{'on':48} {middle([time for _, *both, _ in found for time in both])}")
    print(f"{'on, less off in the same round':48} {middle([(b + c - a - d) / 2 for a, b, c, d in found])}")
    print(f"{'off, less the other off of the round':48} {middle([a - d for a, _, _, d in found])}")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
