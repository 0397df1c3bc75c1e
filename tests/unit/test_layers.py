"""How the library is laid out: who imports whom, what start-up imports, and that all that is public says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmm

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(vmm.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]


def module(path: Path) -> str:
    """``vmm.cpu.vcpu`` of ``.../vmm/cpu/vcpu.py``."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {module(path) for path in SOURCES}


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(tree: ast.AST, *, types: bool = False) -> Iterator[str]:
    """Modules that are imported when the code runs, wherever the statement stands; with ``types`` for types also."""
    for node in ast.iter_child_nodes(tree):
        if is_typing_only(node) and not types:
            assert isinstance(node, ast.If)
            for other in node.orelse:
                yield from imported(other, types=types)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports name their module in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in KNOWN else node.module
        else:
            yield from imported(node, types=types)


IMPORTS = {module(path): set(imported(ast.parse(path.read_text()))) for path in SOURCES}
WITH_TYPES = {module(path): set(imported(ast.parse(path.read_text()), types=True)) & KNOWN for path in SOURCES}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offenders(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if inside(name, *importers) and inside(other, *forbidden)
    ]


def test_the_scan_sees_the_imports_there_are() -> None:
    assert "vmm.boot" in IMPORTS["vmm.machine.build"]  # within a function
    assert "vmm.devices.device" in IMPORTS["vmm.devices.uart"]
    assert "vmm.machine" not in IMPORTS["vmm.control"]  # for types only
    assert "vmm.machine" in WITH_TYPES["vmm.control"]


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        (("vmm.devices",), ("vmm.machine", "vmm.cpu", "vmm.cli", "vmm.boot", "vmm.config")),
        (("vmm.cpu",), ("vmm.devices", "vmm.machine", "vmm.boot", "vmm.cli", "vmm.host")),
        (("vmm.boot",), ("vmm.machine", "vmm.devices", "vmm.cpu", "vmm.cli", "vmm._ffi")),
        (("vmm.linux",), ("vmm.machine", "vmm.devices", "vmm.cpu", "vmm.cli", "vmm._ffi")),
        (("vmm.observe",), ("vmm.machine", "vmm.migrate", "vmm.cli", "vmm._ffi")),
        (("vmm.snapshot",), ("vmm.machine", "vmm.migrate", "vmm.observe", "vmm.cli")),
        (("vmm.disk", "vmm.net"), ("vmm.machine", "vmm.devices", "vmm.snapshot", "vmm.cpu", "vmm.boot", "vmm.cli")),
        (("vmm.host",), ("vmm.machine", "vmm.devices", "vmm.snapshot", "vmm.boot", "vmm.observe", "vmm.cli")),
        (("vmm._ffi", "vmm.errors", "vmm.layout"), ("vmm.machine", "vmm.bus", "vmm.memory", "vmm.config", "vmm.boot")),
        (("vmm.bus", "vmm.memory", "vmm.irq", "vmm.console", "vmm.config"), ("vmm.devices", "vmm.boot", "vmm.cpu")),
    ],
    ids=lambda names: names[0] if len(names) < 4 else "",
)
def test_a_layer_does_not_import_what_lies_above_it(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    assert any(inside(name, *importers) for name in IMPORTS)
    assert offenders(importers, forbidden) == []


def test_only_the_command_the_test_kit_and_who_receives_one_import_the_machine() -> None:
    # vmm itself offers Machine under its own name, on first use
    users = {name for name, others in WITH_TYPES.items() if "vmm.machine" in others} - {"vmm"}
    allowed = ("vmm.cli", "vmm.testing", "vmm.migrate.destination", "vmm.control")
    assert [name for name in users if not inside(name, *allowed)] == []
    assert users


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan, SIAM J. Comput. 1(2), 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name] - {name}):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def test_no_modules_import_one_another_types_included() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles(WITH_TYPES) == []


def test_native_code_is_reached_through_one_door() -> None:
    assert {name for name, others in IMPORTS.items() if "vmm._native" in others} == {"vmm._ffi"}


# ---- what start-up imports ----

HEAVY = (
    "numpy",
    "capstone",
    "elftools",
    "rich",
    "lz4",
    "zstandard",
    "argparse",
    "subprocess",
    "tempfile",
    "dataclasses",
)


@pytest.mark.parametrize("name", ["vmm", "vmm.machine", "vmm.cli.boot", "vmm.console.pump"])
def test_importing_brings_nothing_heavy(name: str) -> None:
    # -S: what site-packages' own start-up files import is not ours
    script = (
        f"import sys; sys.path[:] = {[str(ROOT.parent), *sys.path]!r}; before = set(sys.modules); import {name}; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    brought = {loaded.split(".")[0] for loaded in done.stdout.split()}
    assert "vmm" in brought
    assert brought.isdisjoint(HEAVY), brought & set(HEAVY)


# ---- docstrings ----


def public(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public classes and functions, and public methods of those; not what is nested in a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if any(isinstance(other, ast.Attribute) and other.attr == "setter" for other in node.decorator_list):
                continue  # its property says what it is
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def is_declaration(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """A protocol's ``def f(self): ...``: the class says what it means."""
    body = node.body[0]
    return isinstance(body, ast.Expr) and isinstance(body.value, ast.Constant) and body.value.value is ...


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    silent = [
        f"{path.name}:{node.lineno} {node.name}"
        for node in public(tree)
        if not ast.get_docstring(node) and not is_declaration(node)
    ]
    assert silent == []
    assert ast.get_docstring(tree) or not tree.body, "the module says nothing of itself"
