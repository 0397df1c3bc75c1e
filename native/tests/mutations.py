#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Break the concurrency logic on purpose, one mutation at a time, and see that a test notices each time it runs.

    make mutations                      all of them, 20 runs each
    native/tests/mutations.py --runs 5 --only kick

Works on a copy of the native tree in build/mutations, of which a mutation rebuilds one file. Exit status 1: some
mutation survived a run, or a test failed without any. Needs gcc or clang, CMake, two processors; no /dev/kvm.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "mutations" / "tree"
BUILD = ROOT / "build" / "mutations" / "build"
LIMIT = 60  # seconds that a run may take to notice
SKIPPED = 77

FENCE = "atomic_thread_fence(memory_order_seq_cst);"
ANNOUNCE = "atomic_store(&vcpu->epoch, atomic_load_explicit(&bus->epoch, memory_order_relaxed));"
RELAXED = ANNOUNCE.replace("atomic_store(", "atomic_store_explicit(", 1).replace("));", "), memory_order_relaxed);")


@dataclass(frozen=True)
class Mutation:
    """`old`, which `function` has once, becomes `new`; `test` (with its arguments) is to fail then."""

    name: str
    function: str
    old: str
    new: str
    test: tuple[str, ...]


MUTATIONS = (
    Mutation("arm: no fence", "vmm_queue_arm", FENCE, "", ("test_fences", "vmm_queue_arm")),
    Mutation("publish, split: no fence", "split_publish", FENCE, "", ("test_fences", "vmm_queue_publish, split")),
    Mutation("publish, packed: no fence", "packed_publish", FENCE, "", ("test_fences", "vmm_queue_publish, packed")),
    Mutation("dirty log: no fence", "touch_pages", FENCE, "", ("test_fences", "vmm_vm_dirty")),
    Mutation(
        "kick: no immediate_exit",
        "kick_locked",
        "__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);",
        "",
        ("test_run",),
    ),
    Mutation("PIO: not unsettled", "exit_pio", "vcpu->unsettled = true;", "", ("test_run",)),
    Mutation("bus: no epoch announced", "vmm_bus_access", ANNOUNCE, "(void)0;", ("test_bus",)),
    Mutation("bus: epoch announced relaxed", "vmm_bus_access", ANNOUNCE, RELAXED, ("test_fences", "vmm_bus_access")),
    Mutation("MMIO: not unsettled", "exit_mmio", "vcpu->unsettled = true;", "", ("test_run",)),
    Mutation("park: not settled", "attend", "settle(vcpu);", "", ("test_run",)),
    Mutation(
        "kick: no signal",
        "kvm_kick",
        "syscall(SYS_tgkill, getpid(), vcpu_of(vcpu)->thread, kick_signal());",
        "(void)vcpu_of(vcpu), (void)kick_signal();",
        ("test_run",),
    ),
    Mutation(
        "pause: vCPUs not waited for",
        "vmm_vm_await_pause",
        "while (asked && any_in_state(vm, VMM_VCPU_RUNNING) && !late)",
        "if (late)",
        ("test_run",),
    ),
    Mutation(
        "pause: I/O thread goes on", "hold_loop_locked", "vmm_loop_request_pause(vm->loop);", "(void)0;", ("test_run",)
    ),
    Mutation("resume: wakes no vCPU", "vmm_vm_resume", "pthread_cond_broadcast(&vm->changed);", "", ("test_run",)),
    Mutation(
        "detach: does not wait",
        "wait_until_passed",
        "while (!vmm_current_vcpu && !passed(vm, epoch))",
        "(void)vm, (void)epoch, (void)passed;\n    if (0)",
        ("test_bus",),
    ),
    Mutation(
        "detach: own table freed",
        "held_by_caller",
        "return seen && seen < epoch;",
        "(void)epoch;\n    return seen > seen + 1;",
        ("test_bus",),
    ),
    Mutation(
        "bus: inner access ends outer",
        "vmm_bus_access",
        "if (!outer)\n        atomic_store_explicit(&vcpu->epoch, 0",
        "atomic_store_explicit(&vcpu->epoch, 0",
        ("test_bus",),
    ),
)


