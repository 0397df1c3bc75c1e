"""Findings are kept for one KVM on one kernel, and found anew for another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vmm import host
from vmm.cache_root import cache_root
from vmm.cpu.findings import Findings
from vmm.host import known

if TYPE_CHECKING:
    from pathlib import Path


def module(sysfs: Path, name: str, *, version: str = "", **parameters: str) -> None:
    """A module as sysfs shows it."""
    (sysfs / name / "parameters").mkdir(parents=True, exist_ok=True)
    if version:
        (sysfs / name / "srcversion").write_text(f"{version}\n")
    for parameter, value in parameters.items():
        (sysfs / name / "parameters" / parameter).write_text(f"{value}\n")


def test_the_identity_names_kernel_modules_versions_and_parameters(tmp_path: Path) -> None:
    module(tmp_path, "kvm", ignore_msrs="N")
    module(tmp_path, "kvm_amd", version="533BB7E5866E52F63B9ACCB", nested="1", npt="Y")
    module(tmp_path, "other", secret="1")
    (tmp_path / "kvm_amd" / "parameters" / "folder").mkdir()  # what cannot be read is left out
    text = host.identity(str(tmp_path))
    assert text.startswith(f"{os.uname().release} {os.uname().version} kvm ignore_msrs=N kvm_amd")
    assert text.endswith("kvm_amd srcversion=533BB7E5866E52F63B9ACCB nested=1 npt=Y")
    assert "\n" not in text


@pytest.mark.parametrize(
    "change",
    [{"version": "B"}, {"npt": "N"}, {"nested": "1"}],
    ids=["version", "parameter", "parameter that came"],
)
def test_a_module_loaded_anew_has_another_identity(tmp_path: Path, change: dict[str, str]) -> None:
    module(tmp_path, "kvm_amd", version="A", npt="Y")
    before = host.identity(str(tmp_path))
    assert host.identity(str(tmp_path)) == before
    module(tmp_path, "kvm_amd", **{"version": "A", "npt": "Y", **change})
    assert host.identity(str(tmp_path)) != before


def test_a_parameter_of_several_lines_is_one_word_list(tmp_path: Path) -> None:
    module(tmp_path, "kvm", odd="a\nb")
    assert host.identity(str(tmp_path)).endswith("kvm odd=a b")


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and a list of the probes made; none runs a guest."""
    made: list[str] = []

    def probe(kvm: str) -> Findings:
        made.append(kvm)
        found = Findings()
        found.missing, found.basis = ["popcnt"], {"missing": "of 21 instructions 1 KVM could not emulate"}
        return found

    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vmm.cpu.probe.probe", probe)
    monkeypatch.setattr(known, "_known", {})
    return made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a new process."""
    monkeypatch.setattr(known, "_known", {})


def test_a_probe_is_made_once_for_one_kvm(probes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = host.findings("/dev/null")
    forget(monkeypatch)
    again = host.findings("/dev/null")
    assert probes == ["/dev/null"]
    assert again is not first
    assert again.as_text() == first.as_text()


def test_another_kvm_is_probed(probes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    host.findings("/dev/null")
    for text in ("6.1.0 #2 kvm kvm_amd npt=N", "6.1.0 #2 kvm kvm_amd npt=Y"):
        forget(monkeypatch)
        monkeypatch.setattr(known, "identity", lambda text=text: text)
        host.findings("/dev/null")
        forget(monkeypatch)
        host.findings("/dev/null")
    assert len(probes) == 3


def test_a_damaged_cache_costs_a_probe(probes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    host.findings("/dev/null")
    (file,) = os.listdir(cache_root())
    with open(os.path.join(cache_root(), file), "w") as cache:
        cache.write(f"{host.identity()}\nnative=maybe")
    forget(monkeypatch)
    assert host.findings("/dev/null").missing == ["popcnt"]
    assert len(probes) == 2
