"""Linux on the network: through the host's connections as an ordinary user may have them, and guest to guest."""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from vmm import Machine
from vmm.linux import initramfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(600)

LOST = "virtio-net0: its host end is gone (Connection reset by peer); the link is down"

# What busybox' udhcpc calls with what it was given.
LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo "lease: $ip $router"
"""


def printed_by(machine: Machine) -> str:
    return machine.console.transcript.decode(errors="replace").replace("\r", "")


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A server on the host's loopback with one file, ``data``: its port, and the file's SHA-256."""
    data = random.Random(1).randbytes(300_000)
    (tmp_path / "data").write_bytes(data)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], hashlib.sha256(data).hexdigest()
        server.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is missing: apt-get install passt")
@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_a_guest_gets_an_address_and_fetches_a_file_from_the_host(
    small_kernel: SmallKernel, web_server: tuple[int, str], transport: str
) -> None:
    port, digest = web_server
    program = f"""
printf '%s' '{LEASE}' > /lease; chmod 755 /lease
ip link set lo up; ip link set eth0 up
udhcpc -i eth0 -s /lease -n -q -f
wget -q -O - http://10.0.2.2:{port}/data | sha256sum
"""
    initrd = initramfs.command(["sh", "-c", program])
    with Machine(
        kernel=small_kernel.bzimage, initrd=[initrd], memory="128M", nets=["user"], virtio=transport
    ) as machine:
        outcome = machine.run(timeout=300)
        printed = printed_by(machine)
        assert outcome.reason == "power-off", printed[-2000:]
        assert "lease: 10.0.2.15 10.0.2.2" in printed, printed[-2000:]
        assert digest in printed, printed[-2000:]
        assert machine.messages == []


def test_two_guests_ping_each_other_and_send_a_file_over_a_socket_link(
    small_kernel: SmallKernel, tmp_path: Path
) -> None:
    server = """
ip link set eth0 up; ip addr add 10.1.1.1/24 dev eth0
mkdir /www; head -c 200000 /bin/busybox > /www/data
echo served: $(sha256sum < /www/data)
httpd -h /www
until ping -c 1 -W 1 10.1.1.2; do :; done
while ping -c 1 -W 5 10.1.1.2 >/dev/null; do sleep 1; done
echo carrier: $(cat /sys/class/net/eth0/carrier)
"""
    client = """
ip link set eth0 up; ip addr add 10.1.1.2/24 dev eth0
until wget -q -O /data http://10.1.1.1/data; do sleep 1; done
echo fetched: $(sha256sum < /data)
"""
    path = os.fspath(tmp_path / "link")
    machines = [
        Machine(
            kernel=small_kernel.bzimage,
            initrd=[initramfs.command(["sh", "-c", program])],
            memory="128M",
            nets=[f"socket={path}"],
        )
        for program in (server, client)
    ]
    try:
        for machine in machines:
            machine.start()
        done = machines[1].wait(timeout=400)
        fetched = printed_by(machines[1])
        machines[1].close()
        outcomes = [machines[0].wait(timeout=60), done]
        printed = [printed_by(machines[0]), fetched]
        assert [outcome.reason for outcome in outcomes] == ["power-off"] * 2, printed[0][-1500:] + printed[1][-1500:]
        digest = printed[0].split("served: ")[1].split()[0]
        assert f"fetched: {digest}" in printed[1]
        assert "1 packets received" in printed[0]
        # The client powered off first, and its network with it.
        assert "carrier: 0" in printed[0]
        assert machines[0].messages == [LOST]
    finally:
        for machine in machines:
            machine.close()
