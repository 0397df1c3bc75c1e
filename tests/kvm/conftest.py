"""Bare-metal guests for tests that run a machine: built once a session, skipped by name where that cannot be."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migrate import Tls

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "guests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every module of this directory needs KVM unless it says NEEDS_KVM = False."""
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    for item in items:
        here = Path(__file__).parent in item.path.parents
        if here and getattr(getattr(item, "module", None), "NEEDS_KVM", True):
            item.add_marker(pytest.mark.kvm)
            if not usable:
                item.add_marker(pytest.mark.skip(reason="/dev/kvm is missing or may not be opened"))


@pytest.fixture(scope="session")
def guest() -> Callable[[str], str]:
    """The path of a built guest by its name (``"hello"``, ``"hello_real.bin"``).

    ``$PYVMM_GUESTS`` names a directory of guests that are built already; else they are built here.
    """
    built = os.environ.get("PYVMM_GUESTS")
    bin_folder = Path(built) if built else BUILD / "bin"
    if not built:
        _build_guests()

    def path(name: str) -> str:
        found = bin_folder / name
        assert found.exists(), f"{found}: guests/CMakeLists.txt builds no such guest"
        return str(found)

    return path


def _build_guests() -> None:
    for tool in ("cmake", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: guests cannot be built")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # several pytest workers, one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(ROOT / "guests"), "-B", str(BUILD)],
            ["cmake", "--build", str(BUILD), "-j2"],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout


@pytest.fixture
def flat(tmp_path: Path) -> Any:
    """Makes a machine that runs the given long-mode code; all of them are closed in the end."""
    made: list[Machine] = []
    numbers = itertools.count()

    def make(code: bytes, **fields: Any) -> Machine:
        path = tmp_path / f"flat{next(numbers)}.bin"
        path.write_bytes(code)
        machine = Machine(**{"kernel": str(path), "kind": "flat", "mode": "long", "memory": "16M", **fields})
        made.append(machine)
        return machine

    yield make
    for machine in made:
        machine.close()


@pytest.fixture
def meanwhile(flat: Any) -> Callable[[], None]:
    """Returns once another machine has run for a while: what does not stand still would have moved by then."""
    count = bytes.fromhex("31c0 bf00002000 48ffc0 488907 ebf8")  # from 0x200000 on, for ever
    other = flat(count)

    def counted() -> int:
        return int.from_bytes(other.memory.read(0x200000, 8), "little")

    def run() -> None:
        if not other.running:
            other.start()
        until, deadline = counted() + 1000, time.monotonic() + 120
        while counted() < until:
            assert time.monotonic() < deadline, "no machine runs here"
            time.sleep(0.002)

    return run


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tls]:
    """TLS files by name: ``a`` and ``b`` are of one authority, which each trusts, ``other`` of another."""
    from vmm import migrate

    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: there are no certificates")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for authority in ("one", "two"):
        openssl(*new, "-x509", "-subj", f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.pem")
    for name, authority in (("a", "one"), ("b", "one"), ("other", "two")):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signing = ("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return lambda name: migrate.Tls(*(f"{folder}/{file}" for file in (f"{name}.pem", f"{name}.key", "one.pem")))
