"""The user-space i8254: counters by the clock, ticks by the thread."""

from __future__ import annotations

import threading

import pytest

from vmm.devices.i8254 import HZ, NS
from vmm.devices.pit import Pit
from vmm.testing.fakes import FakeLine

MS = 1_000_000


class Rig:
    """A PIT on a clock that stands until :meth:`advance`."""

    def __init__(self, min_period: float = 0.0) -> None:
        self.now = 7 * NS
        self.pit = Pit(min_period, clock=lambda: self.now)
        self.line = self.pit.line = FakeLine()

    def program(self, channel: int, mode: int, count: int, bcd: int = 0) -> None:
        self.pit.write(3, 1, channel << 6 | 0x30 | mode << 1 | bcd)
        self.pit.write(channel, 1, count & 0xFF)
        self.pit.write(channel, 1, count >> 8)

    def read(self, channel: int) -> int:
        return self.pit.read(channel, 1) | self.pit.read(channel, 1) << 8

    def ticks(self, n: int) -> None:
        self.now += -(-n * NS // HZ)

    def run_until(self, end: int) -> int:
        """Service whenever due until ``end`` (ns); how often the line rose."""
        before = self.line.edges
        while (wait := self.pit.service()) is not None and self.now + wait * NS <= end:
            self.now += max(round(wait * NS), 1)
        self.now = end
        return self.line.edges - before


@pytest.mark.parametrize(
    ("mode", "ticks", "count"),
    [(0, 100, 900), (0, 1001, 0xFFFF), (2, 100, 900), (2, 1001, 999), (3, 100, 800), (3, 501, 998), (4, 999, 1)],
)
def test_counts_as_its_mode_says(mode: int, ticks: int, count: int) -> None:
    rig = Rig()
    rig.program(0, mode, 1000)
    rig.ticks(ticks)
    assert rig.read(0) == count


def test_zero_counts_65536_and_bcd_counts_in_decimal() -> None:
    rig = Rig()
    rig.program(0, 2, 0)
    rig.ticks(1)
    assert rig.read(0) == 0xFFFF
    rig.program(0, 2, 0x1000, bcd=1)
    rig.ticks(1)
    assert rig.read(0) == 0x0999


def test_a_latched_count_stands_until_read_and_then_the_count_runs_on() -> None:
    rig = Rig()
    rig.program(0, 2, 1000)
    rig.ticks(10)
    rig.pit.write(3, 1, 0x00)
    rig.ticks(10)
    rig.pit.write(3, 1, 0x00)
    assert [rig.read(0), rig.read(0)] == [990, 980]


def test_single_byte_access_modes() -> None:
    rig = Rig()
    rig.pit.write(3, 1, 0x14)  # channel 0, low byte, mode 2
    rig.pit.write(0, 1, 200)
    rig.ticks(1)
    assert [rig.pit.read(0, 1), rig.pit.read(0, 1)] == [199, 199]
    rig.pit.write(3, 1, 0x24)  # high byte
    rig.pit.write(0, 1, 2)
    rig.ticks(1)
    assert rig.pit.read(0, 1) == 1


def test_read_back_gives_status_then_count_of_the_channels_chosen() -> None:
    rig = Rig()
    rig.pit.write(3, 1, 0x30)
    rig.pit.write(3, 1, 0xE2)  # status of channel 0
    assert rig.pit.read(0, 1) == 0x70, "null count, output low, both bytes, mode 0"
    rig.program(0, 0, 100)
    rig.ticks(100)
    rig.pit.write(3, 1, 0xC2)
    assert [rig.pit.read(0, 1), rig.pit.read(0, 1), rig.pit.read(0, 1)] == [0xB0, 0, 0]


def test_channel_2_is_gated_and_seen_through_port_61() -> None:
    """As Linux's pit_calibrate_tsc(): gate up, mode 0, wait for the output."""
    rig = Rig()
    rig.program(2, 0, 1000)
    rig.ticks(5000)
    assert (rig.pit.read(0x21, 1) & 0x20, rig.read(2)) == (0, 1000)
    rig.pit.write(0x21, 1, 0x01)
    rig.ticks(400)
    rig.pit.write(0x21, 1, 0x00)
    rig.ticks(5000)
    assert rig.read(2) == 600
    rig.pit.write(0x21, 1, 0x01)
    rig.ticks(599)
    assert not rig.pit.read(0x21, 1) & 0x20
    rig.ticks(1)
    assert rig.pit.read(0x21, 1) & 0x21 == 0x21


def test_refresh_toggle_toggles() -> None:
    rig = Rig()
    seen = set()
    for _ in range(4):
        seen.add(rig.pit.read(0x21, 1) & 0x10)
        rig.now += 15_085
    assert seen == {0, 0x10}


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_modes_tick_at_the_rate_programmed(mode: int) -> None:
    rig = Rig()
    rig.program(0, mode, 11932)  # 100 Hz
    assert rig.run_until(rig.now + 1005 * MS) == 100


@pytest.mark.parametrize("mode", [0, 4])
def test_one_shots_tick_once_per_count_written(mode: int) -> None:
    rig = Rig()
    rig.program(0, mode, 1193)
    assert rig.run_until(rig.now + 50 * MS) == 1
    rig.pit.write(0, 1, 0xFF)
    rig.pit.write(0, 1, 0x04)
    assert rig.run_until(rig.now + 50 * MS) == 1


def test_ticks_closer_than_min_period_are_merged() -> None:
    rig = Rig(min_period=0.02)
    rig.program(0, 2, 1193)  # 1 kHz
    assert 49 <= rig.run_until(rig.now + 1000 * MS) <= 50


def test_a_late_service_merges_what_it_missed() -> None:
    rig = Rig()
    rig.program(0, 2, 11932)
    rig.now += 1000 * MS
    assert rig.pit.service()
    assert rig.line.edges == 1


def test_a_guest_cannot_buy_a_host_cpu_with_a_reload_of_one() -> None:
    rig = Rig()
    rig.program(0, 2, 1)
    assert rig.run_until(rig.now + 100 * MS) <= 501


def test_nothing_ticks_before_programming_nor_after_reset() -> None:
    rig = Rig()
    assert rig.pit.service() is None
    rig.program(0, 2, 1193)
    rig.pit.write(3, 1, 0x34)  # a control word alone stops the counter
    assert rig.pit.service() is None
    rig.program(0, 2, 1193)
    rig.pit.reset()
    assert rig.pit.service() is None
    assert rig.line.levels == []


def test_a_tick_due_when_saved_is_delivered_once_after_loading() -> None:
    rig, other = Rig(), Rig()
    rig.program(0, 4, 1193)
    rig.now += 5 * MS
    other.pit.load(rig.pit.save())
    assert other.run_until(other.now + 50 * MS) == 1
    third = Rig()
    third.pit.load(other.pit.save())
    assert third.run_until(third.now + 50 * MS) == 0


def test_a_tick_that_falls_due_while_held_comes_after_release() -> None:
    rig = Rig()
    rig.program(0, 4, 1193)
    rig.pit.hold()
    rig.now += 5 * MS
    assert rig.pit.service() is None
    assert rig.line.edges == 0
    rig.pit.release()
    assert rig.run_until(rig.now + MS) == 1


class Counting(FakeLine):
    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def pulse(self) -> None:
        super().pulse()
        if self.edges >= 5:
            self.came.set()


def test_the_thread_wakes_for_what_is_programmed_after_it_fell_asleep_and_stops() -> None:
    pit = Pit()
    line = pit.line = Counting()
    asleep, wait = threading.Event(), pit._changed.wait

    def sleep(timeout: float | None = None) -> bool:
        asleep.set()  # with the lock held, which wait gives up: what is programmed from here on finds it asleep
        return wait(timeout)

    pit._changed.wait = sleep  # type: ignore[method-assign]
    pit.start()
    thread = pit._thread
    assert thread is not None
    pit.start()
    assert pit._thread is thread
    try:
        assert asleep.wait(60)
        pit.write(3, 1, 0x34)
        pit.write(0, 1, 0xA9)
        pit.write(0, 1, 0x04)  # 1 kHz
        assert line.came.wait(60)
    finally:
        pit.stop()
    assert not thread.is_alive()
    pit.stop()
