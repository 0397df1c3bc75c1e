"""kill -9 of either side of a migration, at every step and at random moments: one machine runs, or its owner died.

Both sides are processes of their own. Who owns the machine is read from the fence; that nobody else runs it, from what
the processes say that are left, after their guest has checked itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import select
import signal
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from processors import is_tcg

from vmm import migrate
from vmm.errors import MigrationError
from vmm.machine import Machine
from vmm.migrate.fence import GIVEN, KEPT, OFFERED, TAKEN, TOKEN, Fence
from vmm.migrate.wire import Channel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 1 << 20
BLOCKS = 12
DISK_WORDS = f"sectors={SIZE // 512} blocks={BLOCKS} rounds=0"
WORDS = "pages=16 ballast=64 rate=2000 tsc_jump=60000 jump=60000"
PATIENCE = 5.0
BUSY = 120.0  # seconds for what takes one on an idle host
# Every step and sixty moments; where the processor is emulated a try takes ten seconds, and a fifth of them is enough:
# which step it was is no affair of the host's.
STRIDE, TRIES = (5, 12) if is_tcg() else (1, 60)
SWEEP = 150  # more steps than either side takes
_SPAWN = multiprocessing.get_context("forkserver")
_SPAWN.set_forkserver_preload(
    ["vmm.machine", "vmm.migrate.source", "vmm.migrate.destination", "vmm.machine.standard_devices"]
)


def die_at(step: int | None) -> None:
    """Have this process killed at its step of this number: a frame sent or received, a word of the fence."""
    if step is None:
        return
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)

        return counting

    for cls, names in ((Channel, ("send", "receive")), (Fence, ("keep", "give", "take", "lock_within"))):
        for name in names:
            setattr(cls, name, counted(getattr(cls, name)))


def has_passed(machine: Machine) -> str:
    machine.console.send(b"q")
    outcome = machine.wait(BUSY)
    if outcome.code != 0x10 or outcome.reason != "debug-exit":
        return outcome.reason
    return "runs" if all(holds_the_last_round(machine, disk.path) for disk in machine.config.disks) else "other bytes"


def holds_the_last_round(machine: Machine, image: str) -> bool:
    """Whether the file is what blk_rw wrote in the end."""
    last = int(machine.console.tail().rpartition(b"round ")[2].split()[0])
    with open(image, "rb") as file:
        data = file.read()
    written = {
        block: struct.pack("<512Q", *((last << 48 | block << 32) + n for n in range(512)))
        for block in range(0, BLOCKS, 3)
    }
    return len(data) == SIZE and all(
        data[block * 4096 :][:4096] == written.get(block, b"\x11" * 4096) for block in range(SIZE // 4096)
    )


def source(
    pipe: Any, kernel: str, address: str, fence: str, postcopy: bool, image: str | None, step: int | None
) -> None:
    words, disks = (DISK_WORDS, [image]) if image else (WORDS, [])
    with Machine(kernel=kernel, memory="32M", append=words, disks=disks) as machine:
        machine.start()
        machine.console.expect(rb"round 2\n", BUSY)
        pipe.send("ready")
        pipe.recv()
        die_at(step)
        try:
            machine.migrate(address, fence=fence, postcopy=postcopy, patience=PATIENCE, mirror=bool(image))
            pipe.send("moved")
        except MigrationError as error:
            if select.select([machine.stop_fd], [], [], 0)[0]:
                assert machine.wait().reason == "migrated"
                pipe.send(f"lost: {error}")
            elif error.undecided or machine.paused:
                pipe.send(f"held: {error}")
            else:
                pipe.send(has_passed(machine))


def arrived(receiver: migrate.Receiver, pipe: Any) -> Machine:
    """The machine that comes. Raises ``TimeoutError`` once the source is known to have ended without."""
    while True:
        over = pipe.poll()  # before the look for a connection: what it had made until then is found
        try:
            return receiver.receive(0.5)
        except TimeoutError:
            if over:
                raise


def destination(pipe: Any, address: str, directory: str | None, step: int | None) -> None:
    def refused(why: str) -> None:
        raise MigrationError(why)

    with migrate.Receiver(address, patience=PATIENCE, on_refused=refused, disks_in=directory) as receiver:
        die_at(step)
        pipe.send("ready")
        try:
            machine = arrived(receiver, pipe)
        except (MigrationError, TimeoutError) as error:
            pipe.send(f"gave up: {error}")
            return
        with machine:
            pipe.send(has_passed(machine))


class End(NamedTuple):
    """How a try ended: what each side said last ("" if it was killed before), the fence's record, and the files that
    were made there."""

    source: str
    destination: str
    record: bytes
    files: list[str]


class Try:
    """Two processes and a machine between them. ``mirror``: with a disk, which its guest writes."""

    def __init__(
        self,
        guest: Callable[[str], str],
        folder: Path,
        postcopy: bool,
        steps: tuple[int | None, int | None],
        mirror: bool = False,
    ) -> None:
        self.fence = folder / "fence"
        self.directory = folder / "images"
        self.directory.mkdir()
        image = folder / "disk.img"
        if mirror:
            image.write_bytes(b"\x11" * SIZE)
        address = f"unix:{folder}/there"
        kernel = guest("blk_rw" if mirror else "self_check")
        self.pipes, self.processes = [], []
        for target, args in (
            (source, (kernel, address, str(self.fence), postcopy, str(image) if mirror else None, steps[0])),
            (destination, (address, str(self.directory) if mirror else None, steps[1])),
        ):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=target, args=(theirs, *args), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.recv() == "ready"
        self.pipes[0].send("go")

    def kill(self, which: int) -> None:
        self.processes[which].kill()

    def end(self) -> End:
        said = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            process.join(2 * BUSY)
            assert not process.is_alive(), self.processes
            with contextlib.suppress(OSError):  # which may have ended, too
                self.pipes[1].send("the source has ended")
            said.append("")
            try:
                while pipe.poll():
                    said[-1] = pipe.recv()
            except (EOFError, ConnectionResetError):  # the latter of one that did not read that word
                pass
            pipe.close()
        record = self.fence.read_bytes() if self.fence.exists() else b""
        return End(said[0], said[1], record[TOKEN:], os.listdir(self.directory))


def is_right(end: End, killed: int, postcopy: bool) -> bool:
    """Whether no machine is doubled or held, and one is lost only with its owner, or with its pages' owner."""
    taken = end.record == TAKEN
    if end.source == end.destination == "runs" or end.source.startswith("held"):
        return False
    if killed == 0 and taken:
        return end.destination == "runs" or (postcopy and end.destination == "memory-lost")
    if killed == 0:  # it had not been given away; or it had, and the pages that were to follow died
        return end.destination.startswith("gave up") and end.record in (b"", OFFERED, *([GIVEN] if postcopy else []))
    if taken:
        return end.source.startswith(("moved", "lost"))
    return end.source == "runs" and end.record in (b"", KEPT)


