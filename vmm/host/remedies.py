"""Remedies of one machine for the shortcomings of its host's KVM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm._ffi import lib

if TYPE_CHECKING:
    from vmm.cpu.findings import Findings


class Remedies:
    """The remedies: native flags, and whether guest kernel code is ``emulated``."""

    __slots__ = ("emulated", "remedies", "tsc_fixed", "unpaged", "unstopped", "vmcall_loops")

    def __init__(self, found: Findings | None, mode: str) -> None:
        forced = mode == "on"
        self.remedies = 0
        self.vmcall_loops = self.emulated = self.tsc_fixed = False
        self.unstopped: list[str] = found.unstopped if found else []
        self.unpaged: list[str] = found.unpaged if found else []
        if mode == "off" or found is None:
            return
        self.emulated = not found.native
        self.vmcall_loops = forced or found.vmcall_loops
        self.tsc_fixed = forced or found.tsc_fixed
        if forced or found.missing:
            self.remedies |= lib.VMM_COMPAT_COMPLETE
        if forced or found.syscall_broken:
            self.remedies |= lib.VMM_COMPAT_SYSCALL
        if found.syscall_broken:  # where it is not, SYSCALL must find the guest's entry
            self.remedies |= lib.VMM_COMPAT_LSTAR
        if self.vmcall_loops:
            self.remedies |= lib.VMM_COMPAT_HYPERCALL
        if forced or found.shadowed:
            self.remedies |= lib.VMM_COMPAT_SHADOW
