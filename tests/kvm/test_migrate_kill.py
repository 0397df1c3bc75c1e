"""kill -9 of either side of a migration, at every step and at random moments: one machine runs, or its owner died.

Both sides are processes of their own. Who owns the machine is read from the fence; that nobody else runs it, from what
the processes say that are left, after their guest has checked itself.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from vmm import migrate
from vmm.errors import MigrationError
from vmm.machine import Machine
from vmm.migrate.fence import GIVEN, KEPT, OFFERED, TAKEN, TOKEN, Fence
from vmm.migrate.wire import Channel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = "pages=16 ballast=64 rate=2000 tsc_jump=60000 jump=60000"
PATIENCE = 5.0
TRIES = 60  # beside the hundred of every step
SWEEP = 40  # more steps than either side takes
_SPAWN = multiprocessing.get_context("forkserver")
_SPAWN.set_forkserver_preload(["vmm.machine", "vmm.migrate.source", "vmm.migrate.destination", "vmm.platform"])


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
    outcome = machine.wait(30)
    return "runs" if outcome.code == 0x10 and outcome.reason == "debug-exit" else outcome.reason


def source(pipe: Any, kernel: str, address: str, fence: str, postcopy: bool, step: int | None) -> None:
    with Machine(kernel=kernel, memory="32M", append=WORDS) as machine:
        machine.start()
        machine.console.expect(rb"round 2\n", 30)
        pipe.send("ready")
        pipe.recv()
        die_at(step)
        try:
            machine.migrate(address, fence=fence, postcopy=postcopy, patience=PATIENCE)
            pipe.send("moved")
        except MigrationError as error:
            if select.select([machine.stop_fd], [], [], 0)[0]:
                assert machine.wait().reason == "migrated"
                pipe.send(f"lost: {error}")
            elif error.undecided or machine.paused:
                pipe.send(f"held: {error}")
            else:
                pipe.send(has_passed(machine))


def destination(pipe: Any, address: str, step: int | None) -> None:
    def refused(why: str) -> None:
        raise MigrationError(why)

    with migrate.Receiver(address, patience=PATIENCE, on_refused=refused) as receiver:
        die_at(step)
        pipe.send("ready")
        try:
            machine = receiver.receive(1.5)
        except (MigrationError, TimeoutError) as error:
            pipe.send(f"gave up: {error}")
            return
        with machine:
            pipe.send(has_passed(machine))


class End(NamedTuple):
    """How a try ended: what each side said last ("" if it was killed before), and the fence's record."""

    source: str
    destination: str
    record: bytes


class Try:
    """Two processes and a machine between them."""

    def __init__(self, guest: str, folder: Path, postcopy: bool, steps: tuple[int | None, int | None]) -> None:
        self.fence = folder / "fence"
        address = f"unix:{folder}/there"
        self.pipes, self.processes = [], []
        for target, args in (
            (source, (guest, address, str(self.fence), postcopy, steps[0])),
            (destination, (address, steps[1])),
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
            process.join(60)
            assert not process.is_alive(), self.processes
            said.append("")
            try:
                while pipe.poll():
                    said[-1] = pipe.recv()
            except EOFError:
                pass
            pipe.close()
        record = self.fence.read_bytes() if self.fence.exists() else b""
        return End(said[0], said[1], record[TOKEN:])


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


@pytest.mark.parametrize("postcopy", [False, True], ids=["pre-copy", "post-copy"])
@pytest.mark.parametrize("killed", [0, 1], ids=["source", "destination"])
def test_a_side_is_killed_at_every_step(
    guest: Callable[[str], str], tmp_path: Path, killed: int, postcopy: bool
) -> None:
    records = set()
    for step in range(SWEEP):
        folder = tmp_path / str(step)
        folder.mkdir()
        steps = (step, None) if killed == 0 else (None, step)
        end = Try(guest("self_check"), folder, postcopy, steps).end()
        check(end, killed, postcopy, f"step {step}")
        records.add(end.record)
        if end.source == "moved" and end.destination == "runs":
            break
    else:
        pytest.fail("the sides take more steps than were tried")
    assert TAKEN in records and len(records) > 1, records


@pytest.mark.timeout(400)
def test_a_side_is_killed_at_random_moments(guest: Callable[[str], str], tmp_path: Path) -> None:
    choose = random.Random(5)
    seen = set()
    for number in range(TRIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed, postcopy, delay = choose.randrange(2), choose.random() < 0.4, choose.uniform(0, 0.3)
        tried = Try(guest("self_check"), folder, postcopy, (None, None))
        time.sleep(delay)
        tried.kill(killed)
        end = tried.end()
        check(end, killed, postcopy, f"try {number}: side {killed} after {delay:.3f} s")
        seen.add(end.record)
    assert {OFFERED, TAKEN} <= seen and seen <= {b"", OFFERED, KEPT, TAKEN}
