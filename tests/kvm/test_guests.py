"""Every bare-metal guest of guests/ on a machine: each CPU mode, each boot protocol, each standard device."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processors import is_tcg, traps_left_out

from vmm import host
from vmm.devices.device import Device
from vmm.errors import ConsoleTimeout
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.outcome import Outcome

    GuestPath = Callable[[str], str]

GUESTS = Path(__file__).resolve().parents[2] / "guests"

# guests/lib/guest.h
PASSED, CHECK_FAILED, NO_ARGUMENT = 0x10, 0x11, 0x04

MEMORY_DEVICE = 0xD0000000
HOLE = 0xD8000000
COUNTING_PORT = 0x560

# Guests that need nothing but a command line: (guest, command line, machine fields).
PASSING: list[tuple[str, str, dict[str, Any]]] = [
    ("hello", "", {}),
    ("hello", "", {"kind": "elf"}),
    ("hello_protected", "", {}),
    ("hello_protected", "", {"kind": "elf"}),
    ("hello_real.bin", "", {"kind": "flat", "mode": "real"}),
    ("hello_real.bin", "", {"kind": "flat", "mode": "real", "address": 0x10000}),
    ("pvh", "a=b", {}),
    ("multiboot", "a=b", {}),
    ("multiboot_kludge.bin", "a=b", {}),
    ("syscall", "", {}),
    ("irq", "", {}),
    ("smp", "cpus=1", {}),
    ("smp", "cpus=2", {"cpus": 2}),
    ("smp", "cpus=5", {"cpus": 5}),
    ("uart", "", {}),
    ("rtc", "", {}),
    ("post", "", {}),
    ("pio_string", "", {}),
    ("mmio", f"hole={HOLE:#x}", {}),
    ("memory_map", f"beyond=1 mem={4 << 20}", {"memory": "4M"}),
    ("memory_map", f"beyond=1 mem={64 << 20}", {"memory": "64M"}),
    ("memory_map", f"beyond=1 mem={5 << 30}", {"memory": "5G", "rng": False}),  # nothing in the hole
    ("exits", "pio=100 mmio=100", {}),
    ("exits", "pio=100 mmio=100 cpl=3", {"kind": "elf"}),
]

# Guests that end otherwise than by a verdict: (guest, command line, reason).
ENDING = [
    ("poweroff", "", "power-off"),
    ("reset_i8042", "", "reset"),
    ("reset_acpi", "", "reset"),
    ("pvpanic", "", "panic"),
    ("triple_fault", "", "triple-fault"),
    ("hang", "", "halt"),
    ("spin", "", "timeout"),
]

# Guests with a test of their own below.
OTHERS = {"traps", "instructions", "debug_exit", "umip", "realmode"}
# And that of test_diagnose.py.
OTHERS |= {"deaths"}
# And those of test_virtio_guests.py.
OTHERS |= {"blk_rw", "net_pair", "ring_abuse", "virtio_irq", "virtio_bench", "flood"}
# And that of test_rollback_self_check.py and test_migrate.py.
OTHERS |= {"self_check"}
# And that of test_clocks.py.
OTHERS |= {"clocks"}


def run(path: str, append: str = "", **fields: Any) -> Outcome:
    """Run a guest to its end, 20 seconds at most."""
    with Machine(kernel=path, append=append, **{"memory": "16M", **fields}) as machine:
        return machine.run(timeout=120)


def assert_passed(outcome: Outcome) -> None:
    """The guest's own verdict is that every check held."""
    text = outcome.console.decode(errors="replace")
    assert (outcome.reason, outcome.code) == ("debug-exit", PASSED), f"{outcome!r}\n{text}"
    assert text.endswith("PASS\n"), text


class ByteMemory(Device):
    """Two pages that remember bytes."""

    name = "byte-memory"

    def __init__(self) -> None:
        self.data = bytearray(0x2000)
        self.sizes: set[int] = set()

    def read(self, offset: int, size: int) -> int:
        self.sizes.add(size)
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.sizes.add(size)
        self.data[offset : offset + size] = value.to_bytes(size, "little")


