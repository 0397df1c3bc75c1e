"""The hosts made of software that `make svm` and `make vmx` run tests on: what goes wrong gets one sentence."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.svm import emulator, packages
from vmm.errors import HostError

ROOT = Path(__file__).resolve().parents[2]


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("module", "missing", "package"),
    [("tests.svm", "qemu-system-x86_64", "qemu-system-x86"), ("tests.vmx", "bochs", "bochs")],
)
def test_a_missing_emulator_is_named_with_its_package(tmp_path: Path, module: str, missing: str, package: str) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "PYVMM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", module, "run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        line for line in done.stderr.splitlines() if line.startswith(f"{module[6:]}: {missing} is missing")
    ]
    assert f"apt-get install {package}" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_the_closure_is_what_apt_lists_with_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stand_in(tmp_path, "apt-get", "echo \"'http://x/b_2_all.deb' b_2_all.deb 20 SHA256:0\"; echo noise; "
             "echo \"'http://x/a_1%3a1_amd64.deb' a_1%3a1_amd64.deb 10 SHA256:0\"")  # fmt: skip
    found = packages.closure(["a", "b"], alone=["c"])
    assert [(one.name, one.file, one.size) for one in found] == [
        ("a", "a_1%3a1_amd64.deb", 10), ("b", "b_2_all.deb", 20)
    ]  # fmt: skip


def test_a_package_that_is_not_known_or_not_there_gets_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stand_in(tmp_path, "apt-get", "echo 'E: Unable to locate package nope' >&2; exit 100")
    with pytest.raises(HostError, match=r"Unable to locate package nope.*run apt-get update"):
        packages.closure(["nope"])
    with pytest.raises(HostError, match=r"downloading Debian packages failed .*Unable to locate"):
        packages.unpack([packages.Package("a_1_all.deb", 1)], tmp_path / "archives", tmp_path / "tree", lambda *_: None)


def test_an_archive_that_does_not_unpack_is_removed_and_named(tmp_path: Path) -> None:
    archives = tmp_path / "archives"
    archives.mkdir()
    (archives / "a_1_all.deb").write_bytes(b"not an archive")
    with pytest.raises(HostError, match=r"unpacking a_1_all\.deb failed"):
        packages.unpack([packages.Package("a_1_all.deb", 14)], archives, tmp_path / "tree", lambda *_: None)
    assert not list(archives.iterdir())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "ended in the middle of its job"),
        ({"./junit.xml": b""}, "ended in the middle of its job"),
        ({"./failure": b"this host has no /dev/kvm\n"}, "^this host has no /dev/kvm$"),
    ],
)
def test_a_host_without_a_status_says_why(tmp_path: Path, files: dict[str, bytes] | None, message: str) -> None:
    results = emulator.Results(tmp_path)
    if files is not None:
        write_results(results, files)
    with pytest.raises(HostError, match=message):
        results.status()


def test_the_job_s_status_and_files_come_back(tmp_path: Path) -> None:
    results = emulator.Results(tmp_path)
    write_results(results, {"./status": b"1\n", "./junit.xml": b"<testsuites/>"})
    assert results.status() == 1
    results.unpack(tmp_path / "out")
    assert (tmp_path / "out" / "junit.xml").read_bytes() == b"<testsuites/>"


def write_results(results: emulator.Results, files: dict[str, bytes]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with open(results.disk, "r+b") as disk:
        disk.write(packed.getvalue())


def test_an_emulator_does_not_outlive_a_killed_run() -> None:
    program = (
        "from tests.svm import emulator; import time\n"
        "print(emulator.start(['sleep', '1000']).pid, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        emulated = os.pidfd_open(int(run.stdout.readline()))
        run.send_signal(signal.SIGKILL)
        ended, _, _ = select.select([emulated], [], [], 60)
        os.close(emulated)
    assert ended


def test_a_test_that_hangs_in_native_code_is_ended_and_named_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(
        "import ctypes\n"
        "def test_before(): pass\n"
        "def test_hangs():\n"
        "    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # holds the interpreter's lock\n"
        "    libc.pthread_mutex_lock(mutex)\n"
        "    libc.pthread_mutex_lock(mutex)  # for ever: no signal ends it\n"
        "def test_after(): pass\n"
    )
    environment = {**os.environ, "SVM_TEST_LIMIT": "5", "SVM_TEST_GRACE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "tests.svm.limit", "-n", "1", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "1 failed, 2 passed" in done.stdout
    assert "crashed while running 'test_hanging.py::test_hangs'" in done.stdout
    assert "Timeout (0:00:06)!" in done.stdout + done.stderr
