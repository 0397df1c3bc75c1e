"""Expecting output of a guest: nothing is lost, nothing waits longer than it must; from threads and from asyncio."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from vmm._ffi import lib
from vmm.console.guest_end import OVERLAP, Console, _Search
from vmm.errors import ConfigError, ConsoleTimeout, StateError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    GuestPath = Callable[[str], str]


class Scripted(Console):
    """A console whose output comes in the given pieces, one each time it is asked for; then it is silent."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self.pieces = pieces
        self.ended = False

    def output(self, start: int, size: int = 1 << 16) -> tuple[bytes, int]:
        part = self.pieces.pop(0) if self.pieces else b""
        return part, start + len(part)


class Counted:
    """A compiled pattern that counts the bytes it is made to look at."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.looked_at = 0

    def search(self, text: Any, start: int = 0) -> Any:
        self.looked_at += len(text) - start
        return self.compiled.search(text, start)


def put(console: Console, text: bytes) -> None:
    for byte in text:
        assert lib.vmm_console_put(console.native, byte)


@pytest.mark.parametrize("piece", [1 << 12, 1 << 16])
def test_ten_megabytes_are_searched_in_proportion_to_their_size(piece: int) -> None:
    size = 10 << 20
    line = b"[    1.234567] the same line over and over\n"
    text = (line * (size // len(line) + 1))[: size - 6] + b"login:"
    console = Scripted([text[i : i + piece] for i in range(0, size, piece)])
    search = _Search("login:", console)
    counted = search.compiled = Counted(search.compiled)  # type: ignore[assignment]
    match = search.look()
    assert match
    assert match.end() == size
    # each byte once; again as overlap, at most once a piece; as a whole at each doubling, and in the end
    assert counted.looked_at <= size * (1 + OVERLAP / piece + 2 + 1)


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_match_that_spans_two_reads_is_found(cut: int) -> None:
    filler = b"x" * 100_000
    console = Scripted([filler, filler, b"the log"[:cut], (b"the log" + b"in: ")[cut:]])
    match = _Search("(?:log)in: ", console).look()
    assert match
    assert match.start() == 200_000 + 4


def test_a_match_longer_than_the_overlap_is_found_when_the_guest_falls_silent() -> None:
    console = Scripted([b"BEGIN", b"x" * 200_000, b"END" + b"y" * 10])
    started = time.monotonic()
    match = console.expect(r"BEGIN(x*)END", timeout=60)
    assert len(match[1]) == 200_000
    assert console.position == 200_008
    assert time.monotonic() - started < 30


def test_the_leftmost_match_wins_even_if_a_shorter_one_is_found_first() -> None:
    console = Scripted([b"BEGIN", b"x" * 200_000, b"BEGIN", b"END"])
    match = console.expect(r"(?s)BEGIN.*END", timeout=60)
    assert (match.start(), match.end()) == (0, 200_013)


def test_what_follows_the_match_is_there_for_the_next_expect(guest: GuestPath) -> None:
    with Machine(kernel=guest("hello"), memory="16M") as machine:
        machine.start()
        assert machine.console.expect("Hello from", timeout=120)
        assert machine.console.expect(" long mode\n", timeout=120).start() == 0
        machine.wait(timeout=120)


def test_a_pattern_that_never_comes_times_out_with_the_transcript() -> None:
    console = Console()
    put(console, b"panic: no coffee\n")
    with pytest.raises(ConsoleTimeout, match=r"'login:' within 0\.1 s; .*no coffee") as caught:
        console.expect("login:", timeout=0.1)
    assert caught.value.transcript == b"panic: no coffee\n"
    assert console.expect("coffee")  # nothing was consumed


def test_expecting_more_of_a_machine_that_ends_does_not_wait_for_the_time_limit(guest: GuestPath) -> None:
    with Machine(kernel=guest("hello"), memory="16M") as machine:
        machine.start()
        started = time.monotonic()
        with pytest.raises(ConsoleTimeout, match="before the machine ended"):
            machine.console.expect("login:", timeout=60)
        assert time.monotonic() - started < 30


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        Console().expect("(")


def test_a_machine_that_is_started_again_prints_again(tmp_path: Path) -> None:
    # mov dx, 0x3f8; mov al, 'A'; 1: out dx, al; jmp 1b
    (tmp_path / "print.bin").write_bytes(bytes.fromhex("66baf803 b041 ee ebfd"))
    with Machine(kernel=str(tmp_path / "print.bin"), kind="flat", mode="long", memory="16M") as machine:
        for _ in range(2):
            machine.start()
            machine.console.expect("A", timeout=120)
            machine.stop()
            machine.console.read()
            with pytest.raises(ConsoleTimeout, match="before the machine ended"):
                machine.console.expect("A", timeout=120)


# ---- asyncio ----


def test_two_machines_are_waited_for_at_once_in_one_event_loop(guest: GuestPath) -> None:
    async def run(machine: Machine) -> int:
        machine.start()
        assert await machine.console.expect_async("long mode", timeout=10)
        return (await machine.wait_async(timeout=10)).status

    async def both(*machines: Machine) -> list[int]:
        return await asyncio.gather(*(run(machine) for machine in machines))

    with (
        Machine(kernel=guest("hello"), memory="16M") as first,
        Machine(kernel=guest("hello"), memory="16M") as second,
    ):
        assert asyncio.run(both(first, second)) == [33, 33]


def test_the_event_loop_goes_on_while_a_machine_is_waited_for(guest: GuestPath) -> None:
    async def scenario(machine: Machine) -> str:
        machine.start()
        waiting = [asyncio.create_task(machine.wait_async()) for _ in range(2)]
        await asyncio.sleep(0.01)  # the guest never ends: only because this loop goes on does it get this far
        machine.interrupt(0)
        first, second = await asyncio.gather(*waiting)
        assert first is second
        return first.reason

    with Machine(kernel=guest("spin"), memory="16M") as machine:
        assert asyncio.run(scenario(machine)) == "stopped"


def test_waiting_in_asyncio_has_a_time_limit(guest: GuestPath) -> None:
    with Machine(kernel=guest("spin"), memory="16M") as machine:
        machine.start()
        assert asyncio.run(machine.wait_async(timeout=0.05)).reason == "timeout"


def test_a_cancelled_wait_leaves_the_machine_running(guest: GuestPath) -> None:
    async def scenario(machine: Machine) -> None:
        machine.start()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(machine.wait_async(), 0.05)

    with Machine(kernel=guest("spin"), memory="16M") as machine:
        asyncio.run(scenario(machine))
        assert machine.outcome is None
        assert machine.stop().reason == "stopped"


def test_waiting_for_a_machine_that_was_not_started_is_refused(guest: GuestPath) -> None:
    with Machine(kernel=guest("spin"), memory="16M") as machine, pytest.raises(StateError, match="not started"):
        asyncio.run(machine.wait_async())


def test_expecting_in_asyncio_times_out_and_notices_the_end(guest: GuestPath) -> None:
    console = Console()
    put(console, b"no coffee")
    with pytest.raises(ConsoleTimeout, match=r"within 0\.05 s"):
        asyncio.run(console.expect_async("login:", timeout=0.05))

    async def scenario(machine: Machine) -> None:
        machine.start()
        with pytest.raises(ConsoleTimeout, match="before the machine ended"):
            await machine.console.expect_async("login:", timeout=60)
        await machine.wait_async()

    with Machine(kernel=guest("hello"), memory="16M") as machine:
        asyncio.run(scenario(machine))


def test_output_that_comes_later_wakes_the_task() -> None:
    async def scenario(console: Console) -> bytes:
        task = asyncio.create_task(console.expect_async("(a.*z)", timeout=60))
        for byte in b"..a..z":
            await asyncio.sleep(0.005)
            put(console, bytes([byte]))
        return (await task)[1]

    assert asyncio.run(scenario(Console())) == b"a..z"