class Counter(Device):
    """A port that answers 0, 1, 2, ... and keeps what it is told."""

    name = "counter"

    def __init__(self) -> None:
        self.reads = 0
        self.written: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return self.reads - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((size, value))


@pytest.mark.parametrize(
    ("name", "append", "fields"),
    PASSING,
    ids=[" ".join([n, a, *(f"{k}={v}" for k, v in f.items())]).strip() for n, a, f in PASSING],
)
def test_every_check_of_the_guest_holds(guest: GuestPath, name: str, append: str, fields: dict[str, Any]) -> None:
    assert_passed(run(guest(name), append, **fields))


@pytest.mark.parametrize(("name", "append", "reason"), ENDING, ids=[e[0] for e in ENDING])
def test_the_guest_ends_as_it_says(guest: GuestPath, name: str, append: str, reason: str) -> None:
    with Machine(kernel=guest(name), append=append, memory="16M") as machine:
        outcome = machine.run(timeout=0.5 if reason == "timeout" else 20)
    assert outcome.reason == reason, f"{outcome!r}\n{outcome.console.decode(errors='replace')}"
    assert b"FAIL" not in outcome.console


@pytest.mark.parametrize(("name", "departures"), [("traps", "iopl=0 user_int=0"), ("instructions", "counts=0 movbe=0")])
def test_the_processor_does_as_the_architecture_says(guest: GuestPath, name: str, departures: str) -> None:
    # Where kernel code is emulated some of it is beyond a monitor's power: each guest says what and why.
    sound = traps_left_out() if name == "traps" else ""
    assert_passed(run(guest(name), sound if host.findings().native else departures))


def test_user_mode_instruction_prevention_holds_at_cpl_3_and_only_there(guest: GuestPath) -> None:
    outcome = run(guest("umip"))
    assert_passed(outcome)
    if b"SKIP: no UMIP" in outcome.console:
        pytest.skip("the processor or its KVM has no UMIP")


@pytest.mark.skipif(is_tcg(), reason="QEMU's TCG 7.2 does not run guests/realmode to its end")
def test_real_mode_is_as_the_manual_has_it(guest: GuestPath) -> None:
    # The image lies from 16 KiB on, where loaders have their own tables otherwise. KVM's emulator has no DAA, AAA, AAS.
    assert_passed(run(guest("realmode"), "" if host.findings().native else "decimal=0"))


def test_hello_prints_nothing_before_its_greeting(guest: GuestPath) -> None:
    assert run(guest("hello")).console == b"Hello from long mode\nPASS\n"


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (16, 33), (127, 255)])
def test_debug_exit_carries_its_value(guest: GuestPath, value: int, status: int) -> None:
    outcome = run(guest("debug_exit"), f"value={value}")
    assert (outcome.reason, outcome.code, outcome.status) == ("debug-exit", value, status)


def test_a_failed_check_says_where(guest: GuestPath) -> None:
    outcome = run(guest("smp"), "cpus=7")
    assert outcome.reason == "debug-exit"
    assert outcome.code >= CHECK_FAILED
    last = outcome.console.decode().splitlines()[-1]
    assert re.fullmatch(r"FAIL guests/smp/smp\.c:\d+: .* \(0x1, 0x7\)", last), last


def test_each_check_has_a_code_of_its_own(guest: GuestPath) -> None:
    image, one, other = guest("mmio"), "addr=0xd8000000", "hole=0x100000"
    codes = [run(image, append).code for append in (one, other)]
    assert min(codes) >= CHECK_FAILED and codes[0] != codes[1]


def test_a_guest_without_its_argument_says_so(guest: GuestPath) -> None:
    outcome = run(guest("debug_exit"))
    assert (outcome.reason, outcome.code) == ("debug-exit", NO_ARGUMENT), outcome.console


