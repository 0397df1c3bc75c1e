"""The ways by which kernels written for other machines end them: each is one write, or a few, of real-mode code."""

from __future__ import annotations

from typing import Any

import pytest

HLT = b"\xfa\xf4\xeb\xfd"  # cli; 1: hlt; jmp 1b: a guest that is still there ends by --timeout


def outw(port: int, value: int) -> bytes:
    return b"\xba" + port.to_bytes(2, "little") + b"\xb8" + value.to_bytes(2, "little") + b"\xef"


def outb(port: int, *values: int) -> bytes:
    return b"\xba" + port.to_bytes(2, "little") + b"".join(b"\xb0" + bytes([value]) + b"\xee" for value in values)


POWEROFF = {
    "QEMU": outw(0x604, 0x2000),
    "this machine": outw(0x604, 0x3400),
    "Bochs and old QEMU": outw(0xB004, 0x2000),
    "Bochs, by its letters": outb(0x8900, *b"ShutShutdown"),
    "VirtualBox": outw(0x4004, 0x3400),
    "Cloud Hypervisor": outw(0x600, 0x34),
}
RESET = {
    "reset control": outb(0xCF9, 0x06),
    "reset control, in two steps": outb(0xCF9, 0x02, 0x06),
    "power cycle": outb(0xCF9, 0x0E),
    "fast reset": b"\xe4\x92\x0c\x01\xe6\x92",  # in al, 0x92; or al, 1; out 0x92, al
    "keyboard controller": b"\xb0\xfe\xe6\x64",
    "ACPI": outb(0x60C, 1),
}
NOTHING = {
    "A20": b"\xe4\x92\x0c\x02\xe6\x92",
    "a reset that is only prepared": outb(0xCF9, 0x02, 0x0A),
    "sleep without SLP_EN": outw(0xB004, 0x1400),
    "sleep of another type": outw(0x604, 0x2800) + outw(0xB004, 0x2800),
    "letters out of order": outb(0x8900, *b"Shutdwon"),
    "PCI": b"\x66\xb8\xff\xff\xff\x80\xba\xf8\x0c\x66\xef",  # a whole double word with the bits of 0xcf9's set
}


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
@pytest.mark.parametrize("way", POWEROFF)
def test_power_off(flat: Any, way: str, virtio: str) -> None:
    assert flat(POWEROFF[way] + HLT, mode="real", virtio=virtio, timeout=20).run().reason == "power-off"


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
@pytest.mark.parametrize("way", RESET)
def test_reset(flat: Any, way: str, virtio: str) -> None:
    assert flat(RESET[way] + HLT, mode="real", virtio=virtio, timeout=20).run().reason == "reset"


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
@pytest.mark.parametrize("what", NOTHING)
def test_what_is_no_way_out_changes_nothing(flat: Any, what: str, virtio: str) -> None:
    machine = flat(NOTHING[what] + b"\xb0\x05\xe6\xf4", mode="real", virtio=virtio, timeout=20)
    assert machine.run().reason == "debug-exit"


def test_the_reset_control_register_reads_as_zero(flat: Any) -> None:
    code = b"\xba\xf9\x0c\xec\x04\x05\xe6\xf4"  # mov dx, 0xcf9; in al, dx; add al, 5; out 0xf4, al
    assert [flat(code, mode="real", virtio=virtio).run().code for virtio in ("pci", "mmio")] == [5, 5]