def mutated(mutation: Mutation) -> tuple[Path, str]:
    """The file of the copy that defines the function, and its mutated text. SystemExit: no such text, or two."""
    definition = re.compile(rf"^[a-z][\w \*]*\b{mutation.function}\([^;{{]*\)\n{{\n.*?^}}\n", re.MULTILINE | re.DOTALL)
    found = []
    for path in sorted((TREE / "native").glob("[!t]*/*.c")):
        text = path.read_text()
        found += [(path, text, match) for match in definition.finditer(text)]
    if len(found) != 1 or found[0][2].group().count(mutation.old) != 1:
        sys.exit(
            f"{mutation.name}: '{mutation.old}' is not found once in {mutation.function}(): the code has changed, "
            "adapt MUTATIONS in native/tests/mutations.py"
        )
    path, text, match = found[0]
    body = match.group().replace(mutation.old, mutation.new)
    return path, text[: match.start()] + body + text[match.end() :]


def write(path: Path, text: bytes) -> None:
    """Write what differs only, so that nothing else is built again."""
    if not path.exists() or path.read_bytes() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def copy_tree() -> None:
    sources = [
        ROOT / "CMakeLists.txt",
        ROOT / "vmm" / "__init__.py",
        *(p for p in (ROOT / "native").rglob("*") if p.suffix in (".c", ".h")),
    ]
    for source in sources:
        write(TREE / source.relative_to(ROOT), source.read_bytes())
    for path in TREE.rglob("*"):
        if path.is_file() and not (ROOT / path.relative_to(TREE)).exists():
            path.unlink()


def build(tests: set[str]) -> None:
    targets = [f"{test}_plain" for test in sorted(tests)]
    subprocess.run(["cmake", "--build", str(BUILD), "-j2", "--target", *targets], check=True, stdout=subprocess.DEVNULL)


def run(test: tuple[str, ...]) -> tuple[bool | None, float]:
    """Whether the test failed (None: it says that it could prove nothing), and after how many seconds."""
    program = [str(BUILD / f"{test[0]}_plain"), *test[1:]]
    environment = os.environ | {"VMM_TEST_PATIENCE_MS": "20000"}
    start = time.monotonic()
    try:
        status = subprocess.run(
            program, env=environment, timeout=LIMIT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
    except subprocess.TimeoutExpired:
        return None, LIMIT
    return None if status == SKIPPED else status != 0, time.monotonic() - start


def try_mutation(mutation: Mutation, runs: int) -> bool:
    """Print a row of the table; return whether every run noticed the mutation."""
    path, text = mutated(mutation)
    original = path.read_bytes()
    write(path, text.encode())
    try:
        build({mutation.test[0]})
        results = [run(mutation.test) for _ in range(runs)]
    finally:
        write(path, original)
    caught = sum(failed is True for failed, _ in results)
    slowest = max(seconds for _, seconds in results)
    print(f"{mutation.name:<32} {' '.join(mutation.test):<44} {caught:>3}/{runs:<3} {slowest:>8.1f} s", flush=True)
    return caught == runs


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the concurrency logic on purpose; the tests are to notice.")
    parser.add_argument("--runs", type=int, default=20, help="runs of the test for each mutation (default: 20)")
    parser.add_argument("--only", default="", help="only mutations whose name contains this text")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    if not chosen:
        parser.error(f"no mutation's name contains '{arguments.only}'")
    if shutil.which("cmake") is None:
        parser.error("cmake is not installed: sudo apt-get install cmake")
    copy_tree()
    for mutation in MUTATIONS:
        mutated(mutation)
    subprocess.run(
        ["cmake", "-S", str(TREE), "-B", str(BUILD), "-DVMM_GUESTS=OFF"], check=True, stdout=subprocess.DEVNULL
    )
    tests = {mutation.test for mutation in chosen}
    build({test[0] for test in tests})
    for test in sorted(tests):
        failed, seconds = run(test)
        verdict = {True: "failed", False: "passed", None: "nothing proven"}[failed]
        print(f"{'(none)':<32} {' '.join(test):<44} {verdict:>7} {seconds:>8.1f} s", flush=True)
        if failed:
            return 1
    survived = [mutation for mutation in chosen if not try_mutation(mutation, arguments.runs)]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations noticed in each of {arguments.runs} runs")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
