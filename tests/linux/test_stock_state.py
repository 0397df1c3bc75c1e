"""Debian's cloud kernel under load goes back, into files, into other processes and into copies of itself.

Two vCPUs, a disk that is written, programs that compute, and one (``steady.c``) that watches its clocks and its vector
registers all the while. Minutes where KVM emulates guest kernel code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmm import Machine, host, migrate
from vmm.config import MachineConfig
from vmm.linux import debian, initramfs, modules
from vmm.testing.linux import LinuxGuest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PATIENCE = 900.0
HERE = Path(__file__).parent

LOAD = """
/bin/steady >/tmp/steady 2>&1 & echo $! >/tmp/watcher
(while :; do head -c 300000 /dev/urandom | md5sum; done) >/dev/null 2>&1 &
(while echo tick; do sleep 0.1; done >/dev/vda) >/dev/null 2>&1 &
head -c 4000000 /dev/urandom >/tmp/kept; md5sum </tmp/kept
"""
# The watcher writes its line once the signal has reached it.
LOOK = (
    "kill -TERM $(cat /tmp/watcher); until [ -s /tmp/steady ]; do sleep 0.1; done\ncat /tmp/steady; md5sum </tmp/kept"
)
COMPLAINTS = "dmesg | grep -ciE 'stall|lockup|I/O error|unstable|clocksource.*skew|Call Trace'"

# In a process of its own, which knows of the snapshot alone.
GO_ON = """
import json, sys
from vmm import Machine
from vmm.testing.linux import LinuxGuest
snapshot, look, complaints, disk = sys.argv[1:]
guest = LinuxGuest()
guest.machine = Machine.restore(snapshot, disks=[disk] if disk else None)
guest.machine.start()
print(json.dumps([guest.run(look, timeout=900).output, guest.run(complaints, timeout=900).output]))
guest.close()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steady") / "steady"
    source = HERE / "steady.c"
    subprocess.run(["gcc", "-static", "-O2", "-Wall", "-Werror", "-o", path, source], check=True, timeout=120)
    return path


@pytest.fixture
def booted(cloud_kernel: debian.StockKernel, program: Path, tmp_path: Path) -> Iterator[Callable[..., LinuxGuest]]:
    """Makes guests with the load running; gives each as ``(guest, sum of the file that it keeps)``."""
    made: list[LinuxGuest] = []

    def make(**fields: Any) -> LinuxGuest:
        disk = tmp_path / "disk.img"
        disk.write_bytes(bytes(8 << 20))
        fields = {"memory": "512M", "cpus": 2, "disks": [str(disk)], **fields}
        wanted = modules.of_machine(MachineConfig(kernel=str(cloud_kernel.vmlinuz), **fields))
        entries = [initramfs.file("bin/steady", program), *modules.entries(cloud_kernel.modules, wanted)]
        initrd = initramfs.save(initramfs.build(entries))
        guest = LinuxGuest(kernel=str(cloud_kernel.vmlinuz), initrd=[str(initrd)], **fields)
        made.append(guest)
        return guest

    yield make
    for guest in made:
        guest.close()


def begin(guest: LinuxGuest) -> str:
    """Start the load; the checksum of the file that must stay as it is."""
    status, output = guest.run(LOAD, timeout=PATIENCE)
    assert status == 0, output
    return output


def went_well(guest: LinuxGuest, kept: str) -> None:
    assert guest.machine is not None
    looked = guest.run(LOOK, timeout=PATIENCE).output
    check(looked, guest.run(COMPLAINTS, timeout=PATIENCE).output, kept)


def check(looked: str, complaints: str, kept: str) -> None:
    found, _, rest = looked.partition("\n")
    assert found in ("avx 1 rounds 1 wrong 0 backwards 0", "avx 0 rounds 1 wrong 0 backwards 0"), looked
    assert rest == kept
    assert complaints == "0\n"


def test_the_command_line_holds_no_remedy_where_kernel_code_is_native(booted: Callable[..., LinuxGuest]) -> None:
    if not host.findings().native:
        pytest.skip("this host emulates guest kernel code, which needs remedies on the command line")
    words = booted().run("cat /proc/cmdline", timeout=PATIENCE).output.split()
    for remedy in ("clearcpuid", "nolapic_timer", "highres", "no_timer_check", "cryptomgr.notests", "mitigations"):
        assert not any(word.startswith(remedy) for word in words), words


def test_user_programs_have_avx_where_the_host_has_it(booted: Callable[..., LinuxGuest]) -> None:
    if not host.findings().native or " avx " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this host has no AVX, or emulates guest kernel code, which hides it")
    guest = booted()
    begin(guest)
    assert guest.run(LOOK, timeout=PATIENCE).output.startswith("avx 1 rounds 1 wrong 0 backwards 0\n")


def test_it_goes_back_again_and_again(booted: Callable[..., LinuxGuest]) -> None:
    guest = booted()
    kept = begin(guest)
    assert guest.machine is not None
    point = guest.machine.checkpoint()
    for _ in range(5):
        assert guest.run("ls /tmp/new", timeout=PATIENCE).status == 1
        assert guest.run("echo new >/tmp/new; rm /tmp/kept; sync", timeout=PATIENCE).status == 0
        guest.machine.rollback(point)
    went_well(guest, kept)


def test_it_goes_on_from_a_snapshot_in_a_new_process(booted: Callable[..., LinuxGuest], tmp_path: Path) -> None:
    guest = booted()
    kept = begin(guest)
    assert guest.machine is not None
    guest.machine.snapshot(tmp_path / "snapshot").close()
    guest.close()
    done = subprocess.run(
        [sys.executable, "-c", GO_ON, str(tmp_path / "snapshot"), LOOK, COMPLAINTS, ""],
        capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    looked, complaints = json.loads(done.stdout)
    check(looked, complaints, kept)


def test_clones_go_on_beside_it(booted: Callable[..., LinuxGuest]) -> None:
    guest = booted()
    kept = begin(guest)
    clones = guest.clone(2)
    try:
        for one in (*clones, guest):
            went_well(one, kept)
    finally:
        for one in clones:
            one.close()


@pytest.mark.parametrize("postcopy", [False, True], ids=["pre-copy", "post-copy"])
def test_it_moves_under_load(booted: Callable[..., LinuxGuest], tmp_path: Path, postcopy: bool) -> None:
    guest = booted()
    kept = begin(guest)
    for n in range(3):
        came: list[Machine] = []
        address = f"unix:{tmp_path}/{n}"
        with migrate.Receiver(address) as receiver:
            there = threading.Thread(target=lambda r=receiver, c=came: c.append(r.receive(PATIENCE)))
            there.start()
            assert guest.machine is not None
            guest.machine.migrate(address, postcopy=postcopy)
            there.join()
        guest.machine.close()
        (guest.machine,) = came
    went_well(guest, kept)


def test_its_memory_is_in_huge_pages(booted: Callable[..., LinuxGuest]) -> None:
    pool = Path("/proc/sys/vm/nr_hugepages")
    needed, before = 256 + 8, int(pool.read_text())
    try:
        pool.write_text(str(max(before, needed)))
    except OSError as error:
        pytest.skip(f"no huge pages can be set aside here: {error.strerror}")
    try:
        if int(pool.read_text()) < needed:
            pytest.skip("this host has no room for 512 MiB of huge pages")
        guest = booted(huge_pages=True)
        kept = begin(guest)
        went_well(guest, kept)
        guest.close()
    finally:
        pool.write_text(str(before))
