"""An independent judge of the virtio guests: QEMU's devices on both transports, before ours are held to the same."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    GuestPath = Callable[[str], str]

NEEDS_KVM = False
QEMU = "qemu-system-x86_64"
PASSED = 0x10 << 1 | 1
MIB = 1 << 20

pytestmark = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")

# (machine, what a device's name ends in there). Without ACPI, microvm says on the command line where its devices are.
MACHINES = {"mmio": ("microvm,acpi=off", "device"), "pci": ("pc", "pci,disable-legacy=on")}


def command(transport: str, guest: str, append: str, *arguments: str) -> list[str]:
    """QEMU, on its own processor model, with a guest; its serial line is standard output."""
    line = [QEMU, "-accel", "tcg", "-M", MACHINES[transport][0], "-m", "64", "-nodefaults", "-no-user-config"]
    line += ["-no-reboot", "-display", "none", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]
    line += ["-global", "virtio-mmio.force-legacy=false", "-kernel", guest, "-append", append]
    return [*line, *arguments]


def device(transport: str, kind: str, options: str = "") -> list[str]:
    """A virtio device on that transport."""
    return ["-device", f"virtio-{kind}-{MACHINES[transport][1]}{options}"]


def disk(transport: str, image: Path, options: str = "", *, readonly: bool = False) -> list[str]:
    """A disk with a serial number."""
    drive = f"if=none,id=disk,format=raw,file={image}" + (",readonly=on" if readonly else "")
    return ["-drive", drive, *device(transport, "blk", f",drive=disk,serial=judge{options}")]


def assert_passed(line: list[str]) -> str:
    """Run it to its end; what the guest said."""
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == PASSED, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(2 * MIB)
    return path


@pytest.mark.parametrize("transport", MACHINES)
@pytest.mark.parametrize("words", ["", "indirect=1 event_idx=1", "packed=1", "packed=1 indirect=1 event_idx=1"])
def test_the_disk_guest_finds_a_disk_it_can_trust(guest: GuestPath, image: Path, transport: str, words: str) -> None:
    packed = ",packed=on" if "packed" in words else ""
    line = command(transport, guest("blk_rw"), f"sectors={2 * MIB // 512} {words}", *disk(transport, image, packed))
    assert "id judge\n" in assert_passed(line)
    for number in range(0, 256):
        block = image.read_bytes()[number * 4096 : (number + 1) * 4096]
        written = struct.pack("<512Q", *(number << 32 | index for index in range(512)))
        assert block == (bytes(4096) if number % 3 else written), number


def test_the_disk_guest_knows_a_read_only_disk(guest: GuestPath, image: Path) -> None:
    arguments = disk("mmio", image, readonly=True)
    assert_passed(command("mmio", guest("blk_rw"), f"sectors={2 * MIB // 512} ro=1", *arguments))


@pytest.mark.parametrize("transport", MACHINES)
def test_a_device_of_qemu_answers_broken_rings_as_the_abusing_guest_demands(
    guest: GuestPath, image: Path, transport: str
) -> None:
    said = assert_passed(command(transport, guest("ring_abuse"), "qemu=1", *disk(transport, image)))
    assert "a chain in a circle\n" in said


@pytest.mark.parametrize(
    ("transport", "words", "said"),
    [("mmio", "", "line"), ("pci", "", "INTx"), ("pci", "msix=1 masked=1", "MSI-X"), ("pci", "event_idx=1", "INTx")],
)
def test_the_interrupt_guest_takes_every_kind(guest: GuestPath, transport: str, words: str, said: str) -> None:
    line = command(transport, guest("virtio_irq"), words, *device(transport, "rng"))
    assert assert_passed(line).startswith(said)


@pytest.mark.parametrize("words", ["", "mergeable=1", "packed=1"])
def test_two_guests_on_a_link_exchange_frames(guest: GuestPath, tmp_path: Path, words: str) -> None:
    packed = ",packed=on" if "packed" in words else ""
    end = f"stream,id=net,addr.type=unix,addr.path={tmp_path / 'link'},server="
    # The one that listens answers only: QEMU 7.2 crashes when its guest sends before somebody has connected.
    ends = []
    for role, server in ((0, "off"), (1, "on")):
        nic = ["-netdev", end + server, *device("mmio", "net", f",netdev=net{packed}")]
        ends.append(command("mmio", guest("net_pair"), f"role={role} {words}", *nic))
    with subprocess.Popen(ends[1], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as other:
        try:
            while not (tmp_path / "link").exists():
                assert other.poll() is None
                time.sleep(0.01)
            assert_passed(ends[0])
            said, _ = other.communicate(timeout=20)
            assert other.returncode == PASSED, said.decode()
        finally:
            other.kill()
