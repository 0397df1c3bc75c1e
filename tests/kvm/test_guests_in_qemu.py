"""An independent judge of the guests themselves: QEMU, on its own processor model (TCG) and machines."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    GuestPath = Callable[[str], str]

NEEDS_KVM = False
QEMU = "qemu-system-x86_64"
PASSED = 0x10 << 1 | 1

pytestmark = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")

# (guest, machine, command line, further arguments, exit status). With -no-reboot a reset ends QEMU with 0.
CASES = [
    ("hello", "microvm", "", (), PASSED),
    ("hello_protected", "pc", "", (), PASSED),
    ("pvh", "pc", "modules=1", ("-initrd", "/etc/hostname"), PASSED),
    ("multiboot", "pc", "modules=1", ("-initrd", "/etc/hostname"), PASSED),
    ("multiboot_kludge.bin", "pc", "", (), PASSED),
    # What TCG 7.2 does not do is left out, see guests/traps and guests/uart.
    ("traps", "pc", "ac=0 idt_shift=4", (), PASSED),
    ("syscall", "pc", "", (), PASSED),
    ("instructions", "pc", "", ("-cpu", "max"), PASSED),
    ("irq", "pc", "", (), PASSED),
    ("smp", "pc", "cpus=4", ("-smp", "4"), PASSED),
    ("uart", "pc", "qemu=1", (), PASSED),
    ("rtc", "pc", "", (), PASSED),
    ("pio_string", "pc", "pci=1", (), PASSED),
    ("mmio", "pc", "addr=0x800000", (), PASSED),
    ("memory_map", "pc", f"mem={5 << 30}", ("-m", "5G"), PASSED),
    ("exits", "microvm", "pio=100 mmio=100 cpl=3", (), PASSED),
    ("umip", "pc", "", ("-cpu", "max"), PASSED),
    ("poweroff", "pc", "", (), 0),
    ("poweroff", "microvm", "", (), 0),
    ("reset_i8042", "pc", "", (), 0),
    ("reset_acpi", "microvm", "", (), 0),
    ("pvpanic", "pc", "", ("-device", "pvpanic"), 0),
    ("triple_fault", "pc", "", (), 0),
    ("debug_exit", "pc", "value=42", (), 42 << 1 | 1),
]


def qemu(machine: str, *arguments: str) -> tuple[int, str]:
    """Run QEMU to its end; its exit status and the guest's serial output."""
    command = [QEMU, "-accel", "tcg", "-M", machine, "-m", "64", "-nodefaults", "-no-user-config", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]
    done = subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "machine", "append", "arguments", "status"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES]
)
def test_the_guest_does_on_qemu_what_it_claims(
    guest: GuestPath, name: str, machine: str, append: str, arguments: tuple[str, ...], status: int
) -> None:
    found, output = qemu(machine, "-kernel", guest(name), "-append", append, *arguments)
    assert found == status, output
    assert "FAIL" not in output


def test_the_real_mode_guest_is_a_boot_sector(guest: GuestPath) -> None:
    status, output = qemu("pc", "-drive", f"format=raw,snapshot=on,file={guest('hello_real.bin')}")
    assert status == PASSED, output
    assert "Hello from real mode\nPASS\n" in output
