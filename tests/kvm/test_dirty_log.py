"""Which pages change: the guest's writes, the monitor's, and each log's own idea of what is clean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine import Machine
    from vmm.memory import DirtyLog

EXIT = bytes.fromhex("b010e6f4")  # mov al, 16; out 0xf4, al
FIRST, SECOND = 0x300000, 0x305008


def store(address: int, value: int = 1) -> bytes:
    """mov dword [address], value"""
    return b"\xc7\x04\x25" + address.to_bytes(4, "little") + value.to_bytes(4, "little")


def test_a_log_has_the_pages_the_guest_wrote_and_no_other_of_the_heap(flat: Callable[..., Machine]) -> None:
    machine = flat(store(FIRST) + store(FIRST + 8) + store(SECOND) + EXIT)
    machine.load()
    log = machine.memory.dirty_log()
    machine.run(10)
    assert log.collect() >= 2
    ranges = [span for span in log.take() if span[0] >= FIRST]
    assert ranges == [(FIRST, PAGE), (SECOND & -PAGE, PAGE)]
    log.close()


def test_what_was_taken_is_clean_until_it_is_written_again(flat: Callable[..., Machine]) -> None:
    machine = flat(store(FIRST) + EXIT)
    machine.load()
    log = machine.memory.dirty_log()
    machine.run(10)
    log.collect()
    log.take()
    assert log.collect() == 0
    machine.memory.write(SECOND, b"monitor")
    assert log.collect() == 1
    assert log.take() == [(SECOND & -PAGE, PAGE)]
    log.close()


def test_each_log_misses_nothing_whoever_fetches(flat: Callable[..., Machine]) -> None:
    machine = flat(store(FIRST) + EXIT)
    machine.load()
    early = machine.memory.dirty_log()
    machine.memory.write(SECOND, b"before the second log")
    late = machine.memory.dirty_log()
    machine.run(10)
    late.collect()
    assert FIRST in _pages(late)
    early.collect()
    early_pages = set(_pages(early))
    assert {FIRST, SECOND & -PAGE} <= early_pages
    assert late.collect() == 0
    late.close()
    machine.memory.write(FIRST + 0x10000 - 2, b"over a page's end")
    early.collect()
    assert early.take() == [(FIRST + 0xF000, 2 * PAGE)]
    early.close()


def _pages(log: DirtyLog) -> list[int]:
    return [page for gpa, size in log.take() for page in range(gpa, gpa + size, PAGE)]


def test_a_read_is_no_write_and_a_view_is_one(flat: Callable[..., Machine]) -> None:
    machine = flat(EXIT)
    machine.load()
    log = machine.memory.dirty_log()
    machine.memory.read(FIRST, 64)
    assert log.collect() == 0
    view = machine.memory.view(FIRST, 64)
    assert log.collect() == 1
    log.take()
    view[0] = 1
    assert log.collect() == 0
    machine.memory.wrote(FIRST, 1)
    assert log.collect() == 1
    log.close()


def test_the_last_log_closed_stops_the_logging_and_another_starts_clean(flat: Callable[..., Machine]) -> None:
    machine = flat(store(FIRST) + EXIT)
    machine.load()
    machine.memory.dirty_log().close()
    machine.memory.write(SECOND, b"nobody looks")
    log = machine.memory.dirty_log()
    assert log.collect() == 0
    machine.run(10)
    log.collect()
    assert (FIRST, PAGE) in log.take()
    log.close()
    log.close()
