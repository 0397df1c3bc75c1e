"""``pyvmm doctor``: what it says of this host agrees with what machines on it do."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from vmm import host
from vmm.cli.doctor import as_text, consequences, examine


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
    for name in ("syscall_broken", "vmcall_loops", "tsc_fixed", "shadowed"):
        assert report[name] == getattr(found, name)


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
    found = host.Findings()
    assert consequences(found) == []
    found.native, found.instruction_ns = False, 600.0
    found.missing = ["popcnt", "xsave"]
    found.syscall_broken = found.vmcall_loops = found.tsc_fixed = found.shadowed = True
    found.cpuid_forced = ["avx2"]
    said = consequences(found)
    assert len(said) == 7
    for words in ("600 ns", "popcnt, xsave", "SYSCALL", "hypercall", "avx2", "TSC", "page tables"):
        assert sum(words in text for text in said) == 1, words


def test_findings_survive_the_cache() -> None:
    found = host.findings()
    again = host.Findings.from_text(found.as_text())
    assert all(getattr(again, name) == getattr(found, name) for name in host.Findings.__slots__)


@pytest.mark.parametrize("text", ["", "native=True\n", "nonsense", "native"])
def test_a_damaged_cache_is_not_believed(text: str) -> None:
    with pytest.raises(ValueError):
        host.Findings.from_text(text)


@pytest.mark.parametrize(("path", "why"), [("/nonexistent/kvm", "does not exist"), ("/dev/null", "is not KVM")])
def test_a_device_that_is_not_kvm_is_status_2_with_the_fix(path: str, why: str) -> None:
    done = doctor("--json", "--kvm", path)
    assert (done.returncode, done.stderr) == (2, "")
    report = json.loads(done.stdout)
    assert report["usable"] is False
    assert why in report["problem"]
    assert report["problem"] in as_text(examine(path))
    assert doctor("--kvm", path).returncode == 2
