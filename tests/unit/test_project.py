"""The project's own files agree with each other: one version number, targets that exist, Pythons that are supported."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import vmm

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.MULTILINE))


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_file_has_the_version_number(project: Any) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", vmm.__version__)
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    places = ["CMakeLists.txt", "pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "Makefile"]
    paths = [*(ROOT / name for name in places), *ROOT.glob("docs/*.[m1]*"), *ROOT.glob("vmm/**/*.py")]
    word = re.compile(rf"(?<![\d.]){re.escape(vmm.__version__)}(?![\d.])")
    found = [str(path.relative_to(ROOT)) for path in paths if word.search(path.read_text())]
    assert found == ["vmm/__init__.py"]


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert vmm.__version__ in headings[0]


def test_cmake_reads_the_version_where_it_is() -> None:
    lines = (ROOT / "CMakeLists.txt").read_text()
    (pattern,) = re.findall(r'file\(STRINGS vmm/__init__.py VMM_VERSION REGEX "(.*)"\)', lines)
    (line,) = [line for line in (ROOT / "vmm/__init__.py").read_text().splitlines() if re.search(pattern, line)]
    assert line == f'__version__ = "{vmm.__version__}"'


def test_help_lists_every_target_that_is_for_people() -> None:
    described = set(re.findall(r"^## ([a-z-]+): \S", MAKEFILE, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE).group(1).split()) - {"\\"}  # type: ignore[union-attr]
    assert phony == TARGETS
    assert phony - described == {"coverage-native", "coverage-python"}  # the halves of one
    assert described <= phony
    shown = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == described


def test_the_workflow_and_the_contributors_page_name_targets_that_exist() -> None:
    for text in (WORKFLOW, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "README.md").read_text()):
        named = set(re.findall(r"(?:^ +|run: |`)make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert len(named) >= 3 and named <= TARGETS
    for target in ("lint", "test", "tidy", "docs", "coverage", "wheel", "try-wheel"):
        assert f"run: make {target}\n" in WORKFLOW


def test_the_workflow_runs_every_python_that_is_claimed(project: Any) -> None:
    claimed = re.findall(r":: Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    matrices = re.findall(r"^ +python-version: \[(.*)\]$", WORKFLOW, re.MULTILINE)
    assert len(matrices) == 2
    assert all(re.findall(r'"([\d.]+)"', matrix) == claimed for matrix in matrices)
    assert project["project"]["requires-python"] == f">={claimed[0]}"
    assert f"py{claimed[0].replace('.', '')}" == project["tool"]["ruff"]["target-version"]
    assert f'"py_limited_api": "cp{claimed[0].replace(".", "")}"' in (ROOT / "setup.py").read_text()


def test_each_stamp_of_the_makefile_is_a_dependency_group(project: Any) -> None:
    stamps = set(re.findall(r"\$\(VENV\)/\.([a-z]+)$", MAKEFILE, re.MULTILINE)) - {"done"}
    assert stamps == set(project["dependency-groups"])
