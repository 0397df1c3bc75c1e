"""States and snapshots that anybody may have written: taken or refused, and the machine is of use afterwards."""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples

from vmm import Machine
from vmm.errors import ConfigError, HostError
from vmm.snapshot import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

COUNT = 0x200000
SPIN = bytes.fromhex("ff042500002000ebf7")  # again: inc dword [0x200000]; jmp again

Way = tuple[Any, ...]


def ways(value: Any, way: Way = ()) -> Iterator[Way]:
    """The way to every part of a plain value, itself the first."""
    yield way
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in parts:
        yield from ways(part, (*way, step))


def part_of(value: Any, way: Way) -> Any:
    for step in way:
        value = value[step]
    return value


def with_part(value: Any, way: Way, part: Any) -> Any:
    """A copy of a plain value that has another part there."""
    if not way:
        return part
    copy = value.copy()
    copy[way[0]] = with_part(value[way[0]], way[1:], part)
    return copy


NUMBERS = [-1, 0, 1, 2, 255, 1 << 16, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200]
OTHERS: list[Any] = [
    None,
    True,
    b"",
    b"\xff" * 7,
    b"x" * 100_000,
    "",
    "x",
    "a\0b",
    "/dev/zero",
    [],
    [1],
    [[]],
    ["ab"],
    [{}],
]
DICTS: list[Any] = [{}, {"version": 1}, {1: 2}]


def odd(old: Any, chance: random.Random) -> Any:
    """Another value: often of the same type, and near to the old one."""
    near: list[Any] = []
    if isinstance(old, bytes) and old:
        flipped = bytearray(old)
        for _ in range(4):
            flipped[chance.randrange(len(old))] = chance.randrange(256)
        near = [bytes(flipped), bytes(flipped), b"\xff" * len(old), bytes(len(old)), old[1:]]
    elif isinstance(old, int):
        near = [old ^ 1 << chance.randrange(64), old ^ 1 << chance.randrange(8), old + 1, old - 1]
    elif isinstance(old, str):
        near = [old + "x", old[:-1]]
    return chance.choice(3 * near + NUMBERS + OTHERS + DICTS)


def fields(tmp_path: Path) -> dict[str, Any]:
    """A device of each kind that can be saved."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    return {
        "disks": [str(tmp_path / "disk.img")],
        "nets": [f"socket={tmp_path}/net.sock"],
        "vsock": str(tmp_path / "vsock.sock"),
        "balloon": True,
        "console_device": "virtio",
    }


def count(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(COUNT, 4), "little")


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_a_state_with_any_part_replaced_is_taken_or_refused_and_a_good_one_is_loaded_after_it(
    flat: Callable[..., Machine], tmp_path: Path, transport: str
) -> None:
    machine = flat(SPIN, cpus=2, virtio=transport, **fields(tmp_path))
    machine.start()
    while not count(machine):
        pass
    machine.pause()
    good = machine.save()
    chance = random.Random(5)
    everywhere = list(ways(good))
    of_devices = [way for way in everywhere if way[:1] != ("processors",)]
    for n in range(examples(400)):
        way = chance.choice(of_devices if n % 2 else everywhere)
        with contextlib.suppress(ValueError, HostError):
            machine.load_state(with_part(good, way, odd(part_of(good, way), chance)))
            if chance.random() < 0.1:
                machine.resume()  # as far as it gets
                machine.pause()
        if n % 20 == 0:
            machine.load_state(good)
    machine.load_state(good)
    then = count(machine)
    machine.resume()
    if machine.outcome is not None:  # one of the others ended it
        machine.start()
    deadline = time.monotonic() + 60
    while count(machine) == then and time.monotonic() < deadline:
        pass
    assert count(machine) != then


def test_a_snapshot_with_any_record_replaced_is_restored_or_refused(
    flat: Callable[..., Machine], tmp_path: Path
) -> None:
    made = fields(tmp_path)
    places = {name: made[name] for name in ("nets", "vsock")}
    with flat(SPIN, **made) as machine:
        machine.snapshot(tmp_path / "snapshot").close()
    file = tmp_path / "snapshot" / "snapshot.pyvmm"
    file.chmod(0o600)
    content, _ = records.unpack(str(file), file.read_bytes())
    state = content["state"]
    chance = random.Random(5)
    leaves = list(ways(state["description"]["cpuid"]))
    everywhere = [way for way in ways({**state, "machine": None}) if "cpuid" not in way]
    everywhere += [("description", "cpuid", *way) for way in chance.sample(leaves, 20)]
    for _ in range(examples(300)):
        way = chance.choice(everywhere)
        broken = with_part(state, way, odd(part_of(state, way), chance))
        file.write_bytes(records.pack({**content, "state": broken}))
        with contextlib.suppress(ConfigError, HostError):  # of which SnapshotError is one
            Machine.restore(tmp_path / "snapshot", **places).close()
    file.write_bytes(records.pack(content))
    Machine.restore(tmp_path / "snapshot", **places).close()
