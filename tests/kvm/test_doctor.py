"""``pyvmm doctor``: what it says of this host agrees with what machines on it do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from vmm import host
from vmm.cli.doctor import as_text, consequences, examine
from vmm.cpu.findings import VERDICTS, Findings
from vmm.cpu.probe import probe
from vmm.cpu.tiny_guest import OUT_DONE, TinyGuest

if TYPE_CHECKING:
    from collections.abc import Iterator


def doctor(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmm", "doctor", *flags], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = doctor("--json")
    assert (done.returncode, done.stderr) == (0, "")
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_the_report_says_what_the_probes_find(report: dict[str, Any]) -> None:
    found = host.findings()
    assert report["usable"] is True and "problem" not in report
    assert report["device"] == "/dev/kvm"
    assert report["backend"] == host.backend()
    assert report["guest_kernel_code"] == ("native" if found.native else "emulated")
    assert report["missing_instructions"] == found.missing
    assert report["cpuid_forced"] == found.cpuid_forced
    for name in ("syscall_broken", "vmcall_loops", "tsc_fixed", "shadowed", "unstopped", "unpaged"):
        assert report[name] == getattr(found, name)


def test_the_report_says_what_each_verdict_is_based_on(report: dict[str, Any]) -> None:
    names = {"native": "guest_kernel_code", "missing": "missing_instructions"}
    assert list(report["basis"]) == [names.get(name, name) for name in VERDICTS]
    assert set(report["basis"]) <= set(report)
    lines = as_text(report).splitlines()
    for name, text in report["basis"].items():
        assert sum(line.strip().startswith(name.replace("_", " ")) and line.endswith(text) for line in lines) >= 1


@pytest.fixture
def two_busy_loops_per_cpu() -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.usefixtures("two_busy_loops_per_cpu")
def test_every_probe_of_a_busy_host_comes_to_the_same_verdicts() -> None:
    quiet = host.findings().verdicts()
    for statistics in (True, False):
        found = probe(statistics=statistics)
        assert found.verdicts() == quiet, found.basis


def test_without_statistics_two_levels_are_compared() -> None:
    counted, timed = probe(), probe(statistics=False)
    assert "insn_emulation" not in timed.basis["native"] + timed.basis["vmcall_loops"]
    assert "CPL 0" in timed.basis["native"]
    assert timed.verdicts() == counted.verdicts()


def spin(*, statistics: bool, code: bytes = b"\xeb\xfe") -> TinyGuest:
    """A guest that was run, and never ends by itself (jmp to itself)."""
    guest = TinyGuest("/dev/kvm", patience_ns=20_000_000)
    if not statistics:
        guest.forget_statistics()
    guest.enter(code, cpl=3)
    assert guest.run() == "stuck"
    return guest


@pytest.mark.parametrize("statistics", [True, False])
def test_a_guest_that_goes_nowhere_is_ended_by_what_it_did(statistics: bool) -> None:
    guest = spin(statistics=statistics)
    assert "no register changed" in guest.why_stuck
    guest.enter(OUT_DONE)  # and the machine is good for another run
    assert guest.run() == "done"
    assert guest.why_stuck == ""
    guest.close()


def test_a_guest_that_goes_on_is_not_stuck_however_long_it_takes() -> None:
    # mov ecx, n; L: dec ecx; jnz L
    loop = b"\xb9" + (600_000_000).to_bytes(4, "little") + b"\xff\xc9\x75\xfc" + OUT_DONE
    guest = TinyGuest("/dev/kvm")
    guest.enter(loop, cpl=3)
    assert guest.run() == "done"
    guest.patience_ns = guest.cpu_ns // 50  # so many looks, at a register that changes
    guest.enter(loop, cpl=3)
    assert guest.run() == "done"
    assert guest.why_stuck == ""
    guest.close()


def test_figures_are_of_this_world(report: dict[str, Any]) -> None:
    assert 0.01 < report["instruction_ns"] < 100_000
    assert 0.1 < report["exit_us"] < 10_000
    assert report["instruction_ns"] < report["exit_us"] * 1000


def test_every_capability_is_reported_and_the_needed_ones_are_there(report: dict[str, Any]) -> None:
    expected = {name for name, _ in (*host.NEEDED.values(), *host.USED.values())}
    assert set(report["capabilities"]) == expected
    assert all(report["capabilities"][name] > 0 for name, _ in host.NEEDED.values())
    assert report["capabilities"]["KVM_CAP_MAX_VCPUS"] >= 1


def test_text_says_the_same_for_a_person(report: dict[str, Any]) -> None:
    done = doctor()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["device", "/dev/kvm", "(readable", "and", "writable)"]
    assert any(line.split() == ["machines", "can", "run", "here"] for line in lines)
    for name in report["capabilities"]:
        assert sum(name in line.split() for line in lines) == 1, name
    after = lines[lines.index("departures from the architecture") + 1 :]
    assert len(after) == max(1, len(report["consequences"]))


def test_each_departure_has_a_consequence() -> None:
    found = Findings()
    assert consequences(found) == []
    found.native, found.instruction_ns = False, 600.0
    found.missing = ["popcnt", "xsave"]
    found.syscall_broken = found.vmcall_loops = found.tsc_fixed = found.shadowed = True
    found.cpuid_forced = ["avx2"]
    found.unstopped = ["breakpoint", "write"]
    found.unpaged = ["32-bit", "PAE"]
    said = consequences(found)
    assert len(said) == 9
    for words in (
        "600 ns", "popcnt, xsave", "SYSCALL", "hypercall", "avx2", "TSC", "page tables", "breakpoint, write",
        "32-bit or PAE paging",
    ):  # fmt: skip
        assert sum(words in text for text in said) == 1, words


def test_findings_survive_the_cache() -> None:
    found = host.findings()
    assert set(found.basis) == set(VERDICTS)
    again = Findings.from_text(found.as_text())
    assert all(getattr(again, name) == getattr(found, name) for name in Findings.__slots__)


@pytest.mark.parametrize("text", ["", "native=True\n", "basis.native=x\n", "nonsense", "native"])
def test_a_damaged_cache_is_not_believed(text: str) -> None:
    with pytest.raises(ValueError):
        Findings.from_text(text)


@pytest.mark.parametrize(("path", "why"), [("/nonexistent/kvm", "does not exist"), ("/dev/null", "is not KVM")])
def test_a_device_that_is_not_kvm_is_status_2_with_the_fix(path: str, why: str) -> None:
    done = doctor("--json", "--kvm", path)
    assert (done.returncode, done.stderr) == (2, "")
    report = json.loads(done.stdout)
    assert report["usable"] is False
    assert why in report["problem"]
    assert report["problem"] in as_text(examine(path))
    assert doctor("--kvm", path).returncode == 2
