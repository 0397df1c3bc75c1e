"""What every device of the platform promises: no access fails, and what it saves it becomes again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.devices.acpi_pm import PmTimer, PowerManagement, ResetRegister
from vmm.devices.debug_exit import DebugExit
from vmm.devices.generation_id import GenerationId
from vmm.devices.i8042 import I8042
from vmm.devices.no_bios import NoBios
from vmm.devices.pit import Pit
from vmm.devices.post import Post
from vmm.devices.pvpanic import Pvpanic
from vmm.devices.rtc import Rtc
from vmm.devices.uart import Uart
from vmm.devices.ways_out import BochsShutdown, ResetControl, SleepControl, SystemControlA
from vmm.testing.fakes import FakeConsole, FakeLine

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import Device


class Clock:
    """Nanoseconds, advanced by the test."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * 10**9

    def __call__(self) -> int:
        return self.now

    def seconds(self) -> float:
        return self.now / 10**9


def nothing(*arguments: Any) -> None:
    pass


class Bytes:
    """Memory for a device that looks at some."""

    def __init__(self) -> None:
        self.content = bytearray(0x2000)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.content[gpa : gpa + size])

    def write(self, gpa: int, data: bytes) -> None:
        self.content[gpa : gpa + len(data)] = data


# device, and the offsets a guest may use (one past the end included)
DEVICES: dict[str, tuple[Callable[[Clock], Device], list[int]]] = {
    "uart": (lambda clock: Uart(FakeConsole(room=5)), list(range(9))),
    "rtc": (lambda clock: Rtc(clock.seconds, 512 << 20), [0, 1]),
    "i8042": (lambda clock: I8042(nothing), [0, 1, 4]),
    "acpi-pm": (lambda clock: PowerManagement(nothing), list(range(6))),
    "pm-timer": (lambda clock: PmTimer(clock), list(range(4))),
    "acpi-reset": (lambda clock: ResetRegister(nothing), [0, 1]),
    "no-bios": (lambda clock: NoBios(nothing), [0, 1]),
    "reset-control": (lambda clock: ResetControl(nothing), [0, 1, 2, 3]),
    "system-control-a": (lambda clock: SystemControlA(nothing), [0, 1]),
    "sleep-control": (lambda clock: SleepControl(nothing, (0, 5)), [0, 1, 2]),
    "bochs-shutdown": (lambda clock: BochsShutdown(nothing), [0, 1]),
    "debug-exit": (lambda clock: DebugExit(nothing), list(range(4))),
    "post": (lambda clock: Post(4), [0, 1]),
    "pvpanic": (lambda clock: Pvpanic(nothing), [0, 1]),
    "generation-id": (lambda clock: GenerationId(Bytes(), 0x1000, 7), [0, 1]),
    "pit": (lambda clock: Pit(clock=clock), [0, 1, 2, 3, 0x21, 0x22]),
}

ACTS = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "write", "write", "wait"]),
        st.integers(0, 8),
        st.sampled_from([1, 1, 1, 2, 4, 8]),
        st.integers(0, 2**64 - 1) | st.integers(0, 255),
    ),
    max_size=40,
)


def disturb(device: Device, clock: Clock, offsets: list[int], acts: Any) -> None:
    for act, where, size, value in acts:
        offset = offsets[where % len(offsets)]
        if act == "read":
            assert device.read(offset, size) >= 0
        elif act == "write":
            device.write(offset, size, value & (1 << 8 * size) - 1)
        else:
            clock.now += value & 0xFFFFFFFF
            if isinstance(device, Pit):
                device.service()


@pytest.mark.parametrize("name", DEVICES)
@settings(deadline=None, max_examples=examples(120))
@given(acts=ACTS)
def test_no_access_fails_and_a_saved_state_is_taken_up_again(name: str, acts: Any) -> None:
    make, offsets = DEVICES[name]
    clock = Clock()
    device = make(clock)
    device.line = FakeLine()
    assert device.name == name
    disturb(device, clock, offsets, acts)
    state = device.save()

    other = make(clock)
    other.line = FakeLine()
    disturb(other, clock, offsets, acts[::-1])
    clock.now += 12345
    device_now = make(clock)  # save and load around a stretch of time that the state knows nothing of
    clock.now -= 12345
    device_now.load(state)
    other.load(state)
    assert device_now.save() == other.save()
    if name != "uart":  # its console has room where the saved one had none: it drains, see test_uart.py
        assert other.save() == state
        for offset in offsets:
            assert other.read(offset, 1) == device_now.read(offset, 1)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("change", ["version", "extra", "missing", "type", "large"])
def test_a_state_that_is_not_the_devices_is_refused_and_changes_nothing(name: str, change: str) -> None:
    clock = Clock()
    device = DEVICES[name][0](clock)
    good = device.save()
    bad = dict(good)
    field = next((key for key in good if key != "version"), "version")
    if change == "version":
        bad["version"] = 2
    elif change == "extra":
        bad["surplus"] = 0
    elif change == "missing":
        del bad[field]
    elif change == "type":
        bad[field] = "text"
    else:
        bad[field] = 1 << 70
    with pytest.raises(ValueError, match=f"{name}|state"):
        device.load(bad)
    assert device.save() == good


@pytest.mark.parametrize("name", DEVICES)
@settings(deadline=None, max_examples=examples(40))
@given(acts=ACTS)
def test_reset_lowers_the_line(name: str, acts: Any) -> None:
    make, offsets = DEVICES[name]
    clock = Clock()
    device = make(clock)
    line = FakeLine()
    device.line = line
    disturb(device, clock, offsets, acts)
    device.reset()
    assert line.level == 0
