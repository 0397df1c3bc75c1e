"""Clones: they go on from where the original is, share what nobody writes, and are machines of their own."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from vmm import layout
from vmm.errors import ConfigError, HostError, StateError
from vmm.machine import Machine
from vmm.parts import Net, Vsock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COUNT, HEAP = 0x200000, 0x300000
PAGE, MIB = 4096, 1 << 20
SPIN = bytes.fromhex("ff042500002000ebf7")  # again: inc dword [0x200000]; jmp again
HALT = bytes.fromhex("fbf4ebfd")  # sti; again: hlt; jmp again: with interrupts off it would end


def count(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(COUNT, 4), "little")


def until(machine: Machine, n: int) -> None:
    while count(machine) < n:
        pass


def guest_memory_pss() -> int:
    """Bytes of this process's mappings of guest memory, each page divided among those who map it."""
    with open("/proc/self/smaps") as smaps:
        mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read(), flags=re.MULTILINE)
    return sum(
        int(found[1]) * 1024
        for mapping in mappings
        if "/memfd:guest-" in mapping.split("\n", 1)[0] and (found := re.search(r"^Pss: +(\d+)", mapping, re.MULTILINE))
    )


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def settle(before: int) -> None:
    """Wait for closed machines, which go behind their owner's back, to be gone."""
    deadline = time.monotonic() + 60
    while open_files() > before:
        assert time.monotonic() < deadline, "files are left open"
        time.sleep(0.01)
    assert open_files() == before


def close(machines: list[Machine]) -> None:
    for machine in machines:
        machine.close()


def test_clones_go_on_from_where_the_original_is_each_on_its_own(flat: Callable[..., Machine]) -> None:
    machine = flat(SPIN, cpus=2)
    machine.start()
    until(machine, 1000)
    clones = machine.clone(3)
    try:
        then = count(clones[0])
        assert then >= 1000 and [count(clone) for clone in clones] == [then] * 3
        until(machine, then + 1000)
        assert [count(clone) for clone in clones] == [then] * 3, "the original runs, its clones do not yet"
        for clone in clones[:2]:
            clone.start()
        until(clones[1], then + 1000)
        clones[0].stop()
        assert count(clones[2]) == then
        machine.close()
        until(clones[1], count(clones[1]) + 1000)  # it outlives the original
        clones[2].start()
        until(clones[2], then + 1000)
    finally:
        close(clones)


