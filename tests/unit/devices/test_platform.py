"""RTC, i8042, ACPI fixed hardware, debug exit, POST, pvpanic: what a guest relies on."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices.acpi_pm import PM_TIMER_HZ, PmTimer, PowerManagement, ResetRegister
from vmm.devices.debug_exit import DebugExit
from vmm.devices.i8042 import I8042
from vmm.devices.post import Post
from vmm.devices.pvpanic import Pvpanic
from vmm.devices.rtc import Rtc, seconds_since_1970
from vmm.testing.fakes import FakeLine

# -- rtc -----------------------------------------------------------------------------------------------------------

WHEN = datetime(2031, 12, 28, 23, 59, 58, tzinfo=UTC)  # a Sunday
TIME = (0, 2, 4, 6, 7, 8, 9, 0x32)


def cmos(rtc: Rtc, at: int) -> int:
    rtc.write(0, 1, at)
    return rtc.read(1, 1)


def set_cmos(rtc: Rtc, at: int, value: int) -> None:
    rtc.write(0, 1, at)
    rtc.write(1, 1, value)


def test_rtc_tells_the_hosts_time_in_bcd() -> None:
    rtc = Rtc(WHEN.timestamp)
    assert [cmos(rtc, at) for at in TIME] == [0x58, 0x59, 0x23, 1, 0x28, 0x12, 0x31, 0x20]
    assert (cmos(rtc, 0x0A), cmos(rtc, 0x0B), cmos(rtc, 0x0C), cmos(rtc, 0x0D)) == (0x26, 0x02, 0, 0x80)


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_rtc_twelve_hour_clock(hour: int, shown: int) -> None:
    rtc = Rtc(WHEN.replace(hour=hour).timestamp)
    set_cmos(rtc, 0x0B, 0)
    assert cmos(rtc, 4) == shown
    set_cmos(rtc, 4, shown)
    set_cmos(rtc, 0x0B, 2)
    assert int(f"{cmos(rtc, 4):x}") == hour


def test_rtc_binary_mode() -> None:
    rtc = Rtc(WHEN.timestamp)
    set_cmos(rtc, 0x0B, 6)
    assert [cmos(rtc, at) for at in TIME] == [58, 59, 23, 1, 28, 12, 31, 20]


@pytest.mark.parametrize("mode", [0x02, 0x06])
def test_rtc_takes_any_bytes_for_a_date(mode: int) -> None:
    rtc = Rtc(WHEN.timestamp)
    set_cmos(rtc, 0x0B, mode)
    for at in TIME:
        for byte in (0xFF, 0x00, 0x9A):
            set_cmos(rtc, at, byte)
            shown = [cmos(rtc, each) for each in TIME]
            assert all(value < 100 if mode == 0x06 else f"{value:02x}".isdigit() for value in shown)
            Rtc(WHEN.timestamp).load(rtc.save())


def test_rtc_before_the_year_zero_shows_four_digits() -> None:
    rtc = Rtc(lambda: -70_000_000_000.0)
    assert all(f"{cmos(rtc, at):02x}".isdigit() for at in TIME)


def test_rtc_set_by_the_guest_goes_on_from_there() -> None:
    now = WHEN.timestamp()
    rtc = Rtc(lambda: now)
    set_cmos(rtc, 0x0B, 0x82)  # SET: the guest holds the time while it changes it
    now += 5
    assert cmos(rtc, 0) == 0x58
    for at, value in zip(TIME, (0x30, 0x15, 0x06, 2, 0x29, 0x02, 0x24, 0x20), strict=True):
        set_cmos(rtc, at, value)
    set_cmos(rtc, 0x0B, 0x02)
    now += 45
    assert [cmos(rtc, at) for at in TIME] == [0x15, 0x16, 0x06, 5, 0x29, 0x02, 0x24, 0x20]
    state = rtc.save()
    other = Rtc(lambda: now)
    other.load(state)
    assert cmos(other, 9) == 0x24


def test_rtc_goes_by_the_host_when_loaded_and_on_from_then_when_restored_or_set_back() -> None:
    now = [WHEN.timestamp() + 0.25]
    rtc = Rtc(lambda: now[0])
    assert cmos(rtc, 0) == 0x58
    state, captured = rtc.save(), rtc.capture()
    now[0] += 3600.5
    rtc.roll_back(captured)
    assert (cmos(rtc, 4), cmos(rtc, 0)) == (0x23, 0x58)
    now[0] += 0.75  # its seconds are whole where they were, not where the host's are
    assert cmos(rtc, 0) == 0x59
    behind = rtc.save()
    assert (behind["ahead"], behind["behind"], behind["fraction"]) == (0, 3601, 5 * 10**8)
    rtc.load(state)
    assert (cmos(rtc, 4), cmos(rtc, 2), cmos(rtc, 0)) == (0x00, 0x59, 0x59)
    rtc.set_back(3600 * 10**9)
    assert (cmos(rtc, 4), cmos(rtc, 2)) == (0x23, 0x59)
    other = Rtc(lambda: now[0])
    other.load(behind)
    assert other.save() == behind


def test_rtc_index_keeps_the_nmi_mask_out_of_the_address_and_memory_is_remembered() -> None:
    rtc = Rtc(WHEN.timestamp, memory=3 << 30)
    set_cmos(rtc, 0x80 | 0x40, 0xA5)
    assert cmos(rtc, 0x40) == 0xA5
    rtc.reset()
    assert cmos(rtc, 0x40) == 0xA5
    assert cmos(rtc, 0x15) | cmos(rtc, 0x16) << 8 == 640
    assert cmos(rtc, 0x30) | cmos(rtc, 0x31) << 8 == 0xFFFF
    assert cmos(rtc, 0x34) | cmos(rtc, 0x35) << 8 == ((3 << 30) - (16 << 20)) >> 16


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))
def test_date_arithmetic_is_the_standard_librarys(when: datetime) -> None:
    got = seconds_since_1970(when.year, when.month, when.day, when.hour, when.minute, when.second)
    assert got == calendar.timegm(when.timetuple())


# -- i8042 ---------------------------------------------------------------------------------------------------------


class Keyboard:
    def __init__(self) -> None:
        self.resets = 0
        self.chip = I8042(self.reset)
        self.line = self.chip.line = FakeLine()

    def reset(self) -> None:
        self.resets += 1

    def command(self, command: int, *parameters: int) -> None:
        self.chip.write(4, 1, command)
        for parameter in parameters:
            self.chip.write(0, 1, parameter)

    def answer(self) -> int | None:
        return self.chip.read(0, 1) if self.chip.read(4, 1) & 1 else None


def test_i8042_self_test_and_port_tests_find_no_second_port() -> None:
    keyboard = Keyboard()
    for command, answer in ((0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x01)):
        keyboard.command(command)
        assert [keyboard.answer(), keyboard.answer()] == [answer, None]


def test_i8042_command_byte_is_remembered_and_port_commands_change_it() -> None:
    keyboard = Keyboard()
    keyboard.command(0x60, 0x74)
    keyboard.command(0xAE)
    keyboard.command(0x20)
    assert keyboard.answer() == 0x64


def test_i8042_keyboard_that_is_not_there_answers_at_once() -> None:
    keyboard = Keyboard()
    keyboard.command(0x60, 0x01)
    keyboard.chip.write(0, 1, 0xFF)
    assert keyboard.line.level == 1
    assert keyboard.chip.read(4, 1) & 0x41 == 0x41
    assert keyboard.answer() == 0xFE
    assert (keyboard.line.level, keyboard.chip.read(4, 1) & 0x41) == (0, 0)


def test_i8042_mouse_loop_test_is_not_mistaken_for_a_mouse() -> None:
    """Linux's i8042_check_aux() writes 0x5a through 0xd3 and looks for it, flagged as the second port's."""
    keyboard = Keyboard()
    keyboard.command(0xD3, 0x5A)
    assert not keyboard.chip.read(4, 1) & 0x20
    assert keyboard.answer() != 0x5A


@pytest.mark.parametrize("command", [0xFE, 0xF0])
def test_i8042_pulsing_the_reset_line_resets(command: int) -> None:
    keyboard = Keyboard()
    keyboard.command(command)
    assert keyboard.resets == 1


def test_i8042_a20_is_harmless_and_the_output_port_can_reset() -> None:
    keyboard = Keyboard()
    keyboard.command(0xD1, 0xDD)
    keyboard.command(0xDD)
    keyboard.command(0xDF)
    keyboard.command(0xFF)
    assert keyboard.resets == 0
    keyboard.command(0xD0)
    answer = keyboard.answer()
    assert answer is not None
    assert answer & 3 == 3
    keyboard.command(0xD1, 0x02)
    assert keyboard.resets == 1


# -- acpi ----------------------------------------------------------------------------------------------------------


def test_s5_powers_off_however_wide_the_write() -> None:
    for accesses in ([(4, 2, 0x3400)], [(4, 1, 0x00), (5, 1, 0x34)], [(4, 4, 0x3401)]):
        offs: list[int] = []
        power = PowerManagement(partial(offs.append, 1), s5=(0, 5))
        for offset, size, value in accesses:
            power.write(offset, size, value)
        assert offs == [1]


def test_other_sleep_states_and_a_type_without_enable_do_not_power_off() -> None:
    offs: list[int] = []
    power = PowerManagement(lambda: offs.append(1), s5=(0, 5))
    power.write(4, 2, 5 << 10)
    assert power.read(0, 2) == 0
    power.write(4, 2, 1 << 13 | 3 << 10)
    assert offs == []
    assert power.read(0, 2) == 1 << 15, "awake again"
    assert power.read(4, 2) == 3 << 10 | 1, "SLP_EN reads as zero, SCI_EN as one"


def test_power_button_raises_the_interrupt_until_its_status_is_cleared() -> None:
    power = PowerManagement(lambda: None)
    line = power.line = FakeLine()
    power.press_power_button()
    assert line.level == 0
    power.write(2, 2, 0x0100)
    assert line.level == 1
    power.write(0, 2, 0x0001)
    assert (line.level, power.read(0, 2)) == (1, 0x0100)
    power.write(1, 1, 0x01)
    assert (line.level, power.read(0, 2)) == (0, 0)
    assert power.read(0, 4) == 0x01000000


def test_pm_timer_counts_24_bits_at_its_rate() -> None:
    now = 5 * 10**9
    timer = PmTimer(lambda: now)
    now += 10**9
    assert timer.read(0, 4) == PM_TIMER_HZ
    assert timer.read(1, 1) & 0xFF == PM_TIMER_HZ >> 8 & 0xFF
    now += 4 * 10**9
    assert timer.read(0, 4) == 5 * PM_TIMER_HZ & 0xFFFFFF


def test_reset_register_resets_on_its_value_only() -> None:
    resets: list[int] = []
    register = ResetRegister(lambda: resets.append(1), value=0x06)
    register.write(0, 1, 0x01)
    assert resets == []
    register.write(0, 1, 0x06)
    assert resets == [1]


# -- one-way ports -------------------------------------------------------------------------------------------------


def test_debug_exit_passes_the_value_on() -> None:
    values: list[int] = []
    port = DebugExit(values.append)
    port.write(0, 1, 0x2A)
    port.write(0, 4, 0x12345678)
    assert values == [0x2A, 0x12345678]
    assert port.read(0, 1) == 0


def test_post_keeps_the_newest_codes() -> None:
    told: list[int] = []
    post = Post(kept=3, on_code=told.append)
    for code in range(5):
        post.write(0, 1, code)
    assert (bytes(post.codes), post.read(0, 1), told) == (b"\x02\x03\x04", 4, [0, 1, 2, 3, 4])


def test_pvpanic_tells_its_events_and_reports_only_those() -> None:
    events: list[int] = []
    pvpanic = Pvpanic(events.append, supported=3)
    assert pvpanic.read(0, 1) == 3
    pvpanic.write(0, 1, 0x04)
    pvpanic.write(0, 1, 0x05)
    assert events == [1]


def test_rtc_says_when_an_update_is_near_and_the_time_changes_as_it_ends() -> None:
    now = [WHEN.timestamp()]  # 23:59:58, a whole second
    rtc = Rtc(lambda: now[0])
    seen = []
    for microseconds in (0, 244, 500_000, 997_700, 997_800, 999_990, 1_000_000):
        now[0] = WHEN.timestamp() + microseconds / 1e6
        seen.append((cmos(rtc, 0x0A) >> 7, cmos(rtc, 0)))
    assert seen == [(0, 0x58), (0, 0x58), (0, 0x58), (0, 0x58), (1, 0x58), (1, 0x58), (0, 0x59)]


@pytest.mark.parametrize(("at", "value"), [(0x0B, 0x82), (0x0A, 0x66), (0x0A, 0x06)])
def test_rtc_updates_nothing_while_the_time_or_the_divider_is_held(at: int, value: int) -> None:
    rtc = Rtc(lambda: WHEN.timestamp() + 0.9995)
    assert cmos(rtc, 0x0A) == 0xA6
    set_cmos(rtc, at, value)
    assert cmos(rtc, 0x0A) >> 7 == 0
    assert rtc.save()["cmos"][0x0A] >> 7 == 0
