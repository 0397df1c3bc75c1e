"""How the native half is laid out: which object file uses which, from the symbols of the built library, and which
header includes which. No cycles, and no layer that names one above it."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
OBJECTS = ROOT / "build" / "native" / "CMakeFiles" / "vmmcore.dir" / "native"

# What each folder may use, itself aside. core calls the engine through its table of operations only: it may read the
# contract (headers), and none of its symbols.
USES = {
    "base": set(),
    "engine": {"base"},
    "core": {"base"},
    "time": {"base", "core"},
    "machine": {"base", "engine", "core", "time"},
    "compat": {"base", "core"},
    "devices": {"base", "core"},
    "disk": {"base"},
    "net": {"base"},
    "virtio": {"base", "core", "time", "devices", "disk", "net"},
}
INCLUDES = {**USES, "core": {"base", "engine"}}

# Cycles that are left, each as the sorted names of its files. One that is gone must go from here, too.
KNOWN_CYCLES: set[tuple[str, ...]] = set()

RINGS = {"virtio/queue.c", "virtio/chain.c"}
MEMORY = {"core/memory.c", "core/written.c"}

Graph = dict[str, dict[str, set[str]]]


def sources() -> list[str]:
    return sorted(str(path.relative_to(NATIVE)) for folder in USES for path in (NATIVE / folder).glob("*.c"))


def object_of(source: str) -> Path:
    return OBJECTS / f"{source}.o"


def symbols(source: str) -> tuple[set[str], set[str]]:
    """The global symbols that an object defines, and those that it leaves to others."""
    listed = subprocess.run(["nm", "-P", object_of(source)], capture_output=True, text=True, check=True).stdout
    defined, undefined = set(), set()
    for line in listed.splitlines():
        name, kind = line.split()[:2]
        if kind == "U":
            undefined.add(name)
        elif kind.isupper():
            defined.add(name)
    return defined, undefined


@cache
def graph() -> Graph:
    """File -> file -> the symbols by which the first uses the second."""
    if missing := [source for source in sources() if not object_of(source).exists()]:
        pytest.skip(f"no object of {missing[0]}: make setup")
    tables = {source: symbols(source) for source in sources()}
    owners = {name: source for source, (defined, _) in tables.items() for name in defined}
    uses: Graph = {source: defaultdict(set) for source in tables}
    for source, (_, undefined) in tables.items():
        for name in undefined & owners.keys():
            uses[source][owners[name]].add(name)
    return uses


def cycles(uses: dict[str, dict[str, set[str]]]) -> set[tuple[str, ...]]:
    """The strongly connected components of more than one file (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[tuple[str, ...]] = set()

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in uses[file]:
            if other not in index:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in stack:
                low[file] = min(low[file], index[other])
        if low[file] == index[file]:
            at = stack.index(file)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.add(tuple(sorted(component)))

    for file in uses:
        if file not in index:
            visit(file)
    return found


def folder(file: str) -> str:
    return file.split("/")[0]


def test_no_files_call_each_other_in_a_circle() -> None:
    assert cycles(graph()) == KNOWN_CYCLES


def test_a_circle_is_found() -> None:
    assert cycles({"a": {"b": {"f"}}, "b": {"c": {"g"}}, "c": {"a": {"h"}}, "d": {"a": {"f"}}}) == {("a", "b", "c")}
    assert cycles({"a": {"b": {"f"}}, "b": {}}) == set()


@pytest.mark.parametrize("layer", USES)
def test_a_layer_uses_only_those_below(layer: str) -> None:
    wrong = {
        f"{file} uses {sorted(names)} of {other}"
        for file, others in graph().items()
        for other, names in others.items()
        if folder(file) == layer and folder(other) not in USES[layer] | {layer}
    }
    assert not wrong


@pytest.mark.parametrize("layer", INCLUDES)
def test_a_layer_includes_only_headers_of_those_below(layer: str) -> None:
    wrong = {
        f"{path.name} includes {name}"
        for path in (NATIVE / layer).glob("*.[ch]")
        for name in re.findall(r'^#include "(\w+)/', path.read_text(), re.MULTILINE)
        if name not in INCLUDES[layer] | {layer, "vmm"}
    }
    assert not wrong


def test_rings_use_only_guest_memory() -> None:
    used = {other for ring in RINGS for other in graph()[ring]}
    assert {file for file in used if folder(file) != "base"} <= RINGS | MEMORY


def test_only_the_composition_root_names_an_engine() -> None:
    named = {file for file, others in graph().items() for other in others if folder(other) == "engine"}
    assert {file for file in named if folder(file) != "engine"} == {"machine/vm.c"}


def test_no_ioctl_of_kvm_outside_the_engine() -> None:
    outside = {
        str(path.relative_to(NATIVE))
        for layer in USES.keys() - {"engine"}
        for path in (NATIVE / layer).glob("*.[ch]")
        if re.search(r"\bKVM_RUN\b(?!.*\*/)|ioctl\([^;]*\bKVM_", re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S))
    }
    assert not outside