def check(end: End, killed: int, postcopy: bool, what: str) -> None:
    if end.source == "moved" and end.destination == "runs":  # over before the kill
        assert end.record == TAKEN, (what, end)
        return
    assert is_right(end, killed, postcopy), (what, end)
    if end.destination.startswith("gave up"):
        assert not end.files, (what, end)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("postcopy", "mirror"),
    [
        pytest.param(False, False, id="pre-copy"),
        pytest.param(True, False, id="post-copy"),
        pytest.param(False, True, id="pre-copy with a disk"),
        pytest.param(True, True, id="post-copy with a disk", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("killed", [0, 1], ids=["source", "destination"])
def test_a_side_is_killed_at_every_step(
    guest: Callable[[str], str], tmp_path: Path, killed: int, postcopy: bool, mirror: bool
) -> None:
    records = set()
    for step in range(0, SWEEP, STRIDE):
        folder = tmp_path / str(step)
        folder.mkdir()
        steps = (step, None) if killed == 0 else (None, step)
        end = Try(guest, folder, postcopy, steps, mirror).end()
        check(end, killed, postcopy, f"step {step}")
        records.add(end.record)
        if end.source == "moved" and end.destination == "runs":
            break
    else:
        pytest.fail("the sides take more steps than were tried")
    assert TAKEN in records and len(records) > 1, records


@pytest.mark.timeout(900)
def test_a_side_is_killed_at_random_moments(guest: Callable[[str], str], tmp_path: Path) -> None:
    choose = random.Random(5)
    seen: set[Any] = set()
    for number in range(5 * TRIES):  # how soon a move is over is the host's affair
        if number >= TRIES and {OFFERED, TAKEN} <= seen:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        killed, postcopy, delay = (
            choose.randrange(2),
            choose.random() < 0.4,
            choose.uniform(0, 0.3 * (1 + number // TRIES)),
        )
        tried = Try(guest, folder, postcopy, (None, None), mirror=number % 3 == 0)
        time.sleep(delay)
        tried.kill(killed)
        end = tried.end()
        check(end, killed, postcopy, f"try {number}: side {killed} after {delay:.3f} s")
        seen.add(end.record)
    assert {OFFERED, TAKEN} <= seen and seen <= {b"", OFFERED, KEPT, TAKEN}