@pytest.mark.parametrize("name", ["pvh", "multiboot"])
def test_modules_arrive_whole_and_in_order(guest: GuestPath, tmp_path: Path, name: str) -> None:
    contents = [b"first module", bytes(range(256)) * 20 + b"x"]
    paths = [tmp_path / f"module{i}" for i in range(2)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    outcome = run(guest(name), "modules=2", initrd=tuple(str(path) for path in paths))
    assert_passed(outcome)
    for number, content in enumerate(contents):
        assert f"module {number}: size {len(content)} sum {sum(content)} ".encode() in outcome.console


@pytest.mark.parametrize("name", ["pvh", "multiboot"])
def test_the_command_line_arrives(guest: GuestPath, name: str) -> None:
    outcome = run(guest(name), "one two=3  'four'")
    assert_passed(outcome)
    assert re.search(rb"command line: (\S+ )?one two=3  'four'\n", outcome.console)


def test_the_clock_is_the_hosts_in_utc(guest: GuestPath) -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0, tzinfo=None)
    outcome = run(guest("rtc"))
    after = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    shown = datetime.datetime.fromisoformat(outcome.console.decode().splitlines()[0])
    assert before <= shown <= after


def test_string_io_reaches_a_device_in_order(guest: GuestPath) -> None:
    counter = Counter()
    with Machine(kernel=guest("pio_string"), append=f"port={COUNTING_PORT:#x}", memory="16M") as machine:
        machine.attach(counter, port=COUNTING_PORT, size=4)
        outcome = machine.run(timeout=120)
    assert_passed(outcome)
    assert f"device read {counter.reads} times\n".encode() in outcome.console
    assert counter.written == [
        *((1, n) for n in (1, 2, 3, 4, 5)),
        *((2, n) for n in (0x1122, 0x3344, 0x5566)),
        *((4, n) for n in (0x11223344, 0x55667788)),
        *((1, n) for n in (5, 4, 3, 2, 1)),
    ]


def test_mmio_reaches_a_device_byte_for_byte(guest: GuestPath) -> None:
    memory = ByteMemory()
    append = f"addr={MEMORY_DEVICE:#x} edge=1 hole={HOLE:#x}"
    with Machine(kernel=guest("mmio"), append=append, memory="16M") as machine:
        machine.attach(memory, address=MEMORY_DEVICE, size=len(memory.data))
        outcome = machine.run(timeout=120)
    assert_passed(outcome)
    assert memory.sizes >= {1, 2, 4, 8}
    assert bytes(memory.data[-4:]) == (0x33225678).to_bytes(4, "little")


@pytest.mark.parametrize("mode", ["mode=0", "mode=1", "mode=0 slow=1"])
def test_no_byte_of_a_paste_is_lost(guest: GuestPath, mode: str) -> None:
    data = bytes((7 * i + i // 251) % 256 for i in range(700 if "slow" in mode else 3000))
    first = second = 0
    for byte in data:
        first = (first + byte) % 65535
        second = (second + first) % 65535
    with Machine(kernel=guest("uart"), append=f"bytes={len(data)} {mode}", memory="16M") as machine:
        machine.start()
        machine.console.expect("ready\n")
        machine.console.send(data)
        outcome = machine.wait(120)
    assert_passed(outcome)
    assert f"received {len(data)} sums {first} {second}\n".encode() in outcome.console


def test_every_pulse_of_a_line_is_one_interrupt(guest: GuestPath) -> None:
    gsi, pulses = 17, 20
    with Machine(kernel=guest("irq"), append=f"gsi={gsi} pulses={pulses}", memory="16M") as machine:
        machine.start()
        machine.console.expect("armed")
        line = machine.line(gsi)
        for _ in range(pulses):
            line.pulse()
            machine.console.expect(r"\.", timeout=60)
        outcome = machine.wait(120)
    assert_passed(outcome)
    assert outcome.console.count(b".") == pulses


def test_no_pulse_means_no_interrupt(guest: GuestPath) -> None:
    with Machine(kernel=guest("irq"), append="gsi=17 pulses=1", memory="16M") as machine:
        machine.start()
        machine.console.expect("armed")
        machine.line(18).pulse()
        with pytest.raises(ConsoleTimeout):
            machine.console.expect(r"\.", timeout=0.1)
        assert machine.stop().reason == "stopped"


def test_every_guest_has_a_test() -> None:
    there = {path.parent.name for path in GUESTS.glob("*/*.[cS]")} - {"lib"}
    tested = {name.removesuffix(".bin") for name, *_ in (*PASSING, *ENDING)} | OTHERS
    assert there <= tested, there - tested
