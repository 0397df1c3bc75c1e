"""Linux's own drivers on the console, balloon and socket devices: one boot of the small kernel, a shell on hvc0."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm.console import Console
from vmm.devices.virtio.balloon import Balloon
from vmm.devices.virtio.console import VirtioConsole
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import HostError
from vmm.linux import initramfs
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(600)  # a boot takes 15 s alone where kernel code is emulated
PATIENCE = 240
MIB = 1 << 20


class Guest:
    """A running guest, its devices, and the shell on its console."""

    def __init__(self, small_kernel: SmallKernel, folder: Path) -> None:
        program = folder / "vsock-echo"
        source = Path(__file__).with_name("vsock-echo.c")
        subprocess.run(["gcc", "-static", "-Os", "-Wall", "-o", program, source], check=True)
        initrd = initramfs.default(entries=[initramfs.file("bin/vsock-echo", program)])
        self.socket = str(folder / "v")
        self.console = Console()
        self.machine = Machine(
            kernel=small_kernel.bzimage, initrd=[initrd], memory="256M", append="console=hvc0 quiet", rng=False
        )
        vm = self.machine.native
        self.hvc0 = VirtioConsole(vm, 0, self.console, size=(100, 30))
        self.balloon = Balloon(vm, 0, reporting=False)
        self.silent = Balloon(vm, 1, reporting=False, statistics=False)
        self.vsock = Vsock(vm, 0, cid=5, path=self.socket)
        for device in (self.hvc0, self.balloon, self.silent, self.vsock):
            self.machine.add(device)
        self.machine.start()
        self.console.expect("/ # ", PATIENCE)

    def shell(self, command: str) -> str:
        """What ``command`` prints; it must succeed."""
        self.console.send(f"echo be''gin; {command}; echo sta''tus-$?-\n")  # what is echoed matches nothing below
        printed = self.console.expect(rb"begin\r\n((?s:.*))status-(\d+)-\r", PATIENCE)
        assert printed[2] == b"0", f"{command}: {printed[1]!r}"
        return str(printed[1].decode().replace("\r", ""))

    def close(self) -> None:
        self.machine.close()
        self.console.destroy()


@pytest.fixture(scope="module")
def guest(small_kernel: SmallKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    guest = Guest(small_kernel, tmp_path_factory.mktemp("guest"))
    yield guest
    guest.close()
    assert not os.path.exists(guest.socket)


# -- console --------------------------------------------------------------------------------------------------------


def test_a_shell_runs_on_the_virtio_console(guest: Guest) -> None:
    assert guest.shell("echo $((6*7)) on $(cat /sys/class/tty/console/active)") == "42 on hvc0\n"
    statistics = guest.hvc0.queue_statistics()
    assert statistics[0]["bytes_in"] > 0 and statistics[1]["bytes_out"] > 0


def test_a_burst_each_way_arrives_whole(guest: Guest) -> None:
    lines = [f"{i:02} " + "0123456789abcdef" * 3 for i in range(60)]
    guest.console.send("sh -c 'stty -echo; echo ready; cat >/tmp/typed; stty echo'\n")
    guest.console.expect("\nready\r\n", PATIENCE)
    guest.console.send("".join(line + "\n" for line in lines) + "\x04")
    guest.console.expect("/ # ", PATIENCE)
    assert guest.shell("cat /tmp/typed /tmp/typed").splitlines() == lines * 2


def test_the_guest_follows_the_terminals_size(guest: Guest) -> None:
    assert guest.shell("stty size") == "30 100\n"
    guest.hvc0.resize(132, 50)
    assert guest.shell("until [ \"$(stty size)\" = '50 132' ]; do sleep 0.1; done; stty size") == "50 132\n"


# -- balloon --------------------------------------------------------------------------------------------------------


def resident() -> int:
    """This process's proportional set size in bytes: guest memory counts as far as pages exist."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss in smaps_rollup")


def wait_until(what: str, done: object, timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def touch(guest: Guest) -> None:
    """Every page of the guest's memory gets one on the host, by being read: the guest would take minutes, emulated."""
    for gpa, size in guest.machine.memory.regions:
        for page in range(gpa, gpa + size, 4096):
            guest.machine.memory.read(page, 1)


def test_inflating_gives_the_host_its_memory_back_and_deflating_the_guest_its_own(guest: Guest) -> None:
    touch(guest)
    full, free = resident(), guest.balloon.memory(PATIENCE)["free"]
    guest.balloon.target = 64 * MIB
    wait_until("inflated", lambda: guest.balloon.actual == 64 * MIB)
    assert guest.balloon.counters()["released"] == 64 * MIB
    assert resident() < full - 60 * MIB
    assert guest.balloon.memory(PATIENCE)["free"] < free - 60 * MIB

    guest.balloon.target = 0
    wait_until("deflated", lambda: guest.balloon.actual == 0)
    assert guest.balloon.memory(PATIENCE)["free"] > free - 4 * MIB
    assert guest.shell("seq 3 | wc -l") == "3\n"  # what came back is memory like any other
    assert guest.balloon.counters()["refused"] == 0


def test_the_guest_tells_of_its_memory_when_asked(guest: Guest) -> None:
    first, second = guest.balloon.memory(PATIENCE), guest.balloon.memory(PATIENCE)
    assert 200 * MIB < first["total"] == second["total"] < 256 * MIB
    assert 0 < second["free"] <= second["available"] + 32 * MIB
    with pytest.raises(HostError, match="no driver that gives statistics"):
        guest.silent.memory()


# -- vsock ----------------------------------------------------------------------------------------------------------

STREAM = bytes((i * 7 + (i >> 8)) & 0xFF for i in range(MIB))


def echo(end: socket.socket) -> bytes:
    """What comes back of :data:`STREAM`, written and read at once, to the end of the stream."""

    def write() -> None:
        end.sendall(STREAM)
        end.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    writer.start()
    got = bytearray()
    while part := end.recv(1 << 16):
        got += part
    writer.join()
    return bytes(got)


def test_the_host_connects_to_a_port_of_the_guest(guest: Guest) -> None:
    guest.console.send("vsock-echo listen 1234\n")
    guest.console.expect("\nlistening\r\n", PATIENCE)
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(PATIENCE)
        end.connect(guest.socket)
        end.sendall(b"CONNECT 1234\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += end.recv(1)
        assert answer.startswith(b"OK ")
        assert echo(end) == STREAM
    guest.console.expect(f"echoed {MIB}\r\n", PATIENCE)
    wait_until("closed", lambda: guest.vsock.connections()["now"] == 0)


def test_the_guest_connects_to_a_socket_of_the_host(guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(guest.socket + "_77")
        listener.listen()
        listener.settimeout(PATIENCE)
        guest.console.send("vsock-echo connect 77\n")
        end = listener.accept()[0]
        with end:
            end.settimeout(PATIENCE)
            assert echo(end) == STREAM
    guest.console.expect(f"echoed {MIB}\r\n", PATIENCE)
    wait_until("closed", lambda: guest.vsock.connections()["now"] == 0)


def test_ports_nobody_listens_on_are_refused_both_ways(guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(PATIENCE)
        end.connect(guest.socket)
        end.sendall(b"CONNECT 4321\n")
        assert end.recv(64) == b""
    assert "onnection reset" in guest.shell("vsock-echo connect 4321 2>&1; true")
