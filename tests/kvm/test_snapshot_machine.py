"""Machines written into directories, and machines that go on from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vmm.cli import boot, restore
from vmm.errors import ConfigError, HostError, SnapshotError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COUNT, HEAP = 0x200000, 0x300000
EXIT = bytes.fromhex("b010e6f4")  # mov al, 16; out 0xf4, al
SPIN = bytes.fromhex("ff042500002000ebf7")  # again: inc dword [0x200000]; jmp again


def store(address: int, value: int) -> bytes:
    """mov dword [address], value"""
    return b"\xc7\x04\x25" + address.to_bytes(4, "little") + value.to_bytes(4, "little")


def count(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(COUNT, 4), "little")


def until(machine: Machine, n: int) -> None:
    while count(machine) < n:
        pass


def test_a_machine_goes_on_from_its_snapshot_again_and_again(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(SPIN, cpus=2)
    machine.start()
    until(machine, 1000)
    with machine.snapshot(tmp_path / "snap") as snapshot:
        snapshot.check()
    machine.pause()
    after = count(machine)
    machine.resume()
    until(machine, after + 1000)
    machine.stop()
    for _ in range(2):
        with Machine.restore(tmp_path / "snap") as again:
            then = count(again)
            assert 1000 <= then <= after
            again.start()
            until(again, then + 1000)
            again.stop()


def test_a_snapshot_of_a_machine_that_never_ran_boots(guest: Callable[[str], str], tmp_path: Path) -> None:
    with Machine(kernel=guest("hello"), memory="64M") as machine:
        machine.snapshot(tmp_path / "cold").close()
    with Machine.restore(tmp_path / "cold") as again:
        outcome = again.run(20)
        assert outcome.reason == "debug-exit"
        assert b"hello" in again.console.transcript.lower()


def test_differentials_hold_what_was_written_since_and_restore_as_one(
    flat: Callable[..., Machine], tmp_path: Path
) -> None:
    machine = flat(EXIT)
    machine.load()
    expected = {}
    for step in range(4):
        machine.memory.write(HEAP + step * 0x10000, bytes([step + 1]) * 5000)
        expected[step] = bytes([step + 1]) * 5000
        with machine.snapshot(tmp_path / f"s{step}", differential=True) as written:
            assert (written.parent is None) == (step == 0)
            if step:
                assert sum(region.pages_held for region in written.regions) < 10
    for step in range(4):
        with Machine.restore(tmp_path / f"s{step}") as again:
            for other in range(4):
                held = again.memory.read(HEAP + other * 0x10000, 5000)
                assert held == (expected[other] if other <= step else bytes(5000))
            assert again.run(10).reason == "debug-exit"


def test_what_a_failed_differential_would_have_held_is_in_the_next(
    flat: Callable[..., Machine], tmp_path: Path
) -> None:
    machine = flat(EXIT)
    machine.snapshot(tmp_path / "base", differential=True).close()
    machine.memory.write(HEAP, b"precious")
    with pytest.raises(HostError):
        machine.snapshot(tmp_path / "nowhere" / "diff", differential=True)
    machine.snapshot(tmp_path / "diff", differential=True).close()
    with Machine.restore(tmp_path / "diff") as again:
        assert again.memory.read(HEAP, 8) == b"precious"


def test_a_restored_machine_can_be_snapshotted_and_checkpointed(flat: Callable[..., Machine], tmp_path: Path) -> None:
    flat(SPIN).snapshot(tmp_path / "first").close()
    with Machine.restore(tmp_path / "first") as machine:
        machine.start()
        until(machine, 500)
        machine.snapshot(tmp_path / "second").close()
        checkpoint = machine.checkpoint()
        machine.memory.write(HEAP, b"later")
        machine.rollback(checkpoint)
        assert machine.memory.read(HEAP, 5) == bytes(5)
        machine.stop()
    with Machine.restore(tmp_path / "second") as again:
        assert count(again) >= 500


def test_only_uses_and_places_are_given_anew(flat: Callable[..., Machine], tmp_path: Path) -> None:
    flat(EXIT).snapshot(tmp_path / "snap").close()
    with pytest.raises(ConfigError, match="memory is what the machine was made with"):
        Machine.restore(tmp_path / "snap", memory="32M")
    with pytest.raises(ConfigError, match="the machine has no disk: leave out --disk"):
        Machine.restore(tmp_path / "snap", disks=["x.img"])
    with Machine.restore(tmp_path / "snap", timeout=5, console="none") as again:
        assert again.config.timeout == 5


def test_features_this_host_lacks_are_named(flat: Callable[..., Machine], tmp_path: Path) -> None:
    machine = flat(EXIT)
    from vmm.snapshot.origin import Origin

    described = machine.describe()
    leaf = next(row for row in described["cpuid"] if row[0] == 0x80000001)
    absent = next(bit for bit in range(32) if not leaf[5] >> bit & 1)
    leaf[5] |= 1 << absent
    with pytest.raises(HostError, match=rf"lacks what the machine has: CPUID.80000001H.0:ECX\[{absent}\]"):
        Machine(origin=(origin := Origin(described)), config=origin.config({}))
    described["cpuid"][0][4] ^= 1
    with pytest.raises(HostError, match="vendor"):
        Machine(origin=(origin := Origin(described)), config=origin.config({}))
    described["version"] = 99
    with pytest.raises(SnapshotError, match="version 99: this pyvmm knows 2"):
        Origin(described)


def test_a_flipped_bit_anywhere_is_refused(flat: Callable[..., Machine], tmp_path: Path) -> None:
    flat(EXIT).snapshot(tmp_path / "snap").close()
    for name in ("snapshot.pyvmm", "memory"):
        path = tmp_path / "snap" / name
        content = path.read_bytes()
        at = next(i for i, byte in enumerate(content) if byte) + len(content) // 3 * (name == "snapshot.pyvmm")
        os.chmod(path, 0o600)
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(SnapshotError, match="damaged"):
            Machine.restore(tmp_path / "snap")
        path.write_bytes(content)
    Machine.restore(tmp_path / "snap").close()


def pyvmm(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmm", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_the_command_goes_on_checks_and_refuses(guest: Callable[[str], str], tmp_path: Path) -> None:
    with Machine(kernel=guest("hello"), memory="64M") as machine:
        machine.snapshot(tmp_path / "snap").close()
    done = pyvmm("restore", tmp_path / "snap")
    assert (done.returncode, done.stderr) == (33, "")
    assert "PASS" in done.stdout
    done = pyvmm("restore", "--check", tmp_path / "snap")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/snap: full, 64 MiB of memory")
    for wrong in ([tmp_path / "none"], ["--disk", "x.img", tmp_path / "snap"], [tmp_path]):
        done = pyvmm("restore", *wrong)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("pyvmm: ")


def test_the_command_makes_another_machine_or_the_same(
    guest: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Machine(kernel=guest("hello"), memory="64M") as machine:
        machine.snapshot(tmp_path / "snap").close()
        then = machine.generation_id.value
    found = []

    def look(machine: Machine, verbose: bool) -> int:
        with machine:
            found.append(machine.generation_id.value)
        return 0

    monkeypatch.setattr(boot, "go_on", look)
    for flags in ([], ["--identity", "new"], ["--identity", "same"]):
        assert restore.run([*flags, "--console", "none", str(tmp_path / "snap")]) == 0
    assert [now == then for now in found] == [False, False, True]
    with pytest.raises(ConfigError, match="--identity: invalid choice: 'old'"):
        restore.run(["--identity", "old", str(tmp_path / "snap")])


def test_the_command_merges_a_chain_into_one_that_stands_alone(guest: Callable[[str], str], tmp_path: Path) -> None:
    with Machine(kernel=guest("hello"), memory="64M") as machine:
        machine.snapshot(tmp_path / "base", differential=True).close()
        machine.memory.write(HEAP, b"written since")
        machine.snapshot(tmp_path / "since", differential=True).close()
    done = pyvmm("merge", tmp_path / "since", tmp_path / "whole")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/whole: full, 64 MiB of memory, ")
    shutil.rmtree(tmp_path / "base")
    with Machine.restore(tmp_path / "whole") as again:
        assert again.memory.read(HEAP, 13) == b"written since"
        assert again.run(timeout=120).status == 33
    done = pyvmm("merge", tmp_path / "since", tmp_path / "whole")  # whose parent is gone
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "without its parent" in done.stderr
    Machine.restore(tmp_path / "whole").close()


def test_what_is_no_snapshot_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(SnapshotError, match=r"^there is no .*/none: give the directory of a snapshot"):
        Machine.restore(tmp_path / "none")
    with pytest.raises(SnapshotError, match="/file is a file: give the directory of a snapshot"):
        Machine.restore(tmp_path / "file")
    with pytest.raises(SnapshotError, match=r"/directory is no snapshot: it has no snapshot\.pyvmm"):
        Machine.restore(tmp_path / "directory")
