"""Linux's own drivers on the console, balloon and socket devices: one boot of the small kernel, a shell on hvc0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm.console import Console
from vmm.devices.virtio.console import VirtioConsole
from vmm.linux import initramfs
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(300)  # a boot takes 15 s alone where kernel code is emulated
PATIENCE = 120


class Guest:
    """A running guest, its devices, and the shell on its console."""

    def __init__(self, small_kernel: SmallKernel) -> None:
        self.console = Console()
        self.machine = Machine(
            kernel=small_kernel.bzimage, initrd=[initramfs.default()], memory="256M", append="console=hvc0 quiet"
        )
        vm = self.machine.native
        self.hvc0 = VirtioConsole(vm, 0, self.console, size=(100, 30))
        self.machine.add(self.hvc0)
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
def guest(small_kernel: SmallKernel) -> Iterator[Guest]:
    guest = Guest(small_kernel)
    yield guest
    guest.close()


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
