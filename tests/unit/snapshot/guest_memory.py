"""Memory for snapshots, without a machine: two regions on memfds, most of it never touched."""

from __future__ import annotations

import mmap
import os
import random
from typing import TYPE_CHECKING

from vmm.snapshot import Ram

if TYPE_CHECKING:
    from vmm.snapshot import Snapshot

PAGE = 4096
LAYOUT = [(0, 2 << 20), (4 << 30, 1 << 20)]
STATE = {"version": 1, "vcpus": [{"rip": 2**64 - 1, "xsave": bytes(range(256)) * 4}], "name": "machine"}


class Memory:
    """``ram`` is what :func:`vmm.snapshot.write` takes; ``write`` stores bytes and remembers the run."""

    def __init__(self, layout: list[tuple[int, int]] = LAYOUT) -> None:
        self.ram = []
        self.dirty: list[tuple[int, int]] = []
        for gpa, size in layout:
            fd = os.memfd_create("test-memory")
            os.ftruncate(fd, size)
            self.ram.append(Ram(gpa, size, memoryview(mmap.mmap(fd, size)), fd))

    def write(self, gpa: int, content: bytes) -> None:
        for ram in self.ram:
            if ram.gpa <= gpa < ram.gpa + ram.size:
                ram.view[gpa - ram.gpa : gpa - ram.gpa + len(content)] = content
                self.dirty.append((gpa // PAGE * PAGE, PAGE * -(-(gpa % PAGE + len(content)) // PAGE)))
                return
        raise AssertionError(f"{gpa:#x} is no memory")

    def scatter(self, seed: int, pages: int) -> None:
        """Random content on that many pages, here and there; each page once."""
        chance = random.Random(seed)
        everywhere = [ram.gpa + at for ram in self.ram for at in range(0, ram.size, PAGE)]
        for gpa in chance.sample(everywhere, pages):
            self.write(gpa, chance.randbytes(PAGE))

    def content(self) -> bytes:
        return b"".join(ram.view for ram in self.ram)

    def allocated(self) -> int:
        """Bytes that the host has for it."""
        return sum(os.fstat(ram.fd).st_blocks * 512 for ram in self.ram)

    def close(self) -> None:
        for ram in self.ram:
            ram.view.release()
            os.close(ram.fd)


def content_of(snapshot: Snapshot) -> bytes:
    """All of a snapshot's memory, as a restored machine has it: the full one's file, and the others laid over it."""
    mapped = memoryview(mmap.mmap(snapshot.layers[0].memory_fd, snapshot.size, mmap.MAP_PRIVATE))
    by_gpa = {region.gpa: mapped[region.offset : region.offset + region.size] for region in snapshot.regions}
    snapshot.overlay(lambda gpa, size: by_gpa[gpa])
    return bytes(mapped)
