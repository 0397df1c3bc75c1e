"""What the processor under this host's kernel does not do, where it is an emulator: facts for tests, not for pyvmm."""

from __future__ import annotations

from pathlib import Path


def is_tcg() -> bool:
    """Whether it is QEMU's TCG."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


def traps_left_out() -> str:
    """Words for ``guests/traps``: what QEMU's TCG gets wrong, seen in 7.2, where it is the processor; else none.

    Without #AC, and with an error code of vector * 16 where the IDT ends in long mode (SDM vol. 3, 6.13 has * 8).
    """
    return "ac=0 idt_shift=4" if is_tcg() else ""


def takes_any_lstar() -> bool:
    """Whether WRMSR sets LSTAR to an address that is not canonical, which is #GP (SDM vol. 2, WRMSR): QEMU's TCG does,
    and kvm-amd leaves that MSR to the processor."""
    return is_tcg()
