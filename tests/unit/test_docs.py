"""The documentation is true: its code runs, its paths exist, its flags and statuses are the command's."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from vmm.cli import merge, migrate, profile, receive, restore, serve, snapshot, standby, trace
from vmm.cli.boot_arguments import FLAGS
from vmm.observe.verdict import CAUSES
from vmm.outcome import REASONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def _program(page: Path) -> str:
    """The page with everything but its Python blocks made blank, so that a traceback names the page's line."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines)


@pytest.mark.kvm
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing or may not be opened")
@pytest.mark.parametrize(
    ("page", "leaves"),
    [
        ("write-a-device", {"Multiplier", "device", "machine", "outcome", "product"}),
        ("write-a-virtio-device", {"Entropy", "Scratchpad", "answer"}),
        pytest.param("debug-with-gdb", {"passes", "outcome", "lost"}, marks=pytest.mark.stops("breakpoint")),
        ("trace-exits", {"trace", "slowest", "again", "profile"}),
        ("snapshots", {"fresh", "tuesday", "again"}),
        ("clones", {"clones", "grandchild", "numbered"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_of_a_page_runs(page: str, leaves: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = DOCS / f"{page}.md"
    names: dict[str, object] = {"__name__": page.replace("-", "_")}
    exec(compile(_program(path), path, "exec"), names)
    assert leaves <= names.keys()


# Words of people for threads, devices and pages: CONTRIBUTING.md says what to write instead.
NOT_THE_FIELDS_OWN = re.compile(
    r"\b(answers|answered|answering|whoever|nobody|somebody|everybody|anybody)\b", re.IGNORECASE
)


def test_pages_for_users_use_the_terms_of_the_field() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *DOCS.glob("*.md"),
        *DOCS.glob("labs/*.md"),
        DOCS / "pyvmm.1",
    ]
    assert len(pages) > 25
    found = [
        f"{page.relative_to(ROOT)}:{number}: {line.strip()}"
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if NOT_THE_FIELDS_OWN.search(line)
    ]
    assert found == []


def test_every_cause_of_a_guests_death_is_in_the_guide() -> None:
    table = (DOCS / "debug-a-boot.md").read_text().split("## The causes")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(CAUSES)


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/write-a-device.md", "docs/write-a-virtio-device.md"])
def test_paths_named_in_a_page_exist(page: str) -> None:
    named = set(re.findall(r"`((?:vmm|native|guests|tests|bench|docs)/[\w./-]*)`", (ROOT / page).read_text()))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_manual_page_has_every_flag_and_exit_status() -> None:
    manual = (DOCS / "pyvmm.1").read_text().replace("\\-", "-")
    entries = re.findall(r"^\.TP\n\.BR? (.*)$", manual, re.MULTILINE)
    flags = {word for entry in entries for word in re.findall(r"--[a-z-]+", entry)}
    others = {
        flag
        for command in (merge, migrate, profile, receive, restore, serve, snapshot, standby, trace)
        for flag in command._parser()._option_string_actions
    }
    others = {flag for flag in others if flag.startswith("--")}
    assert flags == {*FLAGS, *others, "--config", "--verbose", "--help", "--version", "--json", "--kvm"}
    statuses = {entry.split()[0]: entry for entry in entries if entry[0].isdigit()}
    for reason, (status, _) in REASONS.items():
        if reason not in ("debug-exit", "stopped"):
            assert reason in statuses[str(status)]


def test_each_threat_names_a_test_that_exists() -> None:
    tests = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("native/tests/*.[ch]"), *ROOT.glob("native/fuzz/*.[ch]")]
    text = "\n".join(f"{path.stem}\n{path.read_text()}" for path in tests)
    known = set(re.findall(r"\w+", text)) | {name.removeprefix("test_") for name in re.findall(r"test_\w+", text)}
    pages = sorted((DOCS / "threats").glob("*.md"))
    assert len(pages) >= 10
    for page in pages:
        rows = [line for line in page.read_text().splitlines() if line.startswith("|") and not line.startswith("|-")]
        named = [set(re.findall(r"`(?:[\w/.]+::)?([a-z]\w+)`", row.rstrip("|").rsplit("|", 1)[-1])) for row in rows[1:]]
        assert len(named) > 3, page
        missing = {name for names in named for name in names if name.count("_") >= 2} - known
        assert missing == set(), page


# Rows of the devices' tables that say why there is none.
WITHOUT_A_TEST = ("no test:", "(the host's limit)", "by construction")


def test_each_row_of_a_devices_table_names_what_shows_it() -> None:
    tests = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("native/tests/*.[ch]"), *ROOT.glob("native/fuzz/*.[ch]")]
    text = "\n".join(path.read_text() for path in tests)
    known = {name for name in re.findall(r"(?:def|void|bool) (?:test_)?(\w+)\(", text) if name.count("_") >= 2}
    for device in ("balloon", "blk", "console", "fs", "net", "pci", "queue", "rng", "vsock"):
        rows = [row for row in (DOCS / f"threats/{device}.md").read_text().splitlines() if row.startswith("| ")]
        assert len(rows) >= 5, device
        for row in rows:
            shown = row.rstrip("| ").rsplit("|", 1)[-1].strip()
            if shown in ("test", "shown by", "Shown by") or shown.startswith(WITHOUT_A_TEST):
                continue
            named = {name.removeprefix("test_") for name in re.findall(r"\w+", shown)}
            assert named & known or "fuzz_" in shown or re.fullmatch(r"\[[FS]\]", shown), row
