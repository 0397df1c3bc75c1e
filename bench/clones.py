"""What clones cost: time from the call to their first instruction, and memory.

usage: clones.py [--linux] [--count N] [--pages N]

Without --linux the guest is a loop that counts, with --pages pages of memory in use. With it: a booted Linux of 128 MiB
(the small kernel), whose clones each take their name and run one command.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

from memory import guest_bytes, own_bytes

from vmm.machine import Machine

MIB = 1 << 20
COUNT = 0x200000
SPIN = bytes.fromhex("ff042500002000ebf7")  # again: inc dword [0x200000]; jmp again


def counted(machine: Machine) -> int:
    """How often the loop went round."""
    return int.from_bytes(machine.memory.read(COUNT, 4), "little")


def first_instructions(original: Machine, count: int) -> None:
    """Print how long one clone takes, ``count`` times, each closed again."""
    made, ran = [], []
    for _ in range(count):
        begun = time.perf_counter()
        [clone] = original.clone()
        made.append(time.perf_counter() - begun)
        before = counted(clone)
        clone.start()
        while counted(clone) == before:
            pass
        ran.append(time.perf_counter() - begun)
        clone.close()
    for what, times in (("made", made), ("first instruction", ran)):
        best, median = 1000 * min(times), 1000 * statistics.median(times)
        print(f"{what:20} {best:8.1f} ms best, {median:8.1f} ms median of {count}")


def bare(count: int, pages: int) -> None:
    """A loop that counts."""
    with tempfile.TemporaryDirectory() as folder:
        image = os.path.join(folder, "spin.bin")
        with open(image, "wb") as file:
            file.write(SPIN)
        with Machine(kernel=image, kind="flat", mode="long", memory="512M") as original:
            for page in range(pages):
                original.memory.write(4 * MIB + page * 4096, b"in use")
            original.start()
            first_instructions(original, count)
            original.pause()  # or clones are of a machine that has changed
            alone = guest_bytes("self"), own_bytes("self")[0]
            begun = time.perf_counter()
            clones = original.clone(count)
            print(f"{f'{count} at once':20} {1000 * (time.perf_counter() - begun) / count:8.1f} ms for each")
            then = counted(original)
            for clone in clones:
                clone.start()
                while counted(clone) == then:
                    pass
            memory(alone, (guest_bytes("self"), own_bytes("self")[0]), count)
            for clone in clones:
                clone.close()


def linux(count: int) -> None:
    """A booted Linux."""
    from vmm.linux.kernel import small_kernel
    from vmm.testing.linux import LinuxGuest

    original = LinuxGuest(kernel=str(small_kernel().bzimage), memory="128M")
    original.run("true", timeout=300)
    alone = guest_bytes("self"), own_bytes("self")[0]
    begun = time.perf_counter()
    clones = original.clone(count)
    print(f"{count} clones named and asked one after the other: {time.perf_counter() - begun:.1f} s")
    memory(alone, (guest_bytes("self"), own_bytes("self")[0]), count)
    for guest in (original, *clones):
        guest.close()


def memory(alone: tuple[int, int], together: tuple[int, int], count: int) -> None:
    """Print guest memory and the monitor's own, before and after."""
    for what, before, after in zip(("guest memory", "the monitor"), alone, together, strict=True):
        each = (after - before) / count
        print(
            f"{what:20} {before / MIB:8.1f} MiB alone, {after / MIB:8.1f} MiB with {count} clones: "
            f"{after / before:.2f} times as much, {each / MIB:.2f} MiB a clone"
        )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--linux", action="store_true", help="a booted Linux guest")
    parser.add_argument("--count", type=int, default=10, help="clones (default: %(default)s)")
    parser.add_argument("--pages", type=int, default=8192, help="pages in use without --linux (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.linux:
        linux(arguments.count)
    else:
        bare(arguments.count, arguments.pages)


if __name__ == "__main__":
    main()