def test_clones_share_the_memory_that_nobody_writes(flat: Callable[..., Machine]) -> None:
    machine = flat(HALT, memory="32M")
    machine.memory.write(HEAP, random.Random(1).randbytes(16 * MIB))
    alone = guest_memory_pss()
    clones = machine.clone(10)
    try:
        for clone in clones:
            clone.start()
            assert clone.memory.read(HEAP, 16 * MIB) == machine.memory.read(HEAP, 16 * MIB)
        assert 16 * MIB <= alone <= guest_memory_pss() < alone + 10 * MIB, "all of them have all of it mapped"
        for clone in clones[:4]:
            clone.memory.fill(HEAP, 4 * MIB, 1)
        assert alone + 16 * MIB < guest_memory_pss() < alone + 26 * MIB, "what is written is one's own"
        assert machine.memory.read(HEAP, 4 * MIB) == clones[9].memory.read(HEAP, 4 * MIB)
    finally:
        close(clones)


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_of_clones_keeps_every_memory_apart(flat: Callable[..., Machine], seed: int) -> None:
    """Machines that write and are cloned and closed in any order, little and much written between, beside a model."""
    rng = random.Random(seed)
    machines: list[tuple[Machine, dict[int, bytes]]] = [(flat(HALT, memory="8M"), {})]
    machines[0][0].load()
    clones: list[Machine] = []
    try:
        for _ in range(30):
            machine, model = rng.choice(machines)
            act = rng.choice(["write", "write", "write much", "clone", "clone", "close"])
            if act.startswith("write"):
                pages = rng.sample(range(HEAP // PAGE, 8 * MIB // PAGE), 300 if act == "write much" else 3)
                for page in pages:
                    model[page] = rng.randbytes(16)
                    machine.memory.write(page * PAGE + 16, model[page])
            elif act == "clone" and len(machines) < 8:
                made = machine.clone(rng.choice([1, 1, 3]))
                clones += made
                machines += [(clone, dict(model)) for clone in made]
            elif act == "close" and len(machines) > 1:
                machines.remove((machine, model))
                machine.close()
            for machine, model in machines:
                for page in range(HEAP // PAGE, 8 * MIB // PAGE):
                    assert machine.memory.read(page * PAGE + 16, 16) == model.get(page, bytes(16)), (seed, hex(page))
    finally:
        close(clones)


def test_cloning_again_what_has_hardly_changed_takes_no_second_copy(flat: Callable[..., Machine]) -> None:
    machine = flat(HALT, memory="32M")
    machine.memory.write(HEAP, random.Random(1).randbytes(16 * MIB))
    clones: list[Machine] = []
    try:
        for step in range(6):
            machine.memory.write(HEAP + step * PAGE, b"changed")
            clones += machine.clone()
            clones[-1].memory.read(HEAP, 16 * MIB)
        assert guest_memory_pss() < 20 * MIB
        assert [clone.memory.read(HEAP + 3 * PAGE, 7) == b"changed" for clone in clones] == [False] * 3 + [True] * 3
    finally:
        close(clones)


def test_checkpoints_before_and_after_cloning(flat: Callable[..., Machine]) -> None:
    machine = flat(SPIN)
    machine.load()
    machine.memory.write(HEAP, b"before")
    with machine.checkpoint() as before:
        machine.memory.write(HEAP, b"cloned")
        [clone] = machine.clone()
        try:
            with clone.checkpoint() as checkpoint:
                clone.start()
                until(clone, 1000)
                clone.memory.write(HEAP, b"undone")
                clone.rollback(checkpoint)
                clone.stop()
                assert clone.memory.read(HEAP, 6) == b"cloned"
            machine.rollback(before)
            assert machine.memory.read(HEAP, 6) == b"before"
            assert clone.memory.read(HEAP, 6) == b"cloned"
            machine.start()
            until(machine, 1000)
            machine.rollback(before)
            machine.stop()
            assert machine.memory.read(HEAP, 6) == b"before"
        finally:
            clone.close()


def test_a_clone_of_a_restored_machine(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(SPIN)
    machine.start()
    until(machine, 1000)
    machine.snapshot(tmp_path / "snap").close()
    machine.stop()
    with Machine.restore(tmp_path / "snap") as restored:
        restored.start()
        until(restored, count(restored) + 1000)
        [clone] = restored.clone()
    with clone:
        then = count(clone)
        assert then >= 2000
        clone.start()
        until(clone, then + 1000)


def test_a_clone_of_a_machine_whose_memory_was_still_to_come_has_all_of_it(
    flat: Callable[..., Machine], tmp_path: Path
) -> None:
    machine = flat(SPIN)
    content = random.Random(3).randbytes(4 * MIB)
    machine.memory.write(HEAP, content)
    machine.snapshot(tmp_path / "snap").close()
    with Machine.restore(tmp_path / "snap", later=True) as restored:
        restored.start()
        until(restored, 1000)
        clones = restored.clone(2)
    try:
        for clone in clones:
            clone.start()
            until(clone, count(clone) + 1000)
            assert clone.memory.read(HEAP, 4 * MIB) == content
    finally:
        close(clones)


def test_a_guest_that_spoils_its_generation_id_gives_no_clone_the_same(flat: Callable[..., Machine]) -> None:
    machine = flat(HALT)
    machine.load()
    machine.memory.write(layout.GENERATION_ID, b"of the guest's..")
    clones = machine.clone(2)
    try:
        assert machine.generation_id.value == b"of the guest's.."
        assert len({one.generation_id.value for one in (machine, *clones)}) == 3
    finally:
        close(clones)


def test_everybody_has_another_identity(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(HALT, vsock=str(tmp_path / "v"), nets=Net("socket", socket=str(tmp_path / "link")))
    machine.load()
    before = machine.generation_id.value

    def others(index: int) -> dict[str, object]:
        return {"nets": Net("socket", socket=str(tmp_path / f"link{index}"))}

    clones = machine.clone(3, fields=others)
    try:
        everybody = [machine, *clones]
        assert len({one.generation_id.value for one in everybody}) == 4 and machine.generation_id.value == before
        names = [{device.name: device for device in one.virtio} for one in everybody]
        assert len({name["virtio-net0"].config(0, 6) for name in names}) == 4
        cids = [int.from_bytes(name["virtio-vsock0"].config(0, 8), "little") for name in names]
        assert len(set(cids)) == 4 and cids[0] == 3
        for one, name, cid in zip(everybody, names, cids, strict=True):
            assert name["virtio-net0"].config(0, 6).hex(":") == name["virtio-net0"].mac  # type: ignore[attr-defined]
            assert one.config.vsock is not None and one.config.vsock.cid == cid
        for clone in clones:
            assert clone.config.vsock is not None
            assert clone.config.vsock.path == f"{tmp_path}/v.{clone.config.vsock.cid}"
            assert os.path.exists(clone.config.vsock.path)
    finally:
        close(clones)


def test_an_address_that_is_given_is_the_clones(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(HALT, nets=Net("socket", socket=str(tmp_path / "a")))
    given = Net("socket", socket=str(tmp_path / "b"), mac="52:54:00:00:00:42")
    [clone] = machine.clone(fields=lambda index: {"nets": given})
    with clone:
        assert clone.virtio[0].config(0, 6).hex(":") == "52:54:00:00:00:42"


def test_who_restores_says_whether_there_may_be_two(flat: Callable[..., Machine], tmp_path: Path) -> None:
    link: dict[str, Any] = {"nets": Net("socket", socket=str(tmp_path / "link"))}
    machine = flat(HALT, **link)
    machine.snapshot(tmp_path / "snap").close()
    was = machine.generation_id.value, machine.virtio[0].config(0, 6)
    machine.close()
    with Machine.restore(tmp_path / "snap", identity="same", **link) as same:
        assert (same.generation_id.value, same.virtio[0].config(0, 6)) == was
    with Machine.restore(tmp_path / "snap", **link) as other:
        assert other.generation_id.value != was[0] and other.virtio[0].config(0, 6) != was[1]
    with pytest.raises(ConfigError, match="a copy has a new one or the same"):
        Machine.restore(tmp_path / "snap", identity="old")


def test_a_network_that_can_be_there_once_is_not_cloned(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(HALT, nets=Net("socket", socket=str(tmp_path / "link")))
    with pytest.raises(ConfigError, match=r"net 0 is the socket .*/link, the original's: name others, fields=lambda"):
        machine.clone()
    with pytest.raises(ConfigError, match=r"net 0 is a link to another machine, .*: give --net"):
        machine.clone(fields=lambda index: {"nets": []})


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_ports_of_the_host_stay_the_originals(flat: Callable[..., Machine]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        machine = flat(HALT, nets=Net("user", hostfwd=f"tcp:127.0.0.1:{port}-:80"))
    except HostError as error:
        pytest.skip(f"passt does not run here: {error}")
    [clone] = machine.clone()
    with clone:
        assert clone.config.nets[0].hostfwd == ()
        assert "net 0: ports of the host go on leading to the original, not to this clone" in clone.notes
        assert clone.config.nets[0].mac and clone.virtio[0].config(0, 6).hex(":") == clone.config.nets[0].mac
        with socket.create_connection(("127.0.0.1", port), timeout=60):
            pass


def test_what_cannot_be_cloned_is_refused(flat: Callable[..., Machine]) -> None:
    machine = flat(HALT)
    with pytest.raises(ConfigError, match="one at least"):
        machine.clone(0)
    with pytest.raises(ConfigError, match="cpus is what the machine was made with"):
        machine.clone(fields=lambda index: {"cpus": 2})
    from vmm.devices.virtio.rng import Rng

    extra = flat(HALT, rng=False)
    extra.add(Rng(extra.native))
    with pytest.raises(StateError, match="added to a machine are not cloned"):
        extra.clone()


def test_prepare_sees_each_clone_before_it_runs(flat: Callable[..., Machine]) -> None:
    machine = flat(SPIN)
    machine.start()
    until(machine, 1000)
    seen: list[tuple[int, bool]] = []

    def prepare(clone: Machine, index: int) -> None:
        seen.append((index, clone.running))
        clone.memory.write(COUNT, (index * 0x10000000).to_bytes(4, "little"))

    clones = machine.clone(3, prepare=prepare)
    try:
        assert seen == [(0, False), (1, False), (2, False)]
        for index, clone in enumerate(clones):
            clone.start()
            until(clone, index * 0x10000000 + 1000)
            assert count(clone) < (index + 1) * 0x10000000
    finally:
        close(clones)


def test_a_failure_leaves_no_clone_and_the_original_running(flat: Callable[..., Machine]) -> None:
    machine = flat(SPIN)
    machine.start()
    before = open_files()

    def fail(clone: Machine, index: int) -> None:
        if index == 2:
            raise HostError("no more")

    for _ in range(2):
        with pytest.raises(HostError, match="no more"):
            machine.clone(4, prepare=fail)
    settle(before)
    until(machine, count(machine) + 1000)
    clones = machine.clone(2)
    close(clones)
    settle(before)
    machine.stop()


def test_when_one_cannot_be_made_none_is(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(SPIN, vsock=str(tmp_path / "v"))
    machine.start()
    before, there = open_files(), sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match="the socket of a program that is running"):
        machine.clone(6, fields=lambda index: {"vsock": Vsock(str(tmp_path / "one"), cid=10 + index)})
    settle(before)
    assert sorted(os.listdir(tmp_path)) == there
    until(machine, count(machine) + 1000)
